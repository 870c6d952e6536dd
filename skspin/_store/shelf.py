"""Two files of a store on disk: a matrix of activations, and the texts that its rows belong to.

``NAME.rows`` is a plain matrix of little-endian float32 and nothing else. ``NAME.texts`` has a
header, which says what the columns are, and then 24 bytes for each row: the digest of its text (16)
and the checksum of the row (8).

Rows are only ever appended, and a row is there once its text is. So whatever stops a writer, at
worst it leaves something after the last whole row or text, and the next writer begins in its place.
Only one process writes to a shelf, the one that holds its lock; the system takes the lock from a
process that dies. Readers take no lock and wait for nobody: they map both files into memory.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from skspin._store.part import Part

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_MAGIC = b"skspin shelf 1\n\0"
_HEADER = struct.Struct("<16sQQ")  # magic, length and checksum of the description that follows
_ENTRY = np.dtype([("text", "V16"), ("checksum", "<u8")])

_LONGEST = 1 << 24  # description, so that a damaged length does no harm

checksum = xxhash.xxh3_64_intdigest


class DamagedShelf(ValueError):
    """A shelf that is not what was written."""


class Shelf:
    """Rows of one part.

    Parameters
    ----------
    stem : Path
        Of both files, without suffix.

    Attributes
    ----------
    name : str
        Of the shelf in its folder.
    part : Part
        What each row holds.
    n_rows : int
        Number of rows, as of the last `refresh`.
    numbers : dict of bytes to int
        The row of each text.

    Raises
    ------
    ValueError
        If the files are not of this format.
    DamagedShelf
        If the header is not what was written.
    """

    def __init__(self, stem: Path) -> None:
        self.name = stem.name
        self._texts_path = stem.with_suffix(".texts")
        self._rows_path = stem.with_suffix(".rows")
        with open(self._texts_path, "rb") as file:
            magic, length, expected = _HEADER.unpack(file.read(_HEADER.size).ljust(_HEADER.size))
            if magic != _MAGIC:
                raise ValueError(f"{stem} is not of the format that this version writes.")
            description = file.read(min(length, _LONGEST))
        if checksum(description) != expected:
            raise DamagedShelf(f"{self._texts_path} is damaged")
        self.part = Part.from_json(description)
        self._start = _HEADER.size + length  # of the first text
        self._files: tuple[FileIO, FileIO] | None = None  # of texts and rows, while we may write
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self.n_rows = 0
        self.numbers: dict[bytes, int] = {}
        self._was_read = np.zeros(0, bool)
        self._entries = np.empty(0, _ENTRY)
        self._matrix = np.empty((0, self.part.n_columns), "<f4")

    @classmethod
    def create(cls, stem: Path, part: Part) -> Shelf:
        """Begin the two files. Others find them once both are there."""
        description = part.to_json()
        description += b" " * (-len(description) % 8)  # keeps the checksums aligned
        header = _HEADER.pack(_MAGIC, len(description), checksum(description))
        stem.with_suffix(".rows").touch()
        unnamed = stem.with_suffix(".new")
        unnamed.write_bytes(header + description)
        os.replace(unnamed, stem.with_suffix(".texts"))
        return cls(stem)

    def lock(self, *, is_new: bool = False) -> bool:
        """Become the one process that writes here, unless there is one.

        Where the system has no locks for files, nobody can tell, and so only a shelf that this
        process has just made is its own.
        """
        try:
            texts = open(self._texts_path, "r+b", buffering=0)  # noqa: SIM115
        except FileNotFoundError:  # another process has just removed it
            return False
        if not _lock(texts, is_new):
            texts.close()
            return False
        rows = open(self._rows_path, "r+b", buffering=0)  # noqa: SIM115
        self._files = texts, rows
        self._closing = weakref.finalize(self, _close, self._files)
        return True

    def unlock(self) -> None:
        """Let another process write here."""
        if self._files is not None:
            self._closing()
            self._files = None

    def refresh(self) -> None:
        """Learn of the rows that were written since.

        Raises
        ------
        DamagedShelf
            If there are texts without rows: the file was cut off. Said once; the next writer puts
            it right.
        """
        # Rows are written before texts and so counted after them.
        n_texts = (self._texts_path.stat().st_size - self._start) // _ENTRY.itemsize
        n_rows = self._rows_path.stat().st_size // self.part.row_bytes
        n = min(n_texts, n_rows)
        if n < self.n_rows:
            self._forget()
        if n > self.n_rows:
            self._learn(n)
        if n_rows < n_texts and not self._warned:
            self._warned = True
            raise DamagedShelf(f"{self._rows_path} was cut off")

    def _learn(self, n: int) -> None:
        known, row_bytes = self.n_rows, self.part.row_bytes
        texts = _mapped(self._texts_path, self._start + n * _ENTRY.itemsize)
        rows = _mapped(self._rows_path, n * row_bytes)
        was_read = np.zeros(n, bool)
        was_read[:known] = self._was_read[:known]
        # Another thread may look a text up at any moment, so its number comes after all else; and
        # Ctrl-C may come at any moment, so what has been learnt is counted last.
        self._was_read = was_read
        self._matrix = np.frombuffer(rows, "<f4").reshape(n, self.part.n_columns)
        self._entries = np.frombuffer(texts, _ENTRY, n, self._start)
        digests = self._entries["text"][known:].tolist()
        self.numbers.update(zip(digests, range(known, n), strict=True))
        self.n_rows = n

    def take(self, numbers: np.ndarray, texts: Sequence[bytes], into: np.ndarray) -> np.ndarray:
        """Copy rows and say which of them are what was written.

        Parameters
        ----------
        numbers : ndarray of shape (n_rows,), int
            Which rows.
        texts : sequence of bytes, length n_rows
            The digests of the texts that they should belong to.
        into : ndarray of shape (n_rows, n_columns), float32
            Where to.

        Returns
        -------
        ndarray of shape (n_rows,), bool
        """
        self._matrix.take(numbers, axis=0, out=into, mode="clip")  # any other mode copies twice
        # The copy is summed up, not the map, which another process could change in between.
        sums = np.fromiter(map(checksum, into), np.uint64, len(into))
        entries = self._entries.take(numbers, mode="clip")
        expected = np.frombuffer(b"".join(texts), _ENTRY["text"])
        return (sums == entries["checksum"]) & (entries["text"] == expected)

    def note_read(self, numbers: np.ndarray) -> np.ndarray:
        """Note that this process has read some rows, and say which it had read before."""
        before = self._was_read[numbers]
        self._was_read[numbers] = True
        return before

    def append(self, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Write rows, of shape (n_rows, n_columns), C-contiguous; needs the lock."""
        if self._files is None:
            raise RuntimeError("A shelf must be locked before it is written to.")
        entries = np.empty(len(digests), _ENTRY)
        entries["text"] = np.frombuffer(b"".join(digests), "V16")
        entries["checksum"] = [checksum(row) for row in rows]
        end_of_texts = self._start + self.n_rows * _ENTRY.itemsize
        texts, matrix = self._files
        texts.truncate(end_of_texts)  # if there were texts without rows, they must not get these
        _write(matrix, self.n_rows * self.part.row_bytes, rows)
        _write(texts, end_of_texts, entries)
        self.refresh()


def size_of(part: Part, n_rows: int) -> int:
    """Count the bytes that rows take."""
    return n_rows * (part.row_bytes + _ENTRY.itemsize)


def _lock(file: FileIO, otherwise: bool) -> bool:
    if fcntl is None:
        return otherwise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return otherwise
    return True


def _close(files: Iterable[FileIO]) -> None:
    for file in files:
        file.close()


def _mapped(path: Path, n_bytes: int) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)


def _write(file: FileIO, offset: int, values: np.ndarray) -> None:
    """Write at ``offset``, and nothing after it remains of a writer that was stopped."""
    file.truncate(offset)
    file.seek(offset)
    rest = values.view(np.uint8).reshape(-1).data
    while rest:  # a disk that is nearly full takes a part and refuses the rest
        rest = rest[file.write(rest) :]
