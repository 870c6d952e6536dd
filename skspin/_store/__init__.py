"""Activations by text, so that no text goes through a model twice.

A store knows no language model: it answers for a context (a string in which the caller puts
whatever else decides the numbers), a text and a segment.
"""

from __future__ import annotations

import os

import numpy as np

from skspin._store.base import NoStore, Store, StoreInfo
from skspin._store.disk import DiskStore
from skspin._store.keep import Keep
from skspin._store.memory import MemoryStore
from skspin._system import machine_memory

__all__ = ["Store", "StoreInfo", "open_store"]

# One bound for everything that this process keeps in memory, whatever folder it came from.
_ROWS: Keep[np.ndarray] = Keep(machine_memory() // 4)
_MEMORY = MemoryStore(_ROWS)
_FOLDERS: dict[str, DiskStore] = {}


def open_store(cache: str | os.PathLike[str] | None = "memory") -> Store:
    """Open the store that a ``cache`` parameter names, to see or clear it or to set its bound.

    Parameters
    ----------
    cache : "memory", path or None, default="memory"
        The store that all estimators of this process share, a folder that processes share, or a
        store that keeps nothing.

    Returns
    -------
    Store
        The same one each time. ``info()`` counts entries, bytes and models, ``clear()`` forgets
        everything, and ``limit``, in bytes, can be assigned.

    Examples
    --------
    >>> import skspin
    >>> store = skspin.open_store("memory")
    >>> store.limit = 2 * 1024**3
    >>> store.clear()
    >>> store.info()
    StoreInfo(entries=0, n_bytes=0, limit=2147483648, models={})
    """
    if cache is None:
        return NoStore()
    if not isinstance(cache, str | os.PathLike):
        raise TypeError(f"cache={cache!r}, but it must be 'memory', a folder or None.")
    if not os.fspath(cache):
        raise ValueError(f"cache={cache!r} names no folder. Give 'memory', a folder or None.")
    if cache == "memory":
        return _MEMORY
    folder = os.path.realpath(os.path.expanduser(os.fsdecode(cache)))
    store = _FOLDERS.get(folder)
    if store is None or store.is_outdated:
        front = MemoryStore(_ROWS, owner=folder)
        front.clear()  # what was in a folder that is gone is not in the one that is made
        store = _FOLDERS[folder] = DiskStore(folder, front)
    return store
