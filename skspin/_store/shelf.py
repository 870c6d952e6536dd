"""One file of a store on disk: rows of activations, only ever appended.

A shelf is a header of 64 bytes and then records, each beginning at a multiple of 64::

    head        magic, number of rows, bytes of a row, part, checksum of the tables, of the head
    tables      the texts' digests, 16 bytes each; the rows' checksums, 8 bytes each
    rows        float32, little endian

A record's head is written after everything else, so a record is whole or not there: whatever stops
the writer, the next one finds zeros or the file's end where the head would be, and begins again
from that place. Only one process writes to a shelf, the one that holds its lock; the system takes
the lock from a process that dies. Readers take no lock and wait for nobody.

A part (which segments a row holds, for which context) is described once in each shelf, by a record
whose one row is JSON.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike

from skspin._store.part import Part

try:
    import fcntl
except ImportError:  # Windows: there every process fills shelves of its own
    fcntl = None  # type: ignore[assignment]

MAGIC = b"skspin shelf 1\n\0"
_HEADER = struct.Struct("<16sQ40x")  # magic, time of the last use on the store's own clock
_HEAD = struct.Struct("<8sQQ16sQ8xQ")  # magic, rows, bytes of a row, part, checksums
_RECORD = b"record\0\0"
_DESCRIPTION = bytes(16)  # stands for the part, where a record describes one
_ALIGNMENT = 64
_OPENING = 2048  # bytes with which a record begins, to be read at once: head and, often, tables
_BUFFERS = 256  # that one system call fills; every system takes at least 1024


class DamagedShelf(ValueError):
    """A shelf that cannot be read any further."""


@dataclass(frozen=True, eq=False)
class Record:
    """Rows that were written together.

    Parameters
    ----------
    shelf : Shelf
        Where they are.
    part : Part
        What each row holds.
    digests : list of bytes
        Their texts.
    checksums : ndarray of shape (n_rows,), uint64
        Of their bytes.
    offset : int
        Where in the file the first row begins.
    was_read : ndarray of shape (n_rows,), bool
        Which rows this process has read since it knows them.
    """

    shelf: Shelf
    part: Part
    digests: list[bytes]
    checksums: np.ndarray
    offset: int
    was_read: np.ndarray

    @classmethod
    def new(
        cls, shelf: Shelf, part: Part, digests: list[bytes], checksums: np.ndarray, offset: int
    ) -> Record:
        """Describe rows that nobody has read yet."""
        return cls(shelf, part, digests, checksums, offset, np.zeros(len(digests), bool))

    def read(self, first: int, into: Sequence[np.ndarray]) -> None:
        """Fill arrays of shape (n_columns,) with the rows from ``first`` on, unchecked."""
        self.shelf.read(self.offset + first * self.part.row_bytes, into)


class Shelf:
    """One file of rows.

    Parameters
    ----------
    path : Path
        A file that exists.

    Raises
    ------
    ValueError
        If it is not a shelf of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115
            self._may_write = True
        except PermissionError:  # a store that someone shares for reading
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
            self._may_write = False
        # A shelf may be dropped while another thread reads it; its last user closes the file.
        weakref.finalize(self, self._file.close)
        self._turn = threading.Lock()  # from seeking a place to having read or written there
        self._parts: dict[bytes, Part] = {}
        self.end = _ALIGNMENT  # of the last whole record
        self.damaged = False  # whether there is more that cannot be read
        if self._read_header()[0] != MAGIC:
            raise ValueError(f"{path} is not a shelf of the format that this version writes.")

    @classmethod
    def create(cls, path: Path) -> Shelf:
        """Begin a file. It has its name only once it has its header."""
        unnamed = path.with_suffix(".new")
        unnamed.write_bytes(_HEADER.pack(MAGIC, 0))
        os.replace(unnamed, path)
        return cls(path)

    @property
    def is_empty(self) -> bool:
        """Whether it has no record."""
        return self.end == _ALIGNMENT

    @property
    def size(self) -> int:
        """Bytes of the file."""
        with self._turn:
            return self._file.seek(0, io.SEEK_END)

    @property
    def last_use(self) -> int:
        """When it was last used, on the store's own clock."""
        return self._read_header()[1]

    def touch(self, now: int) -> None:
        """Note a use."""
        if self._may_write:
            self._write(0, _HEADER.pack(MAGIC, now))

    def _read_header(self) -> tuple[bytes, int]:
        return _HEADER.unpack(self._read_bytes(0, _HEADER.size).ljust(_HEADER.size, b"\0"))

    def lock(self) -> bool:
        """Become the one process that writes here, unless there is one or it is not permitted."""
        if not self._may_write:
            return False
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def unlock(self) -> None:
        """Let another process write here."""
        if fcntl is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def read(self, offset: int, into: Sequence[np.ndarray]) -> None:
        """Fill arrays; what the file does not have stays as it was, for checksums to tell."""
        if hasattr(os, "preadv"):
            for start in range(0, len(into), _BUFFERS):
                chunk = into[start : start + _BUFFERS]
                os.preadv(self._file.fileno(), chunk, offset)
                offset += sum(row.nbytes for row in chunk)
        else:
            with self._turn:
                self._file.seek(offset)
                for row in into:
                    self._file.readinto(row)

    def _read_bytes(self, offset: int, n_bytes: int) -> bytes:
        with self._turn:
            self._file.seek(offset)
            return self._file.read(n_bytes)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        with self._turn:
            self._file.seek(offset)
            while rest:  # a write may be cut short by a signal, or by a disk that is nearly full
                rest = rest[self._file.write(rest) :]

    def scan(self) -> Iterator[Record]:
        """Read the records that were not there at the last scan.

        Raises
        ------
        DamagedShelf
            If there is something where a record should begin that is not one.
        """
        while (opening := self._read_opening()) is not None:
            start, head = self.end, opening[: _HEAD.size]
            magic, n_rows, row_bytes, part, tables_sum, _ = _HEAD.unpack(head)
            offset = start + _HEAD.size + 24 * n_rows
            if offset - start > len(opening):
                opening = self._read_bytes(start, offset - start)
            tables = opening[_HEAD.size : offset - start]
            self._check(magic == _RECORD and checksum(tables) == tables_sum)
            end = _aligned(offset + n_rows * row_bytes)
            self._check(end <= self.size)
            checksums = np.frombuffer(tables, "<u8", n_rows, 16 * n_rows)
            self.end = end
            if part == _DESCRIPTION:
                text = self._read_bytes(offset, row_bytes)
                self._check(checksum(text) == checksums[0])
                self._parts[tables[:16]] = Part.from_json(text)
            else:
                digests = np.frombuffer(tables, "V16", n_rows).tolist()
                yield Record.new(self, self._parts[part], digests, checksums, offset)

    def _read_opening(self) -> bytes | None:
        """Read how the next record begins, its head at least, if there is one yet."""
        opening = self._read_bytes(self.end, _OPENING)
        if len(opening) < _HEAD.size or not any(opening[: _HEAD.size]):
            return None
        if not _is_head(opening[: _HEAD.size]):
            time.sleep(0.01)  # we may have read it while it was being written
            opening = self._read_bytes(self.end, _OPENING)
            self._check(_is_head(opening[: _HEAD.size]))
        return opening

    def _check(self, is_sound: bool) -> None:
        if not is_sound:
            self.damaged = True
            raise DamagedShelf(f"{self.path} is damaged and cannot be read beyond {self.end} bytes")

    def append(self, part: Part, digests: Sequence[bytes], rows: np.ndarray) -> Record:
        """Write rows of a part, of shape (n_rows, n_columns), float32, C-contiguous."""
        if part.digest not in self._parts:
            text = part.to_json()
            self._append(_DESCRIPTION, [part.digest], [checksum(text)], text)
            self._parts[part.digest] = part
        checksums = np.array([checksum(row) for row in rows], "<u8")
        offset = self._append(part.digest, digests, checksums, rows.data)
        return Record.new(self, part, list(digests), checksums, offset)

    def _append(
        self, part: bytes, digests: Sequence[bytes], checksums: ArrayLike, rows: bytes | memoryview
    ) -> int:
        """Write a record and return where its rows begin."""
        start, n_rows = self.end, len(digests)
        tables = b"".join(digests) + np.asarray(checksums, "<u8").tobytes()
        n_bytes = memoryview(rows).nbytes
        head = _HEAD.pack(_RECORD, n_rows, n_bytes // n_rows, part, checksum(tables), 0)[:-8]
        with self._turn:
            self._file.truncate(start)  # what a writer left who was stopped
        self._write(start + _HEAD.size, tables)
        self._write(start + _HEAD.size + len(tables), rows)
        end = _aligned(start + _HEAD.size + len(tables) + n_bytes)
        with self._turn:
            self._file.truncate(end)  # padding
        self._write(start, head + struct.pack("<Q", checksum(head)))
        self.end = end
        return start + _HEAD.size + len(tables)


def _is_head(head: bytes) -> bool:
    return len(head) == _HEAD.size and checksum(head[:-8]) == _HEAD.unpack(head)[-1]


def checksum(data: Any) -> int:
    """Sum up the bytes of a row, a table or a head."""
    return xxhash.xxh3_64_intdigest(data)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def space_for(part: Part, n_rows: int) -> int:
    """Bytes that ``n_rows`` rows of a part take at most, with all that goes with them."""
    description = 2 * _HEAD.size + 24 + len(part.to_json())
    return description + 2 * _ALIGNMENT + n_rows * (24 + part.row_bytes)
