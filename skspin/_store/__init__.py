"""Activations by text, so that no text goes through a model twice.

A store knows no language model: it finds activations by a text, a layout and a key, a string that
stands for whatever else decides the numbers. It holds chunks: some texts, one layout, their rows,
written once. Chunks live in memory or in a folder; everything else is the same for both.
"""

from __future__ import annotations

import os

from skspin._store.chunk import DTYPES
from skspin._store.output import fill_output
from skspin._store.storage import Folder, Memory
from skspin._store.store import Store, StoreInfo
from skspin._system import machine_memory

__all__ = ["DTYPES", "Store", "StoreInfo", "fill_output", "open_store"]

# One bound for everything that this process keeps in memory, whatever folder it was meant for.
_MEMORY = Store(Memory(machine_memory() // 4))
# By path: a store, and whether its folder existed after it was opened.
_FOLDERS: dict[str, tuple[Store, bool]] = {}


def open_store(cache: str | os.PathLike[str] | None = "memory") -> Store:
    """Open the store that a ``cache`` parameter names, to see or clear it or to set its bound.

    Read more in the user guide, :doc:`/user_guide/searching`, and in :doc:`/how_to/new_texts`.

    Parameters
    ----------
    cache : "memory", path or None, default="memory"
        The store that all estimators of this process share, a folder that processes share, or a
        store that keeps nothing.

    Returns
    -------
    Store
        Each time the same one, except for None. ``info()`` counts entries, bytes and models,
        ``clear()`` removes everything, and ``limit``, in bytes, can be assigned.

    See Also
    --------
    LLMActivationTransformer : Its ``cache`` says which store it uses.

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
        return Store(Memory(0))
    if not isinstance(cache, str | os.PathLike):
        raise TypeError(f"cache={cache!r}, but it must be 'memory', a folder or None.")
    if not os.fspath(cache):
        raise ValueError(f"cache={cache!r} names no folder. Give 'memory', a folder or None.")
    if cache == "memory":
        return _MEMORY
    folder = os.path.realpath(os.path.expanduser(os.fsdecode(cache)))
    store, was_there = _FOLDERS.get(folder, (None, False))
    # The folder may have been removed since, or made where this process could not make it.
    if store is None or os.path.isdir(folder) != was_there:
        store = Store(Folder(folder), _MEMORY)
        _FOLDERS[folder] = store, os.path.isdir(folder)
    return store
