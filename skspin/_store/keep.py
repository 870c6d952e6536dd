"""A mapping with a bound in bytes that forgets what was used longest ago."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from skspin._store.fork import renew_in_child

# A key, a value's own object, and their places in the mapping; measured, see tests/test_keep.py.
ENTRY_OVERHEAD = 400

Value = TypeVar("Value")


class Keep(Generic[Value]):
    """Values by digest, up to a number of bytes.

    Threads may share it. Values are handed out as they are, so they must not be changed.

    Parameters
    ----------
    limit : int
        Bound in bytes. What was used longest ago goes first.
    """

    def __init__(self, limit: int) -> None:
        self._entries: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()
        self._limit = limit
        self.n_bytes = 0
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Start with a lock of our own, and a count that no other thread left half done."""
        self._lock = threading.Lock()
        self.n_bytes = sum(size for _, size in self._entries.values())

    @property
    def limit(self) -> int:
        """Bound in bytes; a lower one takes effect at once."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        with self._lock:
            self._limit = limit
            self._make_room(0)

    def get(self, key: bytes) -> Value | None:
        """Return the value of one key, or None."""
        return self.get_many([key])[0]

    def get_many(self, keys: Iterable[bytes]) -> list[Value | None]:
        """Return the value of each key, None where there is none."""
        values: list[Value | None] = []
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is not None:
                    self._entries.move_to_end(key)
                values.append(None if entry is None else entry[0])
        return values

    def put(self, key: bytes, value: Value, n_bytes: int) -> None:
        """Keep one value, which takes ``n_bytes``."""
        self.put_many([key], [value], n_bytes)

    def put_many(self, keys: Sequence[bytes], values: Sequence[Value], n_bytes: int) -> None:
        """Keep a value for each key; each takes ``n_bytes``."""
        size = n_bytes + ENTRY_OVERHEAD
        with self._lock:
            for key, value in zip(keys, values, strict=True):
                self._forget(key)
                if size <= self._limit:
                    self._make_room(size)
                    self._entries[key] = (value, size)
                    self.n_bytes += size

    def keys(self) -> list[bytes]:
        """List what is kept, from least to most recently used."""
        with self._lock:
            return list(self._entries)

    def size_of(self, keys: Iterable[bytes]) -> int:
        """Count the bytes that these keys take."""
        with self._lock:
            return sum(self._entries[key][1] for key in keys if key in self._entries)

    def clear(self, prefix: bytes = b"") -> None:
        """Forget everything whose key begins with ``prefix``."""
        with self._lock:
            for key in [key for key in self._entries if key.startswith(prefix)]:
                self._forget(key)

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.n_bytes -= entry[1]

    def _make_room(self, n_bytes: int) -> None:
        while self._entries and self.n_bytes + n_bytes > self._limit:
            self._forget(next(iter(self._entries)))
