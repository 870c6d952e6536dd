"""Many tokens to one row: masked mean, max, first and last.

Every pooling takes the activations of one layer and the mask of real tokens, and gives one float32
row per text. Padding never counts, whatever numbers stand there, and on whichever side it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average over a text's real tokens, summed in float32.

    Parameters
    ----------
    hidden : Tensor of shape (n_texts, n_tokens, n_neurons)
        Activations, of any floating-point type.
    mask : Tensor of shape (n_texts, n_tokens), bool
        True for real tokens; each text has at least one.

    Returns
    -------
    Tensor of shape (n_texts, n_neurons), float32
    """
    # Filled, not weighted by zero: zero times a padding token's NaN would be NaN.
    total = _fill_padding(hidden, mask, 0.0).sum(1, dtype=torch.float32)  # (n_texts, n_neurons)
    return total / mask.sum(1, keepdim=True)


def masked_max(hidden: Tensor, mask: Tensor) -> Tensor:
    """Largest value of each neuron over a text's real tokens; see `masked_mean`."""
    return _fill_padding(hidden, mask, -torch.inf).amax(1).float()


def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """Activations of a text's first real token; see `masked_mean`."""
    return _token(hidden, mask.int().argmax(1))


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """Activations of a text's last real token; see `masked_mean`."""
    # Left padding moves the end, so "last" reads the mask, not a count of tokens.
    return _token(hidden, mask.shape[1] - 1 - mask.flip(1).int().argmax(1))


def _fill_padding(hidden: Tensor, mask: Tensor, value: float) -> Tensor:
    return hidden.masked_fill(~mask.unsqueeze(-1), value)


def _token(hidden: Tensor, position: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), position].float()


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": masked_mean,
    "max": masked_max,
    "first": first_token,
    "last": last_token,
}
