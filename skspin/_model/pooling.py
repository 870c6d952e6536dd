"""Many tokens to one row: masked mean, max, first and last.

Every pooling takes activations ``hidden`` of shape (n_texts, n_tokens, n_neurons), of any
floating-point type, and a ``mask`` of shape (n_texts, n_tokens) that is True for real tokens, of
which each text has at least one; None if all are real. It gives a float32 row of all neurons per
text. Padding never counts, whatever stands there and on whichever side it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from skspin._layout import POOLINGS


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
    if mask is None:
        return hidden[:, 0].float()
    return _at(hidden, mask.int().argmax(1))


def last_token(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Take the last real token of each text."""
    if mask is None:
        return hidden[:, -1].float()
    # Left padding moves the end, so it is looked for in the mask, not counted from the start.
    return _at(hidden, mask.shape[1] - 1 - mask.flip(1).int().argmax(1))


def _at(hidden: Tensor, positions: Tensor) -> Tensor:
    texts = torch.arange(len(hidden), device=hidden.device)
    return hidden[texts, positions].float()  # (n_texts, n_neurons)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = dict(
    zip(POOLINGS, (masked_mean, masked_max, first_token, last_token), strict=True)
)


@dataclass(frozen=True)
class TextGroup:
    """Neighbouring texts that are pooled in one go."""

    rows: slice  # which texts of the batch
    n_tokens: int  # how many tokens to look at
    mask: Tensor | None  # (n_texts of the group, n_tokens), bool; None if all tokens are real


def group_texts(mask: Tensor) -> list[TextGroup]:
    """Split a batch, padded on the right, into groups that are fast to pool.

    On a CPU, pooling is bound by memory, and overwriting the padding means to read and write all
    activations once more: so texts of one length go together, and their padding is not looked at.
    They are neighbours in a batch that is sorted by length. On other devices it takes longer to
    start several kernels than to pass over the padding.
    """
    if mask.device.type != "cpu":
        return [TextGroup(slice(None), mask.shape[1], mask)]
    groups = []
    start = 0
    for length, run in groupby(mask.sum(1).tolist()):
        stop = start + len(list(run))
        groups.append(TextGroup(slice(start, stop), length, None))
        start = stop
    return groups


def pool(hidden: Tensor, groups: list[TextGroup], pooling: str) -> Tensor:
    """Pool a batch, group by group; gives a float32 Tensor of shape (n_texts, n_neurons)."""
    rows = [FUNCTIONS[pooling](hidden[g.rows, : g.n_tokens], g.mask) for g in groups]
    return torch.cat(rows)
