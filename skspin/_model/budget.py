"""How many tokens go through a model together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from skspin._model.registry import Backbone
from skspin._system import return_free_memory

# Bytes of a batch's widest activation. On a CPU this keeps it in a shared cache, and below the size
# from which glibc asks the kernel for fresh pages at each allocation (32 MiB): speed is flat from
# an eighth of this on, and falls beyond it. A GPU only has to be kept busy.
_WIDEST_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
_OTHER_DEVICE_BYTES = 64 << 20
# Starting a batch costs about as much as this share of a full one.
_START_SHARE = 1 / 128
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class TokenBudget:
    """The tokens that a batch may have, padding included.

    Parameters
    ----------
    backbone : Backbone
        What runs the batches. It remembers, for later calls, which size was too large.
    batch_tokens : int or "auto", default="auto"
        "auto" follows the device and the model's width: as many tokens as keep the widest
        activation at 24 MiB on a CPU, 256 MiB on a CUDA device, 64 MiB elsewhere. That is 4,096
        tokens for a feed-forward width of 1,536 in float32 on a CPU.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int | str = "auto"):
        self._backbone = backbone
        auto = isinstance(batch_tokens, str)
        self._wanted = _good_size(backbone) if auto else int(batch_tokens)
        # Where padding leaks into real tokens, a pass takes texts of one length only.
        self._start_share = 0.0 if backbone.anatomy.mixes_padding else _START_SHARE

    @property
    def tokens(self) -> int:
        """Tokens in a batch at most, unless one text alone has more."""
        return min(self._wanted, self._backbone.token_limit or self._wanted)

    def n_texts(self, lengths: np.ndarray) -> int:
        """Say how many of the next texts make a batch.

        Parameters
        ----------
        lengths : ndarray of shape (n_texts,), int
            Tokens of each text, longest first.

        Returns
        -------
        int
            At least 1. The batch ends where its padding would cost more than starting another.
        """
        widest = int(lengths[0])
        fitting = lengths[: max(1, self.tokens // widest)]
        padding = np.cumsum(widest - fitting)
        return int(np.searchsorted(padding, self.tokens * self._start_share, side="right"))

    def halve(self, n_tokens: int) -> None:
        """Remember that a batch of ``n_tokens``, of several texts, was too large."""
        self._backbone.lower_token_limit(min(self.tokens, n_tokens // 2))


def _good_size(backbone: Backbone) -> int:
    taps = [tap for stack in backbone.anatomy.stacks.values() for tap in stack.taps.values()]
    n_bytes = max(tap.width for tap in taps) * getattr(torch, backbone.dtype).itemsize
    return _WIDEST_BYTES.get(backbone.device.type, _OTHER_DEVICE_BYTES) // n_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory was short, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU and on Apple's GPUs, torch has no class for it.
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _OUT_OF_MEMORY)


def release_memory(device: Any) -> None:
    """Give back what is free but in pieces that do not fit the next batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        return_free_memory()
