"""Texts, in their prompt or chat template, to token ids; windows; which tokens are pooled.

Offsets tell the tokens of a user's text from those of the prompt or the template, so it is decided
token by token what is cut, what is read in windows and what is pooled.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Encoding

from skspin._model.recipe import Recipe
from skspin._model.registry import Backbone
from skspin._texts import TextTokens

# A text without tokens is read as the first of these tokens that the tokenizer has.
_STANDS_FOR_NOTHING = ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id")
# A text of more characters per token than this is surely too long, so it is tokenized with offsets,
# which cutting needs and which cost time. A shorter text gets them only if it proves too long.
_SURELY_LONG = 8
_MARK = "\ue000{}\ue001"  # stands for a message while the template's own characters are looked for
_STRIPS = (str, str.strip, str.rstrip, str.lstrip)  # what templates do to a message


@dataclass(frozen=True)
class Window:
    """The tokens that the model reads at a time: a whole text, or a stretch of a long one."""

    inputs: dict[str, np.ndarray]  # "input_ids", perhaps "token_type_ids": (n_tokens,), int32
    pooled: np.ndarray | None = None  # (n_tokens,), bool: the tokens that count; None for all

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.inputs["input_ids"])

    @property
    def n_pooled(self) -> int:
        """Number of tokens that count."""
        return len(self) if self.pooled is None else int(self.pooled.sum())


class Encoded(NamedTuple):
    """A text's windows, and whether it lost tokens."""

    windows: list[Window]
    is_truncated: bool


class OpenTokens(NamedTuple):
    """The tokens of a text that may go on, without the prompt's or template's tokens after it."""

    ids: np.ndarray  # (n_tokens,), int
    pooled: np.ndarray  # (n_tokens,), bool
    own: np.ndarray  # (n_tokens,), bool: the text's, or those of the last message
    starts: np.ndarray  # (n_tokens,), int: characters of the text
    ends: np.ndarray  # (n_tokens,), int
    n_after: int  # how many tokens the prompt, template or tokenizer has after the text
    pools_after: bool  # whether any of those is pooled


