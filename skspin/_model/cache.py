"""A key-value cache with room ahead, so that one more token is written and nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST = 256  # tokens


class _RoomyLayer(DynamicLayer):
    """Keys and values of one block, in tensors that double when they are full."""

    def __init__(self) -> None:
        super().__init__()
        self._all_keys = self._all_values = torch.empty(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values (1, n_heads, n_tokens, n_neurons); give all of them."""
        start = self.get_seq_length()
        self.device, self.dtype, self.is_initialized = key_states.device, key_states.dtype, True
        self._all_keys = _write(self._all_keys, key_states, start)
        self._all_values = _write(self._all_values, value_states, start)
        end = start + key_states.shape[-2]
        self.keys, self.values = self._all_keys[..., :end, :], self._all_values[..., :end, :]
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
    """Make an empty cache as transformers does, but for room in layers that keep all tokens."""
    cache = DynamicCache(config=config)
    # By exact type: others, such as those of sliding windows, keep few tokens.
    cache.layers = [
        _RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
