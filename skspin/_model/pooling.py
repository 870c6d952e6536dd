"""Many tokens to one row: masked mean, max, first and last.

Every pooling takes activations ``hidden`` of shape (n_texts, n_tokens, n_neurons), of any
floating-point type, and a ``mask`` of shape (n_texts, n_tokens) that is True for real tokens (at
least one per text), or None if all are real. It returns one float32 row of all neurons per text.
Padding never counts, whatever it holds and on whichever side it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skspin._layout import POOLINGS, Layout


def masked_mean(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average over the real tokens of each text; the sum is taken in float32."""
    if mask is None:
        return hidden.float().mean(1)
    # Padding is overwritten, not weighted by zero: zero times NaN would be NaN.
    total = hidden.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1, dtype=torch.float32)
    return total / mask.sum(1, keepdim=True)


def masked_max(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Take each neuron's largest value over the real tokens of each text."""
    if mask is not None:
        hidden = hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    return hidden.amax(1).float()


def first_token(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Take the first real token of each text."""
    return hidden[:, 0].float() if mask is None else _at(hidden, _first(mask))


def last_token(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Take the last real token of each text."""
    return hidden[:, -1].float() if mask is None else _at(hidden, _last(mask))


def _first(mask: Tensor) -> Tensor:
    return mask.int().argmax(1)  # (n_texts,)


def _last(mask: Tensor) -> Tensor:
    # Left padding moves the end, so it is looked for in the mask, not counted from the start.
    return mask.shape[1] - 1 - _first(mask.flip(1))  # (n_texts,)


def _at(hidden: Tensor, positions: Tensor) -> Tensor:
    # Not len(hidden), which a tracer would take for a constant.
    texts = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[texts, positions].float()  # (n_texts, n_neurons)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = dict(
    zip(POOLINGS, (masked_mean, masked_max, first_token, last_token), strict=True)
)


class TextGroup(NamedTuple):
    """Neighbouring texts that are pooled in one go."""

    rows: slice  # which texts of the batch
    tokens: slice  # which tokens to look at
    mask: Tensor | None  # (n_texts of the group, n_tokens), bool; None if all of these count


def group_texts(mask: Tensor) -> list[TextGroup]:
    """Split a batch into groups that are fast to pool; ``mask`` (n_texts, n_tokens) is as above."""
    # On a CPU, pooling is bound by memory, and overwriting the padding would read and write all
    # activations once more. So texts that are pooled over the same stretch of tokens form a group;
    # they are neighbours in a batch that is sorted by length. On other devices, starting several
    # kernels takes longer than reading the padding.
    if mask.device.type == "cpu":
        first, last = _first(mask), _last(mask)
        if ((last - first + 1) == mask.sum(1)).all():  # stretches, without gaps
            groups, start = [], 0
            for (begin, end), run in groupby(zip(first.tolist(), last.tolist(), strict=True)):
                stop = start + len(list(run))
                groups.append(TextGroup(slice(start, stop), slice(begin, end + 1), None))
                start = stop
            return groups
    return [TextGroup(slice(None), slice(None), mask)]


def pool(hidden: Tensor, groups: list[TextGroup], pooling: str) -> Tensor:
    """Pool a batch, group by group; gives a float32 Tensor of shape (n_texts, n_neurons)."""
    rows = [FUNCTIONS[pooling](hidden[g.rows, g.tokens], g.mask) for g in groups]
    return torch.cat(rows)


class WindowMerge:
    """The row of a long text, made of the rows of its windows, which come in any order.

    A mean is weighted by tokens, a maximum is that of the maxima, and the first and the last token
    are those of the first and the last window.
    """

    def __init__(self, windows_tokens: Sequence[int], layout: Layout):
        self._shares = np.array(windows_tokens) / np.sum(windows_tokens)  # (n_windows,)
        self._layout = layout
        self._row = np.zeros(layout.n_columns)
        self._n_left = len(self._shares)

    def add(self, number: int, values: np.ndarray) -> np.ndarray | None:
        """Take the row (n_columns,) of one window; give the text's own with the last of them."""
        is_new = self._n_left == len(self._shares)
        for segment, columns in zip(self._layout.segments, self._layout.slices, strict=True):
            part, window = self._row[columns], values[columns]
            if segment.pooling == "mean":
                part += self._shares[number] * window
            elif segment.pooling == "max":
                np.maximum(-np.inf if is_new else part, window, out=part)
            elif number == {"first": 0, "last": len(self._shares) - 1}[segment.pooling]:
                part[:] = window
        self._n_left -= 1
        return None if self._n_left else self._row.astype(np.float32)
