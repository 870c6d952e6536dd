"""Activations of chosen neurons at every token: of whole texts, and of one that grows.

A growing text is read with the model's key-value cache. The cache has room for more tokens, so
adding one does not copy the others.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from skspin._layout import Layout, Segment
from skspin._model.anatomy import most_tokens, n_token_ids
from skspin._model.batches import TokenBudget, check_finite, try_batch
from skspin._model.forward import read
from skspin._model.recipe import Recipe
from skspin._model.registry import Backbone
from skspin._model.tokens import OpenTokens, TextEncoder, replace_surrogates
from skspin._texts import Speller, TextTokens

_MOST_VALUES = 2**24  # in a batch: 64 MiB of float32
_STRETCH = 512  # tokens in a pass
_TRIAL = 8  # tokens to try a cache with
_LEAST = 256  # tokens that a cache has room for
# Python takes these for blanks, but BERT's tokenizer deletes them, and the word goes on.
_NO_BLANKS = dict.fromkeys(map(ord, "\x0b\x0c\x1c\x1d\x1e\x1f\x85"), "x")


def token_activations(
    backbone: Backbone, recipe: Recipe, texts: Sequence[str], layout: Layout, of_prefixes: bool
) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
    """Read activations (n_tokens, n_columns) at the pooled tokens of each text, in any order.

    In the decoder of an encoder-decoder model, which gets the text shifted right, a token's
    activations are those at the position that predicts it. With ``of_prefixes``, an error is raised
    if they would depend on the tokens that follow.
    """
    if of_prefixes:
        _check_prefixes(backbone, recipe)
    encoder = TextEncoder(backbone, recipe)
    found = {text: encoder.locate(text) for text in texts}
    for _, tokens in found.values() if of_prefixes else ():
        has_text = (tokens.messages >= 0).any()
        _check_end(recipe, bool(has_text and tokens.messages[-1] < 0))
        _check_cut(tokens.is_truncated, backbone.tokenizer.truncation_side)
    # Windows of one length go together: there is no padding to take out again.
    by_length: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for text, (windows, _) in found.items():
        for number, window in enumerate(windows):
            by_length[len(window)].append((text, number))
    rows: dict[str, dict[int, np.ndarray]] = defaultdict(dict)  # of unfinished texts
    budget = TokenBudget(backbone, recipe.batch_tokens)
    for length, alike in by_length.items():
        while alike:
            n_tokens = min(budget.tokens, _MOST_VALUES // layout.n_columns)
            batch = alike[: max(1, n_tokens // length)]
            windows = [found[text][0][number] for text, number in batch]
            on_host = try_batch(backbone, windows, layout, len(batch) == 1, by_token=True)
            if on_host is None:
                budget.halve(len(batch) * length)
                continue
            alike = alike[len(batch) :]
            activations = on_host.to_numpy()  # (n_windows, n_tokens, n_columns)
            check_finite(activations.reshape(-1, layout.n_columns), layout, backbone.dtype)
            for (text, number), window, values in zip(batch, windows, activations, strict=True):
                rows[text][number] = values if window.pooled is None else values[window.pooled]
                if len(rows[text]) == len(found[text][0]):
                    parts = [part for _, part in sorted(rows.pop(text).items())]
                    yield text, found[text][1], np.concatenate(parts)


# Conditions under which one pass gives the activations of every prefix of a text


def _check_prefixes(backbone: Backbone, recipe: Recipe) -> None:
    """Refuse a model or a prompt with which one pass does not give those of every prefix."""
    if not backbone.anatomy.is_causal:
        raise ValueError(
            f"model={recipe.model_name!r} looks ahead: what it makes of a token changes with the "
            "text that follows, so one pass does not give the scores of prefixes. Use a causal "
            "decoder, such as SmolLM2, or apply the pipeline to each prefix."
        )
    if recipe.prompt is not None and recipe.prompt.count("{text}") > 1:
        raise ValueError(
            f"prompt={recipe.prompt!r} repeats the text, so a prefix's tokens are not the first "
            "ones of the whole text's. Write {text} once."
        )
    unscaled = backbone.anatomy.mixes_beyond  # 0 if only padding changes a text; here is none
    if 0 < unscaled < (max_length := min(backbone.n_positions, recipe.max_length)):
        raise ValueError(
            f"max_length={max_length}, but model={recipe.model_name!r} scales the positions of all "
            f"tokens of a text that has more than {unscaled}, so one pass does not give the scores "
            f"of its prefixes. Fit with max_length={unscaled} or less, and long_texts='windows' "
            "to read longer texts."
        )


def _check_end(recipe: Recipe, is_pooled: bool) -> None:
    """Refuse tokens that are pooled although they come after every prefix."""
    if is_pooled:
        raise ValueError(
            "The prompt, the chat template or the tokenizer adds tokens after the text, and "
            f"pool_over={recipe.pool_over!r} pools them. They would come after every prefix, each "
            "time with other activations, which one pass does not give. Fit with pool_over='text' "
            "(or the role of a conversation), or a prompt that ends with {text}."
        )


def _check_cut(is_cut: bool, truncation_side: str) -> None:
    """Refuse a text that loses its first tokens."""
    if is_cut and truncation_side == "left":
        raise ValueError(
            "A text has more than max_length tokens, and the tokenizer's truncation_side='left' "
            "drops the first ones, so a longer prefix begins elsewhere. Use a larger max_length, "
            "long_texts='windows', or truncation_side='right'."
        )


# One text that arrives in pieces


class Added(NamedTuple):
    """The new tokens of a growing text."""

    tokens: TextTokens  # the text's own, with their positions in the whole text
    activations: np.ndarray  # (n_pooled, n_columns): of these and of pooled tokens before the text
    is_own: np.ndarray  # (n_pooled,), bool: which of these are the text's own


class GrowingText:
    """Reads each token of a text once, with results that do not depend on how the text was cut.

    A text is tokenized as a whole, and its last word, which more letters may change, is held back.
    Token ids are read as they come.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe, layout: Layout):
        self._backbone, self._recipe, self._n_columns = backbone, recipe, layout.n_columns
        self._encoder = TextEncoder(backbone, recipe)
        self._encoder.need_offsets("A growing text")
        self.tokenizer, self.max_length = self._encoder.tokenizer, self._encoder.max_length
        self._segments = list(layout.segments)
        _check_prefixes(backbone, recipe)
        if all(segment.layer == 0 for segment in self._segments):
            # The cache counts tokens in the first block's attention, so the pass has to get there.
            name = self._segments[0].stack
            width = backbone.anatomy.stacks[name].tap(1, "hidden").width
            self._segments.append(Segment(name, 1, "hidden", "none", width, (0,)))
        self._check_cache()

    def begin(self, messages: Sequence[dict[str, str]], role: str) -> None:
        """Begin a text, or in a conversation the message of ``role`` after ``messages``."""
        self._messages, self._role = messages, role
        self.text = ""
        self._settled = 0  # characters that no more text can change
        self._ids: list[int] = []  # the text's own, so far
        self._speller: Speller | None = None  # of token ids
        self.is_cut = False  # whether tokens were dropped for want of room
        frame = self._tokenize("a")
        if not frame.pooled[frame.own].any():
            raise ValueError(
                f"pool_over={self._recipe.pool_over!r} does not pool what role={role!r} says, so "
                "no token of it would count."
            )
        # Where "a" is one token with what follows, most other texts are not.
        self._n_after = frame.n_after + int(frame.ends.max(initial=0) > len("a"))

    @property
    def clean_text(self) -> str:
        """The text so far as it is tokenized, with U+FFFD for lone surrogates."""
        return replace_surrogates([self.text])[0]

    def add_text(self, text: str, is_last: bool) -> Added:
        """Take more text, and read the new tokens that later text can't change."""
        # Halves of a surrogate pair may come in two pieces; they are joined, and lone ones kept.
        joined = (self.text + text).encode("utf-16", "surrogatepass")
        self.text = joined.decode("utf-16", "surrogatepass")
        whole = self.clean_text
        words = whole.translate(_NO_BLANKS).rsplit(None, 1)
        # The last word may take the space before it into its token.
        settled = len(whole) if is_last else len(words[0]) if len(words) == 2 else 0
        if settled == self._settled:
            return self._read(np.empty(0, int), np.empty((0, 2), int))
        self._settled = settled
        frame = self._tokenize(whole)
        own = np.flatnonzero(frame.own)  # (n_own,)
        ends = frame.ends.clip(max=len(whole))  # the last token may go on in the prompt
        ids = frame.ids[own][: np.searchsorted(ends[own], settled, side="right")]
        n_read = len(self._ids)
        if ids[:n_read].tolist() != self._ids:
            raise ValueError(
                f"The tokenizer changes tokens that were scored already as the text goes on, near "
                f"{whole[-40:]!r}. Push longer pieces, or token ids."
            )
        if not n_read and len(ids):
            self._open_window(frame.ids[: own[0]], frame.pooled[: own[0]])
        room = self.max_length - (len(frame.ids) - len(own)) - frame.n_after
        if is_last and (len(own) <= room or self._recipe.long_texts == "truncate"):
            self._room = room  # which depends on the text's end, if that goes on in the prompt
        places = np.stack([frame.starts, ends], axis=1)[own][n_read : len(ids)]
        return self._read(ids[n_read:], places)

    def add_ids(self, ids: np.ndarray, is_last: bool) -> Added:
        """Read token ids (n_tokens,) as they are."""
        n_known = n_token_ids(self._backbone.anatomy.model)
        if not ((ids >= 0) & (ids < n_known)).all():
            raise ValueError(f"piece={ids.tolist()} has token ids outside 0 to {n_known - 1}.")
        if self._speller is None:
            self._speller = Speller(self.tokenizer)
            self._open_window(*self._encoder.tokenize_head(self._framed("a")))
        ends = [len(self.text)]
        for token in ids.tolist():
            self.text += self._speller.add(token)
            ends.append(len(self.text))
        if is_last:
            self.text += self._speller.end()
            ends[-1] = len(self.text)
        return self._read(ids, np.stack([ends[:-1], ends[1:]], axis=1))

    def _framed(self, text: str) -> str:
        if not self._recipe.conversations:
            return text
        return json.dumps([*self._messages, {"role": self._role, "content": text}])

    def _tokenize(self, text: str) -> OpenTokens:
        frame = self._encoder.tokenize_open(self._framed(text))
        _check_end(self._recipe, frame.pools_after)
        return frame

    def _open_window(self, ids: np.ndarray, pooled: np.ndarray) -> None:
        """Begin a window with the tokens (n_before,) that come before the text."""
        self._room = self.max_length - len(ids) - self._n_after
        if self._room <= self._recipe.overlap:
            raise self._encoder.no_room(len(ids) + self._n_after)
        self._before = ids, pooled
        self._waiting = ids, pooled  # tokens to be read together with the next one
        self._n_in_window = 0
        self._cache = roomy_cache(self._backbone.model.config)

    def _read(self, ids: np.ndarray, places: np.ndarray) -> Added:
        """Read the text's next tokens (n_tokens,), until the room is full or window by window."""
        n_read = 0
        activations, is_own = [np.empty((0, self._n_columns), np.float32)], [np.empty(0, bool)]
        while n_read < len(ids):
            if self._n_in_window >= self._room and not self._open_next_window():
                self.is_cut = True
                break
            new = ids[n_read : n_read + self._room - self._n_in_window]
            before, is_pooled = self._waiting
            pooled = np.concatenate([is_pooled, np.ones(len(new), bool)])
            activations.append(self._run(np.concatenate([before, new]), self._cache)[pooled])
            is_own.append((np.arange(len(pooled)) >= len(before))[pooled])
            self._waiting = before[:0], is_pooled[:0]
            self._ids += new.tolist()
            self._n_in_window += len(new)
            n_read += len(new)
        names = self.tokenizer.convert_ids_to_tokens(ids[:n_read].tolist())
        text, (starts, ends) = self.clean_text, places[:n_read].T
        tokens = TextTokens(text, names, starts, ends, np.zeros(n_read, int), self.is_cut)
        return Added(tokens, np.concatenate(activations), np.concatenate(is_own))

    def _open_next_window(self) -> bool:
        """Open the next window, as `TextEncoder` cuts a long text; False if texts are truncated."""
        if self._recipe.long_texts == "truncate":
            _check_cut(True, self.tokenizer.truncation_side)
            return False
        if self._recipe.conversations:
            raise ValueError(
                f"A conversation has more than max_length={self.max_length} tokens, and "
                "can't go on in windows while it grows. Use score_prefixes, or a larger max_length."
            )
        overlap = self._recipe.overlap
        shared = np.array(self._ids[len(self._ids) - overlap :], int)
        self._open_window(*self._before)
        ids, pooled = self._before
        # Shared tokens count in the window before, where they have the longer context.
        self._waiting = np.concatenate([ids, shared]), np.append(pooled, np.zeros(overlap, bool))
        self._n_in_window = overlap
        return True

    def _run(self, ids: np.ndarray, cache: Any) -> np.ndarray:
        """Read activations (n_tokens, n_columns) at tokens that come after those in a cache."""
        backbone, parts = self._backbone, []
        for start in range(0, len(ids), _STRETCH):
            tensor = torch.as_tensor(ids[start : start + _STRETCH], device=backbone.device)
            tensor = tensor.long()[None]  # (1, n_tokens)
            inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
            if self._encoder.has_types:
                inputs["token_type_ids"] = torch.zeros_like(tensor)  # of one text all are 0
            values = read(backbone.anatomy, inputs, self._segments, by_token=True, cache=cache)
            parts.append(values[0, :, : self._n_columns].cpu().numpy())
        return np.concatenate(parts)

    def _check_cache(self) -> None:
        """Test that reading on from the cache gives the same as reading all tokens at once."""
        ids = np.arange(1, 1 + most_tokens(self._backbone.model, _TRIAL))
        cause = None
        try:
            cache = roomy_cache(self._backbone.model.config)
            in_two = np.concatenate([self._run(half, cache) for half in np.array_split(ids, 2)])
        except Exception as error:  # A model may raise anything at a cache that it can't use.
            cause, reason = error, repr(error)
        else:
            whole = self._run(ids, None)  # (n_tokens, n_columns)
            tolerance = 5e-2 if getattr(torch, self._backbone.dtype).itemsize < 4 else 5e-3
            distance = np.linalg.norm(whole - in_two, axis=1)
            if not (distance > tolerance * np.linalg.norm(whole, axis=1)).any():
                return
            reason = "its activations change with it"
        raise ValueError(
            f"model={self._recipe.model_name!r} can't read a text in pieces with a key-value cache "
            f"({reason}). Use score_prefixes on the text so far."
        ) from cause


class _RoomyLayer(DynamicLayer):
    """Keys and values of one block, in tensors that double when they are full."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms = [torch.empty(0), torch.empty(0)]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values (1, n_heads, n_tokens, n_neurons); give all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.device, self.dtype, self.is_initialized = key_states.device, key_states.dtype, True
        for i, new in enumerate((key_states, value_states)):
            self._rooms[i] = _write(self._rooms[i], new, start)
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values


def _write(states: Tensor, new: Tensor, start: int) -> Tensor:
    end = start + new.shape[-2]
    if not start or end > states.shape[-2]:
        larger = new.new_empty(*new.shape[:-2], max(_LEAST, 2 * end), new.shape[-1])
        if start:
            larger[..., :start, :] = states[..., :start, :]
        states = larger
    states[..., start:end, :] = new
    return states


def roomy_cache(config: Any) -> DynamicCache:
    """Make an empty cache of transformers, with spare room in layers that keep all tokens."""
    cache = DynamicCache(config=config)
    # By exact type: others, such as those of sliding windows, keep few tokens.
    cache.layers = [
        _RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