class TextEncoder:
    """Turns texts into windows, by a model's tokenizer and a recipe.

    ``max_length`` is the recipe's, or less if the model has fewer positions. A text that has more
    tokens loses its last ones (its first, if the tokenizer's ``truncation_side`` is "left"), or is
    read in windows; special tokens and the prompt stay whole. The tokenizer is left as it is.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe):
        self.tokenizer, self._fast = backbone.tokenizer, backbone.bare_tokenizer
        self._most = min(backbone.n_positions, recipe.source.longest or backbone.n_positions)
        self.recipe, self.max_length = recipe, min(self._most, recipe.max_length)
        self.is_causal = backbone.anatomy.is_causal  # a token's context is what comes before it
        self.has_types = "token_type_ids" in getattr(self.tokenizer, "model_input_names", ())
        # A template writes special tokens itself.
        self._options = {"add_special_tokens": not recipe.conversations}
        if recipe.pool_over != "all":
            self.need_offsets(f"pool_over={recipe.pool_over!r}")

        # How messages name the limit, and the advice to raise it, if that is possible.
        self._limit, self._larger = f"max_length={self.max_length}", ["a larger max_length"]
        if self.max_length == self._most:
            self._limit, self._larger = f"The model's limit of {self._most} tokens", []

    def need_offsets(self, what: str) -> None:
        """Refuse a tokenizer that does not tell where tokens are, because ``what`` needs that."""
        if self._fast is None:
            raise ValueError(
                f"{what} needs a fast tokenizer, one with a tokenizer.json: "
                f"{type(self.tokenizer).__name__} does not tell where in the text its tokens are."
            )

    def no_room(self, n_around: int) -> ValueError:
        """Make the error which says that the tokens around a text leave no room for it."""
        overlap, remedies = self.recipe.overlap, [*self._larger, "a shorter prompt"]
        also = ""
        if overlap:
            also = f", and overlap={overlap}"
            remedies.insert(-1, "a smaller overlap")
        return ValueError(
            f"{self._limit} leaves no room for text: the tokens around it take {n_around}{also}. "
            f"Use {' or '.join(remedies)}."
        )

    def to_json(self) -> str:
        """Write the tokenizer as a tokenizer.json, without truncation and padding."""
        if self._fast is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} can't be written as tokenizer.json, because it "
                "is written in Python. Use the model's fast tokenizer."
            )
        return self._fast.to_str(pretty=True)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize texts. Lone surrogates, which no tokenizer reads, count as U+FFFD."""
        filled = [_fill_in(text, self.recipe, self.tokenizer) for text in replace_surrogates(texts)]
        if self._fast is None:
            return [self._encode_slow(item) for item in filled]
        rows: dict[int, Encoded] = {}
        most = _SURELY_LONG * self.max_length if self.recipe.pool_over == "all" else -1
        maybe_short = {i: f.string for i, f in enumerate(filled) if len(f.string) <= most}
        if maybe_short:
            encodings = self._fast.encode_batch_fast(list(maybe_short.values()), **self._options)
            for i, found in zip(maybe_short, encodings, strict=True):
                if len(found.ids) <= self.max_length:
                    types = found.type_ids if self.has_types else ()
                    rows[i] = Encoded([self._window(found.ids, types)], False)
        others = {i: f.string for i, f in enumerate(filled) if i not in rows}
        if others:
            encodings = self._fast.encode_batch(list(others.values()), **self._options)
            for i, found in zip(others, encodings, strict=True):
                rows[i] = self._split(found, filled[i])[0]
        return [rows[i] for i in range(len(filled))]

    def locate(self, text: str) -> tuple[list[Window], TextTokens]:
        """Tokenize one text as `encode` does, and say where in it the pooled tokens are."""
        self.need_offsets("Reading token by token")
        filled, encoding = self._encode_one(text)
        encoded, places = self._split(encoding, filled)
        if self.recipe.conversations:
            spans, begin, end = filled.spans, 0, len(filled.string)
        else:  # If the prompt repeats the text, the first occurrence counts as the text.
            spans = filled.spans[:1]
            begin, end, _ = spans[0]
        string = filled.string[begin:end]
        if not len(places):
            token = int(encoded.windows[0].inputs["input_ids"][0])
            names, nowhere = [str(self.tokenizer.convert_ids_to_tokens(token))], np.zeros(1, int)
            return encoded.windows, TextTokens(string, names, nowhere, nowhere, nowhere - 1)
        messages = _spans_of(encoding, spans)[places]  # (n_tokens,)
        starts, ends = (np.array(encoding.offsets)[places] - begin).clip(0, len(string)).T
        starts, ends = np.where(messages < 0, 0, starts), np.where(messages < 0, 0, ends)
        names = self.tokenizer.convert_ids_to_tokens(np.array(encoding.ids)[places].tolist())
        located = TextTokens(string, names, starts, ends, messages, encoded.is_truncated)
        return encoded.windows, located

    def tokenize_open(self, text: str) -> OpenTokens:
        """Tokenize a text, or a conversation's last message, that may go on where it ends."""
        filled, encoding = self._encode_open(text)
        span = _spans_of(encoding, filled.spans)  # (n_tokens,)
        own = span == len(filled.spans) - 1
        wanted = self._chosen(span, filled.spans)
        end = 1 + max(np.flatnonzero(own).tolist(), default=-1)
        places = np.array(encoding.offsets, int).reshape(-1, 2)[:end] - filled.spans[-1].start
        starts, ends = places.clip(0).T
        ids, n_after = np.array(encoding.ids, int)[:end], len(own) - end
        pools_after = bool(wanted[end:].any())
        return OpenTokens(ids, wanted[:end], own[:end], starts, ends, n_after, pools_after)

    def tokenize_head(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize what comes before a text, or a conversation's last message, by itself.

        Gives ids (n_tokens,), and which of them are pooled.
        """
        filled, whole = self._encode_open(text)
        n_special = whole.special_tokens_mask.index(0)  # before all others
        *spans, last = filled.spans
        encoding = self._fast.encode(filled.string[: last.start], add_special_tokens=False)
        span = np.append(np.full(n_special, -1), _spans_of(encoding, spans))
        ids = np.array([*whole.ids[:n_special], *encoding.ids], int)
        return ids, self._chosen(span, spans)

    def _encode_open(self, text: str) -> tuple[Filled, Encoding]:
        filled, encoding = self._encode_one(text)
        if self.recipe.conversations and filled.spans == [Span(0, len(filled.string))]:
            raise ValueError(
                "The tokenizer's chat template changes the messages of a conversation, so it can't "
                "be told where one that grows ends. Push texts instead."
            )
        return filled, encoding

    def _encode_one(self, text: str) -> tuple[Filled, Encoding]:
        filled = _fill_in(replace_surrogates([text])[0], self.recipe, self.tokenizer)
        return filled, self._fast.encode(filled.string, **self._options)

    # Tokens to windows

    def _split(self, encoding: Encoding, filled: Filled) -> tuple[Encoded, np.ndarray]:
        """Cut a text's tokens into windows; also return the positions of the pooled tokens."""
        ids, types = np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids)
        if not len(ids):
            return Encoded([self._window(ids, types)], False), ids
        span = _spans_of(encoding, filled.spans)  # (n_tokens,)
        wanted = self._wanted(span, filled)  # (n_tokens,)
        windows, places = [], []
        for chosen, counted in self._stretches(span >= 0):
            pooled = wanted[chosen] & counted
            if pooled.any():
                window = self._window(ids[chosen], types[chosen], pooled)
                windows.append(window)
                places.append(chosen[pooled])
        if not windows:
            remedies = [*self._larger, "long_texts='windows'"]
            raise ValueError(
                f"{self._limit} cuts off all tokens that pool_over={self.recipe.pool_over!r} asks "
                f"for in {filled.string[:60]!r}. Use {' or '.join(remedies)}."
            )
        is_truncated = self.recipe.long_texts == "truncate" and len(ids) > self.max_length
        return Encoded(windows, is_truncated), np.concatenate(places)

    def _wanted(self, span: np.ndarray, filled: Filled) -> np.ndarray:
        """Say which tokens are pooled, (n_tokens,) bool."""
        wanted = self._chosen(span, filled.spans)
        if wanted.any():
            return wanted
        if self.recipe.pool_over == "text":
            # A text without tokens of its own gets those around it.
            return np.ones(len(span), dtype=bool)
        raise ValueError(
            f"A conversation has no token of pool_over={self.recipe.pool_over!r}; its roles are "
            f"{[said.role for said in filled.spans]}, and it begins {filled.string[:60]!r}. Leave "
            "it out, or pool over other roles."
        )

    def _chosen(self, span: np.ndarray, spans: list[Span]) -> np.ndarray:
        over = self.recipe.pool_over
        if over == "all":
            return np.ones(len(span), dtype=bool)
        if over == "text":
            return span >= 0
        roles = (over,) if isinstance(over, str) else over
        return np.isin(span, [i for i, said in enumerate(spans) if said.role in roles])

    def _stretches(self, of_text: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the positions of each window's tokens, and which of them count there."""
        places = np.arange(len(of_text))
        if len(places) <= self.max_length:
            yield places, np.ones(len(places), dtype=bool)
            return
        own, around = places[of_text], places[~of_text]
        room = self.max_length - len(around)  # for the text's own tokens
        truncates = self.recipe.long_texts == "truncate"
        overlap = 0 if truncates else self.recipe.overlap
        if room <= overlap:
            # The template of many short turns is cut with them.
            at_end = truncates and self.tokenizer.truncation_side == "left"
            kept = of_text[-self.max_length :] if at_end else of_text[: self.max_length]
            if not self.recipe.conversations or not kept.any():
                raise self.no_room(len(around))
            own, around, room = places, places[:0], self.max_length
        starts: Sequence[int] = range(0, len(own) - overlap, room - overlap)
        if truncates:
            starts = [len(own) - room if self.tokenizer.truncation_side == "left" else 0]
        # A token that two windows share counts where it has the longer context; a causal model's
        # context is what comes before.
        earlier = overlap if self.is_causal else (overlap + 1) // 2  # count in the earlier window
        for start in starts:
            stretch = own[start : start + room]
            n_before = earlier if start else 0
            n_after = overlap - earlier if start + room < len(own) else 0
            elsewhere = np.append(stretch[:n_before], stretch[len(stretch) - n_after :])
            chosen = np.union1d(around, stretch)
            yield chosen, ~np.isin(chosen, elsewhere)

    def _window(self, ids: ArrayLike, types: ArrayLike, pooled: np.ndarray | None = None) -> Window:
        """Put the model's inputs for some tokens into arrays."""
        inputs = {"input_ids": np.asarray(ids, dtype=np.int32)}
        if not len(inputs["input_ids"]):
            inputs = {"input_ids": np.array([self._stand_in()], dtype=np.int32)}
            types, pooled = [0], None
        if self.has_types:
            inputs["token_type_ids"] = np.asarray(types, dtype=np.int32)
        return Window(inputs, None if pooled is None or pooled.all() else pooled)

    def _stand_in(self) -> int:
        for name in _STANDS_FOR_NOTHING:
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return token
        raise ValueError(
            "A text has no tokens, and the tokenizer has no BOS, CLS, EOS or padding token to "
            "stand in. Give it one, e.g. tokenizer.eos_token = '</s>', or drop empty texts."
        )

    # Tokenizers written in Python, which do not tell where tokens are

    def _encode_slow(self, filled: Filled) -> Encoded:
        found, is_cut = [self._tokenize(filled.string)], False
        if len(found[0]["input_ids"]) > self.max_length:
            is_cut = self.recipe.long_texts == "truncate"
            if is_cut and self.recipe.prompt is None and not self.recipe.conversations:
                found = [self._tokenize(filled.string, truncation=True, max_length=self.max_length)]
            else:
                pieces = islice(self._pieces(filled), 1 if is_cut else None)
                found = [self._tokenize(piece) for piece in pieces]
        windows = [self._window(one["input_ids"], one.get("token_type_ids")) for one in found]
        return Encoded(windows, is_cut)

    def _pieces(self, filled: Filled) -> Iterator[str]:
        """Cut a text into the longest stretches that fit, each with the prompt around it."""
        if self.recipe.overlap:
            self.need_offsets(f"overlap={self.recipe.overlap}")
        if len(filled.spans) != 1:
            self.need_offsets("A prompt with several texts, or a conversation, that is too long")
        start, end, _ = filled.spans[0]
        head, text, tail = filled.string[:start], filled.string[start:end], filled.string[end:]

        def n_tokens(n_characters: int) -> int:
            return len(self._tokenize(head + text[:n_characters] + tail)["input_ids"])

        while True:
            # Only by trying is it known how many characters fit.
            lengths = range(min(len(text), 64 * self.max_length) + 1)
            n_characters = bisect_right(lengths, self.max_length, key=n_tokens) - 1
            if n_characters < 1:
                raise self.no_room(n_tokens(0))
            yield head + text[:n_characters] + tail
            text = text[n_characters:]
            if not text:
                return

    def _tokenize(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, verbose=False, **self._options, **options)


def _spans_of(encoding: Encoding, spans: list[Span]) -> np.ndarray:
    """Give the number of the span that each token has a character of, (n_tokens,) int; else -1."""
    if not encoding.ids:
        return np.empty(0, dtype=int)
    starts, ends = np.array(encoding.offsets).T  # (n_tokens,)
    starts = starts - (starts == ends)  # some tokenizers give a token of blanks only its end
    found = np.full(len(starts), -1)
    for number, span in enumerate(spans):
        # An empty text may lie within a token, e.g. within "", which is not the text's then.
        found[np.maximum(starts, span.start) < np.minimum(ends, span.end)] = number
    special = np.array(encoding.special_tokens_mask, dtype=bool)
    return np.where(special, -1, found)


# What is tokenized: a text in its prompt, or a conversation in its chat template


class Span(NamedTuple):
    """The user's characters in the string that is tokenized."""

    start: int
    end: int
    role: str | None = None


class Filled(NamedTuple):
    """The string that is tokenized, and where in it the user's texts or messages are."""

    string: str
    spans: list[Span]


def _fill_in(text: str, recipe: Recipe, tokenizer: Any) -> Filled:
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
