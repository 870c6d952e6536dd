"""Activations by text, so that no text goes through a model twice.

A store answers for a *context*, a string in which the caller puts whatever else decides the numbers
(the model's fingerprint, the prompt, ...), a text and a segment. It knows no language model.
"""

from __future__ import annotations

import os

from skspin._store.base import NoStore, Store
from skspin._store.disk import DiskStore
from skspin._store.memory import MemoryStore

__all__ = ["Store", "open_store"]

_MEMORY = MemoryStore()
_FOLDERS: dict[str, DiskStore] = {}


def open_store(cache: str | os.PathLike[str] | None) -> Store:
    """Find the store that a ``cache`` parameter names.

    Parameters
    ----------
    cache : "memory", path or None
        The one store in this process's memory, a folder, or a store that keeps nothing.
    """
    if cache is None:
        return NoStore()
    if isinstance(cache, str) and cache == "memory":
        return _MEMORY
    folder = os.path.abspath(os.path.expanduser(os.fspath(cache)))
    if folder not in _FOLDERS:
        _FOLDERS[folder] = DiskStore(folder)
    return _FOLDERS[folder]
