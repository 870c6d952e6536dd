"""Activations by text, so that no text goes through a model twice.

A store knows no language model: it finds activations by a text, a layout and a key, a string that
stands for whatever else decides the numbers. It holds chunks: some texts, one layout, their rows,
written once. Chunks live in memory or in a folder; everything else is the same for both.
`open_output` makes room for a call's result, in a file where it is larger than memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from skspin._store.chunk import DTYPES, text_digests
from skspin._store.storage import Folder, Memory
from skspin._store.store import Store, StoreInfo
from skspin._system import machine_memory

__all__ = ["DTYPES", "Output", "Store", "StoreInfo", "open_output", "open_store"]

# One bound for everything that this process keeps in memory, whatever folder it was meant for.
_MEMORY = Store(Memory(machine_memory() // 4))
# By path: a store, and the state of its folder after it was opened.
_FOLDERS: dict[str, tuple[Store, tuple[bool, bool]]] = {}


def open_store(cache: str | os.PathLike[str] | None = "memory") -> Store:
    """Open the store that a ``cache`` parameter names, to see or clear it or to set its bound.

    Read more in the user guide, :doc:`/user_guide/searching`, and in :doc:`/how_to/new_texts`.

    Parameters
    ----------
    cache : "memory", path or None, default="memory"
        The store that all estimators of this process share, a folder that processes share, which
        is made if it is not there, or a store that keeps nothing.

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
    storage = Folder(folder)
    store, state = _FOLDERS.get(folder, (None, None))
    # The folder may have been removed since, or made where this process could not make it.
    if store is None or storage.state != state:
        store = Store(storage, _MEMORY)
        _FOLDERS[folder] = store, storage.state
    return store


class Output:
    """The matrix that a call fills: in memory, or in a file where it is larger than memory."""

    def __init__(self, matrix: np.ndarray, digest: xxhash.xxh3_128 | None = None) -> None:
        self.matrix = matrix  # float32
        self._digest = digest  # of a file's texts

    def add_texts(self, texts: Sequence[str]) -> None:
        """Say which texts the next rows are of."""
        if self._digest is not None:
            self._digest.update(b"".join(text_digests(texts)))


@contextmanager
def open_output(
    folder: str | os.PathLike[str] | None, shape: tuple[int, int], key: str
) -> Iterator[Output]:
    """Make room for a matrix; it is complete after the ``with`` block.

    One in a folder is then mapped from its file, read-only; its name tells the texts and the
    ``key``. A file in ``folder`` is always whole: one that is being filled ends in ".part", and is
    removed if that fails (a process that is killed leaves it behind).
    """
    if folder is None:
        yield Output(np.empty(shape, np.float32))
        return
    if not os.fspath(folder):
        raise ValueError("output_folder='' names no folder. Give one, or None to use memory.")
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"output_folder={str(folder)!r}, but {error.filename} is a file. Give a folder, which "
            "is made if it is not there."
        ) from error
    handle, path = tempfile.mkstemp(suffix=".part", prefix="activations-", dir=folder)
    part, digest = Path(path), xxhash.xxh3_128(key.encode())
    try:
        output = Output(_map_file(handle, part, shape), digest)
        yield output
        output.matrix.flush()  # type: ignore[attr-defined]
        del output.matrix  # some systems do not rename a mapped file
        whole = folder / f"activations-{digest.hexdigest()}.npy"
        os.replace(part, whole)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    output.matrix = np.load(whole, mmap_mode="r")


def _map_file(handle: int, part: Path, shape: tuple[int, int]) -> np.ndarray:
    """Map a new file, of which the disk has all room, into memory."""
    with os.fdopen(handle, "r+b") as file:
        try:
            matrix = np.lib.format.open_memmap(part, "w+", np.float32, shape)
            if hasattr(os, "posix_fallocate"):
                # Writing to a mapped file when the disk is full would kill the process.
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"output_folder={str(part.parent)!r} has no room for "
                f"{4 * shape[0] * shape[1] / 1e6:,.0f} MB of activations ({error.strerror}). Make "
                "room, give another folder, or ask for fewer layers, sites or poolings",
            ) from error
    return matrix
