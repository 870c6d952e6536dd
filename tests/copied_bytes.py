"""Counts the bytes that operations of torch copy from one device to another."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class CopiedBytes(TorchDispatchMode):
    """Counts, while a ``with`` block of its thread lasts, what is copied to and from a host.

    ``pageable`` are the bytes that went to the host and made the calling thread wait.
    """

    def __init__(self):
        super().__init__()
        self.to_host = self.from_host = self.pageable = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is aten._to_copy.default:
            self._count(args[0], result, bool((kwargs or {}).get("non_blocking")))
        elif function is aten.copy_.default:
            waits = not (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking"))
            self._count(args[1], args[0], not waits)
        elif function is aten._local_scalar_dense.default:
            self._count_to_host(args[0], False)
        return result

    def _count(self, source, target, runs_beside):
        if source.device.type == target.device.type:
            return
        if target.device.type == "cpu":
            self._count_to_host(source, runs_beside and target.is_pinned())
        elif source.device.type == "cpu":
            self.from_host += source.nbytes

    def _count_to_host(self, source, runs_beside):
        if source.device.type != "cpu":
            self.to_host += source.nbytes
            self.pageable += 0 if runs_beside else source.nbytes
