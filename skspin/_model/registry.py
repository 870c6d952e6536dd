"""A frozen model that is ready to run: found, loaded once, shared."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from skspin._model.anatomy import Anatomy, find_anatomy
from skspin._model.device import resolve_device, resolve_dtype, usable_device
from skspin._model.fingerprint import fingerprint
from skspin._model.loading import load_model, load_skeleton, load_tokenizer
from skspin._model.source import Source
from skspin._model.trial import try_anatomy


@dataclass
class Room:
    """How many tokens a model has room for at a time, as far as that is known.

    Parameters
    ----------
    tokens : int or None, default=None
        Half of the smallest batch that did not fit into memory; None while all did.
    """

    tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model that is ready to run, with what belongs to it.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded by us: in evaluation mode and frozen. Passed in: as it is.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    anatomy : Anatomy
        Where its activations are.
    device : device
        Where its inputs go.
    dtype : str
        Format of its activations, e.g. ``"float32"``.
    fingerprint : str
        Which numbers it gives.
    room : Room
        Shared by all that run the model.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    device: torch.device
    dtype: str
    fingerprint: str
    room: Room = field(default_factory=Room)


_lock = threading.RLock()
_loaded: dict[tuple[Source, str, str], Backbone] = {}
# A model of the caller's is not ours to keep alive.
_rooms: weakref.WeakKeyDictionary[Any, Room] = weakref.WeakKeyDictionary()


def _recover_from_fork() -> None:
    """Let a forked process run models: it has none of its parent's threads.

    GNU's OpenMP waits for them forever; with one thread, torch does without it, as in the workers
    of its own DataLoader. And a thread that held the lock is not there to give it back.
    """
    global _lock
    _lock = threading.RLock()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # Windows never forks.
    os.register_at_fork(after_in_child=_recover_from_fork)


def load_backbone(source: Source, device: Any = None, dtype: Any = "auto") -> Backbone:
    """Load a model, or find the copy that this process has on that device already.

    Parameters
    ----------
    source : Source
        What names the model.
    device : str, torch.device or None, default=None
        See `resolve_placement`.
    dtype : str, default="auto"
        See `resolve_placement`.

    Returns
    -------
    Backbone
        Shared by all that ask for an equal source, device and dtype, in any thread. A model in
        memory is used where it is, neither copied nor kept alive.
    """
    device, dtype = resolve_placement(source, device, dtype)
    with _lock:
        identity = fingerprint(source)
        if source.in_memory:
            room = _rooms.setdefault(source.model, Room())
            return _assemble(source, source.model, dtype, identity, room)
        key = (source, device, dtype)
        if key not in _loaded or _loaded[key].fingerprint != identity:
            _loaded.pop(key, None)  # The folder's weights changed: free these before the next.
            model = load_model(source, device, dtype)
            _loaded[key] = _assemble(source, model, dtype, identity, Room())
        return _loaded[key]


def forget_models() -> None:
    """Release the loaded models. One that is in use goes when its user is done."""
    with _lock:
        _loaded.clear()


def read_anatomy(source: Source) -> Anatomy:
    """Find a model's blocks and widths from its configuration alone.

    Parameters
    ----------
    source : Source
        What names the model. A model in memory is looked at as it is.

    Returns
    -------
    Anatomy
        For reading widths: its modules have no weights.
    """
    with _lock:
        return find_anatomy(source.model if source.in_memory else load_skeleton(source))


def resolve_placement(source: Source, device: Any = None, dtype: Any = "auto") -> tuple[str, str]:
    """Say on which device, and in which format, a model runs.

    Parameters
    ----------
    source : Source
        What names the model.
    device : str, torch.device or None, default=None
        See `resolve_device`. A model in memory stays where it is, and another device is refused.
    dtype : str or torch.dtype, default="auto"
        See `resolve_dtype`. A model in memory keeps its format, and another one is refused.

    Returns
    -------
    device, dtype : str
    """
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
    if str(dtype) != "auto" and resolve_dtype(dtype, own_device) != own_dtype:
        raise ValueError(
            f"dtype={str(dtype)!r}, but the model passed in is {own_dtype!r} and stays so. Leave "
            "dtype='auto', or convert the model yourself with model.to(...)."
        )
    return own_device, own_dtype


def _assemble(source: Source, model: Any, dtype: str, identity: str, room: Room) -> Backbone:
    tokenizer = load_tokenizer(source)
    device = _input_device(model)
    anatomy = try_anatomy(model, device, identity)
    return Backbone(model, tokenizer, anatomy, device, dtype, identity, room)


def _input_device(model: Any) -> torch.device:
    # A model that is spread over devices, or partly offloaded, takes its inputs on the first.
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
