"""The matrix that a call fills: in memory, or in a file where it is larger than memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from skspin._store.chunk import text_digests


class Output:
    """A matrix (n_texts, n_columns), float32; and a digest of its columns and texts."""

    def __init__(self, matrix: np.ndarray, digest: xxhash.xxh3_128 | None = None) -> None:
        self.matrix, self._digest = matrix, digest

    def note(self, texts: Iterable[str]) -> None:
        """Add the next texts to the digest that names the file, if there is a file."""
        if self._digest is not None:
            self._digest.update(b"".join(text_digests(texts)))


@contextmanager
def open_output(
    folder: str | os.PathLike[str] | None, shape: tuple[int, int], key: str
) -> Iterator[Output]:
    """Yield a matrix to be filled; one in a folder is then mapped from its file, read-only.

    A file in ``folder`` is always whole: one that is being filled ends in ".part", and is removed
    if that fails (a process that is killed leaves it behind).
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
    digest = xxhash.xxh3_128(key.encode())
    handle, path = tempfile.mkstemp(suffix=".part", prefix="activations-", dir=folder)
    part = Path(path)
    try:
        with os.fdopen(handle, "r+b") as file:
            try:
                output = Output(np.lib.format.open_memmap(part, "w+", np.float32, shape), digest)
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
        yield output
        output.matrix.flush()  # type: ignore[attr-defined]
        output.matrix = np.empty(0)  # some systems do not rename a mapped file
        whole = folder / f"activations-{digest.hexdigest()}.npy"
        os.replace(part, whole)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    output.matrix = np.load(whole, mmap_mode="r")
