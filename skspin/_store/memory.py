"""Where chunks live: the memory of one process."""

from __future__ import annotations

from itertools import count

import numpy as np

from skspin._store.chunk import Chunk

_BYTES_PER_TEXT = 400  # of the index: a digest, a number, their slots in a dict; a test measures it


class Memory:
    """Chunks by name. Threads may share it, because each step is one operation on a dict."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._records: dict[str, np.ndarray] = {}
        self._last_use: dict[str, int] = {}
        self._clock = count()

    def __str__(self) -> str:
        """Return a name, for messages."""
        return "memory"

    def make(self) -> None:
        """Do nothing: memory needs no set-up."""

    def names(self) -> list[str]:
        """List the chunks' names."""
        return list(self._records)

    def scan(self) -> dict[str, tuple[int, int]]:
        """List all chunks: by name, the time of last use and the bytes."""
        records = list(self._records.items())
        return {name: (self._last_use.get(name, 0), _size(record)) for name, record in records}

    def size_of(self, chunk: Chunk) -> int:
        """Count the bytes that a chunk takes here."""
        return _size(chunk.record)

    def open(self, name: str) -> np.ndarray:
        """Return a chunk's record."""
        try:
            return self._records[name]
        except KeyError as error:
            raise FileNotFoundError(name) from error

    def put(self, chunk: Chunk) -> None:
        """Add a chunk."""
        self._records[chunk.name] = chunk.record

    def remove(self, name: str) -> None:
        """Remove a chunk, if it is there."""
        self._records.pop(name, None)
        self._last_use.pop(name, None)

    def touch(self, chunk: Chunk) -> bool:
        """Mark a chunk as used, and return that it is whole."""
        self._last_use[chunk.name] = next(self._clock)
        return True

    def read_metadata(self, name: str) -> None:
        """Find nothing: there are no other processes."""

    def write_metadata(self, name: str, text: str) -> None:
        """Do nothing: there are no other processes."""

    def clear_metadata(self) -> None:
        """Do nothing."""


def _size(record: np.ndarray) -> int:
    return record.nbytes + _BYTES_PER_TEXT * len(record["texts"])
