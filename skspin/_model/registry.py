"""A frozen model that is ready to run: loaded once per process and device, shared by all."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from skspin._model.anatomy import Anatomy, find_anatomy
from skspin._model.device import resolve_device, resolve_dtype, usable_device
from skspin._model.files import Source, load_model, load_skeleton, load_tokenizer
from skspin._model.fingerprint import fingerprint
from skspin._model.tokens import bare_copy
from skspin._model.trial import try_anatomy
from skspin._system import after_fork


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model that is ready to run, with what belongs to it."""

    model: Any  # loaded here: in eval mode, frozen; passed in: as it is
    tokenizer: Any
    bare_tokenizer: Any  # a copy of its Rust part, which reads texts; None if it has no such part
    anatomy: Anatomy
    device: torch.device  # where its inputs go
    dtype: str  # format of its activations, e.g. "float32"
    fingerprint: str

    @property
    def token_limit(self) -> int | None:
        """Half of the smallest batch that did not fit into memory; None while all did."""
        return _token_limits.get(self.model)

    def lower_token_limit(self, n_tokens: int) -> None:
        """Remember, for all that run the model, how large a batch may be."""
        _token_limits[self.model] = n_tokens


_lock = threading.RLock()
_loaded: dict[tuple[Source, str, str], Backbone] = {}
# Weak, so that it does not keep a model alive that was passed in memory.
_token_limits: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@after_fork
def _recover_from_fork() -> None:
    """Let a forked process, which has none of its parent's threads, run models."""
    # GNU's OpenMP would wait for those threads forever; with one thread, torch does without it, as
    # in the workers of its DataLoader. And no thread is left to release a lock that was held.
    global _lock
    _lock = threading.RLock()
    torch.set_num_threads(1)


def load_backbone(
    source: Source, device: Any = None, dtype: Any = "auto", name: str | None = None
) -> Backbone:
    """Load a model, or find the copy that this process has on that device already.

    ``name`` is the model's fingerprint, for callers who have just taken it.
    """
    device, dtype = resolve_placement(source, device, dtype)
    with _lock:
        name = name or fingerprint(source)
        if source.in_memory:
            return _assemble(source, source.model, dtype, name)
        key = (source, device, dtype)
        if key not in _loaded or _loaded[key].fingerprint != name:
            _loaded.pop(key, None)  # The folder's weights changed: free the old ones first.
            _loaded[key] = _assemble(source, load_model(source, device, dtype), dtype, name)
        return _loaded[key]


def forget_models() -> None:
    """Release the loaded models; one that is in use is freed after its use."""
    with _lock:
        _loaded.clear()


def read_anatomy(source: Source) -> Anatomy:
    """Find a model's blocks and widths from its configuration; the modules hold no weights."""
    with _lock:
        return find_anatomy(source.model if source.in_memory else load_skeleton(source))


def resolve_placement(source: Source, device: Any = None, dtype: Any = "auto") -> tuple[str, str]:
    """Name the device and format that a model runs in; one in memory stays as it is."""
    if not source.in_memory:
        device = usable_device(device)
        return device, resolve_dtype(dtype, device)
    own_device = str(_input_device(source.model))
    own_dtype = str(source.model.dtype).removeprefix("torch.")
    if device is not None and resolve_device(device) != own_device:
        raise ValueError(
            f"device={str(device)!r}, but the model passed in is on {own_device!r} and stays "
            "there. Leave device=None, or move the model yourself with model.to(...)."
        )
    if str(dtype) != "auto" and str(dtype).removeprefix("torch.") != own_dtype:
        raise ValueError(
            f"dtype={str(dtype)!r}, but the model passed in is {own_dtype!r} and stays so. Leave "
            "dtype='auto', or convert the model yourself with model.to(...)."
        )
    return own_device, own_dtype


def _assemble(source: Source, model: Any, dtype: str, name: str) -> Backbone:
    tokenizer = load_tokenizer(source)
    device = _input_device(model)
    bare, anatomy = bare_copy(tokenizer), try_anatomy(model, device, name)
    return Backbone(model, tokenizer, bare, anatomy, device, dtype, name)


def _input_device(model: Any) -> torch.device:
    # A model that is spread over devices, or partly offloaded, takes its inputs on the first.
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
