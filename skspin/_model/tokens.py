"""Texts to token ids: prompt or chat template, windows of a long text, which tokens are pooled.

Offsets tell the tokens of a user's text from those of the prompt or the template, so it is decided
token by token what is cut, what is read in windows and what is pooled.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Encoding, Tokenizer

from skspin._model.recipe import Recipe
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


class _Span(NamedTuple):
    """The user's characters in the string that is tokenized."""

    start: int
    end: int
    role: str | None = None


class _Filled(NamedTuple):
    """What is tokenized: a text in its prompt, or a conversation in its template."""

    string: str
    spans: list[_Span]


class TextEncoder:
    """Turns texts into windows, by a tokenizer (or its `bare_copy`, if it has one) and a recipe.

    ``max_length`` is the recipe's, or less if the model has fewer positions. A text that has more
    tokens loses its last ones (its first, if the tokenizer's ``truncation_side`` is "left"), or is
    read in windows; special tokens and the prompt stay whole. ``is_causal`` says that a token's
    context is what comes before it. The tokenizer is left as it is.
    """

    def __init__(
        self,
        tokenizer: Any,
        bare: Tokenizer | None,
        recipe: Recipe,
        max_length: int,
        is_causal: bool,
    ):
        self.tokenizer, self.recipe, self.max_length = tokenizer, recipe, max_length
        self.is_causal, self._fast = is_causal, bare
        self.has_types = "token_type_ids" in getattr(tokenizer, "model_input_names", ())
        # A template writes special tokens itself.
        self._options = {"add_special_tokens": not recipe.conversations}
        if recipe.pool_over != "all":
            self.need_offsets(f"pool_over={recipe.pool_over!r}")

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize texts. Lone surrogates, which no tokenizer reads, count as U+FFFD."""
        filled = [self._fill(text) for text in replace_surrogates(texts)]
        if self._fast is None:
            return [self._encode_slow(item) for item in filled]
        n_characters = _SURELY_LONG * self.max_length
        over_all = self.recipe.pool_over == "all"
        rows: dict[int, Encoded] = {}
        for i, found in self._encode_batch(
            {i: f for i, f in enumerate(filled) if over_all and len(f.string) <= n_characters},
            with_offsets=False,
        ):
            if len(found.ids) <= self.max_length:
                types = found.type_ids if self.has_types else ()
                rows[i] = Encoded([self._window(found.ids, types)], False)
        located = {i: f for i, f in enumerate(filled) if i not in rows}
        for i, found in self._encode_batch(located, with_offsets=True):
            rows[i] = self._split(found, filled[i])[0]
        return [rows[i] for i in range(len(filled))]

    def _encode_batch(
        self, filled: dict[int, _Filled], with_offsets: bool
    ) -> Iterator[tuple[int, Encoding]]:
        """Tokenize strings, if there are any; with offsets it takes longer."""
        if not filled:
            return iter(())
        encode = self._fast.encode_batch if with_offsets else self._fast.encode_batch_fast  # type: ignore[union-attr]
        return zip(
            filled, encode([f.string for f in filled.values()], **self._options), strict=True
        )

    def locate(self, text: str) -> tuple[list[Window], TextTokens]:
        """Tokenize one text as `encode` does, and say where in it the pooled tokens are."""
        self.need_offsets("Reading token by token")
        filled = self._fill(*replace_surrogates([text]))
        encoding = self._fast.encode(filled.string, **self._options)  # type: ignore[union-attr]
        encoded, places = self._split(encoding, filled)
        # If the prompt repeats the text, the first occurrence counts as the text.
        is_text = not self.recipe.conversations
        spans = filled.spans[:1] if is_text else filled.spans
        begin, end = spans[0][:2] if is_text else (0, len(filled.string))
        string = filled.string[begin:end]
        if not len(places):
            token = int(encoded.windows[0].inputs["input_ids"][0])
            names, nowhere = [str(self.tokenizer.convert_ids_to_tokens(token))], np.zeros(1, int)
            return encoded.windows, TextTokens(string, names, nowhere, nowhere, nowhere - 1)
        messages = _spans_of(encoding, spans)[places]  # (n_tokens,)
        starts, ends = (np.array(encoding.offsets)[places] - begin).clip(0, len(string)).T
        outside = (messages < 0) | (starts == ends)
        starts, ends = np.where(outside, 0, starts), np.where(outside, 0, ends)
        names = np.array(encoding.tokens, object)[places].tolist()
        located = TextTokens(string, names, starts, ends, messages, encoded.is_truncated)
        return encoded.windows, located

    def tokenize_open(self, text: str) -> OpenTokens:
        """Tokenize a text, or a conversation's last message, that may go on where it ends."""
        filled = self._fill(*replace_surrogates([text]))
        encoding = self._encode_open(filled)
        span = _spans_of(encoding, filled.spans)  # (n_tokens,)
        own = span == len(filled.spans) - 1
        wanted = self._chosen(span, filled.spans)
        end = len(own) - int(np.argmax(own[::-1])) if own.any() else 0
        places = np.array(encoding.offsets, int).reshape(-1, 2)[:end] - filled.spans[-1].start
        starts, ends = places.clip(0).T
        return OpenTokens(
            np.array(encoding.ids, int)[:end],
            wanted[:end],
            own[:end],
            starts,
            ends,
            len(own) - end,
            bool(wanted[end:].any()),
        )

    def tokenize_head(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize what comes before a text, or a conversation's last message, by itself.

        Gives ids (n_tokens,), and which of them are pooled.
        """
        filled = self._fill(*replace_surrogates([text]))
        whole = self._encode_open(filled)
        n_special = whole.special_tokens_mask.index(0)  # before all others
        head = _Filled(filled.string[: filled.spans[-1].start], filled.spans[:-1])
        encoding = self._fast.encode(head.string, add_special_tokens=False)  # type: ignore[union-attr]
        span = np.append(np.full(n_special, -1), _spans_of(encoding, head.spans))
        ids = np.array([*whole.ids[:n_special], *encoding.ids], int)
        return ids, self._chosen(span, head.spans)

    def _encode_open(self, filled: _Filled) -> Encoding:
        if self.recipe.conversations and filled.spans == [_Span(0, len(filled.string))]:
            raise ValueError(
                "The tokenizer's chat template changes the messages of a conversation, so it can't "
                "be told where one that grows ends. Push texts instead."
            )
        return self._fast.encode(filled.string, **self._options)  # type: ignore[union-attr]

    def to_json(self) -> str:
        """Write the tokenizer as a tokenizer.json, without truncation and padding."""
        if self._fast is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} can't be written as tokenizer.json, because it "
                "is written in Python. Use the model's fast tokenizer."
            )
        return self._fast.to_str(pretty=True)

    # What is tokenized

    def _fill(self, text: str) -> _Filled:
        if self.recipe.conversations:
            return self._render(json.loads(text))
        if self.recipe.prompt is None:
            return _Filled(text, [_Span(0, len(text))])
        head, *parts = self.recipe.prompt.split("{text}")
        string, spans = head, []
        for part in parts:
            spans.append(_Span(len(string), len(string) + len(text)))
            string += text + part
        return _Filled(string, spans)

    def _render(self, conversation: list[dict[str, Any]]) -> _Filled:
        """Write a conversation with the chat template, and find its messages in it."""
        rendered = self._apply_template(conversation)
        # Rendered once more with marks for messages: what is not a mark is the template's.
        marks = [_MARK.format(number) for number in range(len(conversation))]
        marked = self._apply_template(
            [{**said, "content": mark} for said, mark in zip(conversation, marks, strict=True)]
        )
        spans, at = [], 0
        for said, mark in zip(conversation, marks, strict=True):
            before, found, marked = marked.partition(mark)
            start = at + len(before)
            shapes = (strip(said["content"]) for strip in _STRIPS)
            content = next((shape for shape in shapes if rendered.startswith(shape, start)), None)
            if content is None or not (found and rendered.startswith(before, at)):
                return self._unmarked(rendered)
            at = start + len(content)
            spans.append(_Span(start, at, said["role"]))
        return _Filled(rendered, spans) if rendered[at:] == marked else self._unmarked(rendered)

    def _unmarked(self, rendered: str) -> _Filled:
        """Count a whole conversation as the user's, because its template changes the messages."""
        if self.recipe.pool_over != "all":
            raise ValueError(
                f"pool_over={self.recipe.pool_over!r} needs to know which characters are whose, "
                "but the tokenizer's chat template changes the messages of a conversation (such as "
                f"{rendered[:80]!r}). Use pool_over='all'."
            )
        return _Filled(rendered, [_Span(0, len(rendered))])

    def _apply_template(self, conversation: list[dict[str, Any]]) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"X holds conversations, but {type(self.tokenizer).__name__} of this model has no "
                "chat template. Use an instruct model, set tokenizer.chat_template, or pass texts."
            )
        try:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False)
        except Exception as error:  # A template is a program, and may raise whatever it likes.
            roles = [message["role"] for message in conversation]
            raise ValueError(
                f"The model's chat template refuses a conversation with the roles {roles}: {error}"
            ) from error

    # Tokens to windows

    def _split(self, encoding: Encoding, filled: _Filled) -> tuple[Encoded, np.ndarray]:
        """Cut a text's tokens into windows; also return the positions of the pooled tokens."""
        ids, types = np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids)
        if not len(ids):
            return Encoded([self._window(ids, types)], False), ids
        span = _spans_of(encoding, filled.spans)  # (n_tokens,)
        wanted = self._wanted(span, filled.spans)  # (n_tokens,)
        windows, places = [], []
        for chosen, counted in self._stretches(span >= 0):
            pooled = wanted[chosen] & counted
            if pooled.any():
                window = self._window(ids[chosen], types[chosen], pooled)
                windows.append(window)
                places.append(chosen[pooled])
        if not windows:
            raise ValueError(
                f"max_length={self.max_length} cuts off all tokens that pool_over="
                f"{self.recipe.pool_over!r} asks for. Use a larger max_length, or "
                "long_texts='windows'."
            )
        is_truncated = self.recipe.long_texts == "truncate" and len(ids) > self.max_length
        return Encoded(windows, is_truncated), np.concatenate(places)

    def _wanted(self, span: np.ndarray, spans: list[_Span]) -> np.ndarray:
        """Say which tokens are pooled, (n_tokens,) bool."""
        wanted = self._chosen(span, spans)
        if wanted.any():
            return wanted
        if self.recipe.pool_over == "text":
            # A text without tokens of its own gets those around it.
            return np.ones(len(span), dtype=bool)
        raise ValueError(
            f"A conversation has no token of pool_over={self.recipe.pool_over!r}; its roles are "
            f"{[said.role for said in spans]}. Leave it out, or pool over other roles."
        )

    def _chosen(self, span: np.ndarray, spans: list[_Span]) -> np.ndarray:
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
        excess = len(places) - self.max_length
        if excess <= 0:
            yield places, np.ones(len(places), dtype=bool)
            return
        own, around = places[of_text], places[~of_text]
        room = self.max_length - len(around)  # for the text's own tokens
        overlap = self.recipe.overlap if self.recipe.long_texts == "windows" else 0
        if room <= overlap:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for text: prompt and special tokens "
                f"take {len(around)}{f', and overlap={overlap}' * bool(overlap)}. Use a larger "
                "max_length or a shorter prompt."
            )
        if self.recipe.long_texts == "truncate":
            left = self.tokenizer.truncation_side == "left"
            kept = np.delete(places, own[:excess] if left else own[-excess:])
            yield kept, np.ones(len(kept), dtype=bool)
            return
        # A token that two windows share counts where it has the longer context; a causal model's
        # context is what comes before.
        earlier = overlap if self.is_causal else (overlap + 1) // 2  # count in the earlier window
        for start in range(0, len(own) - overlap, room - overlap):
            stretch = own[start : start + room]
            counts = np.ones(len(stretch), dtype=bool)
            if start:
                counts[:earlier] = False
            if start + room < len(own):
                counts[len(counts) - (overlap - earlier) :] = False
            chosen = np.union1d(around, stretch)
            yield chosen, ~np.isin(chosen, stretch[~counts])

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

    def need_offsets(self, what: str) -> None:
        """Refuse a tokenizer that does not tell where tokens are, because ``what`` needs that."""
        if self._fast is None:
            raise ValueError(
                f"{what} needs a fast tokenizer, one with a tokenizer.json: "
                f"{type(self.tokenizer).__name__} does not tell where in the text its tokens are."
            )

    def _encode_slow(self, filled: _Filled) -> Encoded:
        found = self._tokenize(filled.string)
        if len(found["input_ids"]) <= self.max_length:
            return Encoded([self._slow_window(found)], False)
        if self.recipe.long_texts == "windows":
            if self.recipe.overlap:
                self.need_offsets(f"overlap={self.recipe.overlap}")
            pieces = self._pieces(filled)
            return Encoded([self._slow_window(self._tokenize(piece)) for piece in pieces], False)
        if self.recipe.prompt is None and not self.recipe.conversations:
            found = self.tokenizer(filled.string, truncation=True, max_length=self.max_length)
        else:
            found = self._tokenize(next(self._pieces(filled)))
        return Encoded([self._slow_window(found)], True)

    def _pieces(self, filled: _Filled) -> Iterator[str]:
        """Cut a text into the longest stretches that fit, each with the prompt around it."""
        if len(filled.spans) != 1:
            self.need_offsets("A prompt with several texts, or a conversation, that is too long")
        start, end, _ = filled.spans[0]
        head, text, tail = filled.string[:start], filled.string[start:end], filled.string[end:]
        while text:
            # Only by trying is it known how many characters fit.
            lengths = range(min(len(text), 64 * self.max_length) + 1)
            n_tokens = partial(self._count, head, text, tail)
            n_characters = bisect_right(lengths, self.max_length, key=n_tokens) - 1
            if n_characters < 1:
                raise ValueError(
                    f"max_length={self.max_length} leaves no room for text beside the prompt. Use "
                    "a larger max_length or a shorter prompt."
                )
            yield head + text[:n_characters] + tail
            text = text[n_characters:]

    def _count(self, head: str, text: str, tail: str, n_characters: int) -> int:
        return len(self._tokenize(head + text[:n_characters] + tail)["input_ids"])

    def _slow_window(self, found: Any) -> Window:
        ids = found["input_ids"]
        return self._window(ids, found.get("token_type_ids") or [0] * len(ids))

    def _tokenize(self, text: str) -> Any:
        return self.tokenizer(text, verbose=False, **self._options)


def _spans_of(encoding: Encoding, spans: list[_Span]) -> np.ndarray:
    """Give the number of the span that each token has a character of, (n_tokens,) int; else -1."""
    if not encoding.ids:
        return np.empty(0, dtype=int)
    starts, ends = np.array(encoding.offsets).T  # (n_tokens,)
    found = np.full(len(starts), -1)
    for number, span in enumerate(spans):
        found[(ends > span.start) & (starts < span.end)] = number
    special = np.array(encoding.special_tokens_mask, dtype=bool)
    return np.where(special, -1, found)


def bare_copy(tokenizer: Any) -> Tokenizer | None:
    """Copy the Rust part of a tokenizer, without truncation and padding; None if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else _parse(backend.to_str())


@lru_cache(maxsize=4)  # a tokenizer in memory is copied in every call, and may have changed
def _parse(definition: str) -> Tokenizer:
    copy = Tokenizer.from_str(definition)
    # Both are settings of the original object, left by its last call, and another thread may change
    # them there at any time.
    copy.no_truncation()
    copy.no_padding()
    return copy


def replace_surrogates(texts: Sequence[str]) -> list[str]:
    """Replace lone surrogates by U+FFFD, and two that make a pair by their character."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
    return list(texts)
