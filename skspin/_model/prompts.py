"""What is tokenized: a text in its prompt, or a conversation in its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from skspin._model.recipe import Recipe

_MARK = "\ue000{}\ue001"  # stands for a message while the template's own characters are looked for
_STRIPS = (str, str.strip, str.rstrip, str.lstrip)  # what templates do to a message


class Span(NamedTuple):
    """The user's characters in the string that is tokenized."""

    start: int
    end: int
    role: str | None = None


class Filled(NamedTuple):
    """The string that is tokenized, and where in it the user's texts or messages are."""

    string: str
    spans: list[Span]


def fill_in(text: str, recipe: Recipe, tokenizer: Any) -> Filled:
    """Write a text in its prompt, or a conversation (JSON) with the chat template."""
    if recipe.conversations:
        conversation = json.loads(text)
        rendered = _apply_template(tokenizer, conversation)
        spans = _find_messages(rendered, conversation, tokenizer)
        if spans is None and recipe.pool_over != "all":
            raise ValueError(
                f"pool_over={recipe.pool_over!r} needs to know which characters are whose, "
                "but the tokenizer's chat template changes the messages of a conversation (such as "
                f"{rendered[:80]!r}). Use pool_over='all'."
            )
        return Filled(rendered, spans or [Span(0, len(rendered))])
    if recipe.prompt is None:
        return Filled(text, [Span(0, len(text))])
    string, *parts = recipe.prompt.split("{text}")
    spans = []
    for part in parts:
        spans.append(Span(len(string), len(string) + len(text)))
        string += text + part
    return Filled(string, spans)


def _find_messages(
    rendered: str, conversation: list[dict[str, Any]], tokenizer: Any
) -> list[Span] | None:
    """Find the messages in a conversation as written; None if the template changes them."""
    # Rendered once more with marks for messages: what is not a mark is the template's.
    marks = [_MARK.format(number) for number in range(len(conversation))]
    marked = _apply_template(
        tokenizer, [{**said, "content": m} for said, m in zip(conversation, marks, strict=True)]
    )
    pieces = []  # of the template: before the first message, between two, after the last
    for mark in marks:
        before, found, marked = marked.partition(mark)
        if not found:
            return None
        pieces.append(before)
    spans, at = [], len(pieces[0])
    for said, after in zip(conversation, [*pieces[1:], marked], strict=True):
        # What follows tells the message's own blanks from the template's.
        shapes = (strip(said["content"]) for strip in _STRIPS)
        content = next((s for s in shapes if rendered.startswith(s + after, at)), None)
        if content is None:
            return None
        spans.append(Span(at, at + len(content), said["role"]))
        at += len(content) + len(after)
    return spans if rendered.startswith(pieces[0]) and at == len(rendered) else None


def _apply_template(tokenizer: Any, conversation: list[dict[str, Any]]) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"X holds conversations, but {type(tokenizer).__name__} of this model has no "
            "chat template. Use an instruct model, set tokenizer.chat_template, or pass texts."
        )
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception as error:  # A template is a program, and may raise whatever it likes.
        roles = [message["role"] for message in conversation]
        raise ValueError(
            f"The model's chat template refuses a conversation with the roles {roles}: {error}"
        ) from error


def replace_surrogates(texts: Sequence[str]) -> list[str]:
    """Replace lone surrogates by U+FFFD, and two that make a pair by their character."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
    return list(texts)
