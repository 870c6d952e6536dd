"""The matrix that a call fills: in memory, or in a file where it is larger than memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from skspin._store.chunk import text_digests


def fill_output(
    folder: str | os.PathLike[str] | None,
    shape: tuple[int, int],
    key: str,
    fill: Callable[[np.ndarray], Iterable[Sequence[str]]],
) -> np.ndarray:
    """Return a matrix, float32, filled by ``fill``, which yields the texts of its rows in order.

    One in a folder is mapped from its file, read-only; its name tells the texts and the ``key``. A
    file in ``folder`` is always whole: one that is being filled ends in ".part", and is removed if
    that fails (a process that is killed leaves it behind).
    """
    if folder is None:
        matrix = np.empty(shape, np.float32)
        for _ in fill(matrix):
            pass
        return matrix
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
        with os.fdopen(handle, "r+b") as file:
            try:
                matrix = np.lib.format.open_memmap(part, "w+", np.float32, shape)
                if hasattr(os, "posix_fallocate"):
                    # Writing to a mapped file when the disk is full would kill the process.
                    os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
            except OSError as error:
                n_bytes = 4 * shape[0] * shape[1]
                raise OSError(
                    error.errno,
                    f"output_folder={str(folder)!r} has no room for {n_bytes / 1e6:,.0f} MB of "
                    f"activations ({error.strerror}). Make room, give another folder, or ask for "
                    "fewer layers, sites or poolings",
                ) from error
        for texts in fill(matrix):
            digest.update(b"".join(text_digests(texts)))
        matrix.flush()
        del matrix  # some systems do not rename a mapped file
        whole = folder / f"activations-{digest.hexdigest()}.npy"
        os.replace(part, whole)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return np.load(whole, mmap_mode="r")
