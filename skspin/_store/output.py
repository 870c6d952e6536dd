"""A matrix in a file, for what does not fit into memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


def fill_file(
    folder: str | os.PathLike[str],
    shape: tuple[int, int],
    fill: Callable[[np.ndarray], None],
    name: Callable[[], str],
) -> np.ndarray:
    """Have a matrix filled that lies in a file, and map it into memory, read-only.

    A file in ``folder`` is always whole: one that is being filled ends in ".part", and is removed
    if that fails (a process that is killed leaves it behind).

    Parameters
    ----------
    folder : path
        Where the file goes; made if it is not there.
    shape : tuple of int
        Rows and columns.
    fill : callable
        Fills the matrix that it is given.
    name : callable
        Names the file, after it is filled. A file of that name is replaced; who has it mapped keeps
        the old one.

    Returns
    -------
    ndarray of the shape, float32
        Mapped from a file that ``numpy.load`` reads too.
    """
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
    part = Path(path)
    try:
        with os.fdopen(handle, "r+b") as file:
            try:
                matrix = np.lib.format.open_memmap(part, "w+", np.dtype(np.float32), shape)
                _reserve(file.fileno(), part.stat().st_size)
            except OSError as error:
                n_bytes = 4 * shape[0] * shape[1]
                raise OSError(
                    error.errno,
                    f"output_folder={str(folder)!r} has no room for {n_bytes / 1e6:,.0f} MB of "
                    f"activations ({error.strerror}). Make room, give another folder, or ask for "
                    "fewer layers, sites or poolings",
                ) from error
        fill(matrix)
        matrix.flush()
        del matrix  # some systems rename no file that is mapped
        whole = folder / f"activations-{name()}.npy"
        os.replace(part, whole)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return np.load(whole, mmap_mode="r")


def _reserve(file: int, n_bytes: int) -> None:
    """Have the disk set room aside: writing to a mapping when it is full would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, n_bytes)
