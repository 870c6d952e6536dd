"""A folder of shelves: what lies where, where the next rows go, and which shelf makes room."""

from __future__ import annotations

import os
import re
import threading
import uuid
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np

from skspin._fork import renew_in_child
from skspin._layout import Segment
from skspin._store.part import Part
from skspin._store.shelf import DamagedShelf, Record, Shelf, checksum, space_for

_NAME = re.compile(r"(\d{8,})-[0-9a-f]{8}\.shelf")
_SHELVES_IN_LIMIT = 16  # room is made by whole shelves, so this is how finely
_SCRATCH_BYTES = 1 << 20  # rows are read through a buffer that stays in the CPU's cache


class Shelves:
    """Rows on disk.

    Threads and processes may share a folder. Every process has its own index of what lies where,
    which it brings up to date, by reading the heads of new records only, whenever it is used.

    Parameters
    ----------
    folder : Path
        Exists and holds nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Start from nothing: no lock, no file and no index, all of which are read again."""
        self._lock = threading.RLock()
        self._shelves: dict[str, Shelf | None] = {}  # by file name; None for another format's
        self._ours: Shelf | None = None  # the one that this process writes to
        self._distrusted = False  # whether what is written next must be found before what is there
        self._forget_records()

    def _forget_records(self) -> None:
        self._records: list[Record] = []
        self._starts: list[int] = []  # number of each record's first row
        self._n_rows = 0
        self._index: dict[Part, dict[bytes, int]] = {}  # number of the row, by part and text

    # What lies where

    def _refresh(self) -> None:
        """Learn what other processes have written and removed."""
        names = sorted(name for name in os.listdir(self._folder) if _NAME.fullmatch(name))
        gone = self._shelves.keys() - set(names)
        for name in gone:
            shelf = self._shelves.pop(name)
            if shelf is not None and shelf is self._ours:
                self._ours = None
        if gone:
            self._forget_shelves()
        for name in names:
            if name not in self._shelves:
                self._shelves[name] = _open(self._folder / name)
        for shelf in self._whole_shelves():
            if shelf is not self._ours:
                self._scan(shelf)

    def _whole_shelves(self) -> list[Shelf]:
        return [shelf for shelf in self._shelves.values() if shelf is not None]

    def _forget_shelves(self) -> None:
        """Drop the records of shelves that are gone."""
        kept = set(self._whole_shelves())
        records = [record for record in self._records if record.shelf in kept]
        self._forget_records()
        for record in records:
            self._add(record)

    def _scan(self, shelf: Shelf) -> None:
        if shelf.damaged:
            return
        try:
            for record in shelf.scan():
                self._add(record)
        except DamagedShelf as error:
            self._distrusted = True
            warnings.warn(f"{error}; what was there will be computed again.", stacklevel=2)

    def _add(self, record: Record) -> None:
        numbers = range(self._n_rows, self._n_rows + len(record.digests))
        self._records.append(record)
        self._starts.append(self._n_rows)
        self._n_rows = numbers.stop
        self._index.setdefault(record.part, {}).update(zip(record.digests, numbers, strict=True))

    # Reading

    def fill(
        self,
        context: str,
        digests: Sequence[bytes],
        segments: Sequence[Segment],
        out: np.ndarray,
        found: np.ndarray,
        reread: Callable[[Part, list[bytes], np.ndarray], None],
    ) -> None:
        """Fill in what is here and not yet found.

        Rows that were read before are also given to ``reread``, as whole rows of their part.
        """
        with self._lock:
            self._refresh()
            parts = [part for part in self._index if part.context == context]
        used: set[Shelf] = set()
        for part in parts:
            overlap = part.overlap(segments)
            if overlap is None:
                continue
            lacking = overlap.lacking(found)
            for record, local, rows, positions in self._rows_of(part, digests, lacking):
                for source, target in overlap.copies:
                    out[positions, target] = rows[:, source]
                found[np.ix_(positions, overlap.asked)] = True
                used.add(record.shelf)
                again = np.flatnonzero(record.was_read[local])
                if again.size:
                    reread(part, [digests[i] for i in positions[again]], rows[again])
                record.was_read[local] = True
        with self._lock:
            self._note_use(used)

    def _rows_of(
        self, part: Part, digests: Sequence[bytes], positions: np.ndarray
    ) -> Iterator[tuple[Record, np.ndarray, np.ndarray, np.ndarray]]:
        """Read the rows of some texts, in the order in which they lie on disk.

        Yields the record, the numbers of its rows, the rows, and the positions of their texts. The
        rows' array is used again for the next ones.
        """
        with self._lock:
            records, starts, index = self._records, self._starts, self._index.get(part, {})
            asked = (digests[i] for i in positions.tolist())
            numbers = np.fromiter(map(index.get, asked, repeat(-1)), np.int64, len(positions))
        order = np.argsort(numbers)
        order = order[np.searchsorted(numbers, 0, sorter=order) :]  # -1: not here
        numbers, positions = numbers[order], positions[order]
        step = max(1, _SCRATCH_BYTES // part.row_bytes)
        scratch = np.empty((min(step, len(numbers)), part.row_bytes // 4), "<f4")
        start = 0
        while start < len(numbers):
            place = bisect_right(starts, numbers[start]) - 1
            record, first = records[place], starts[place]
            stop = int(np.searchsorted(numbers, first + len(record.digests)))
            stop = min(stop, start + step)
            local, rows = numbers[start:stop] - first, scratch[: stop - start]
            sound = self._read(record, local, rows)
            if not sound.all():
                self._discard(record, local[~sound])
                local, rows = local[sound], rows[sound]
            yield record, local, rows, positions[start:stop][sound]
            start = stop

    def _read(self, record: Record, local: np.ndarray, into: np.ndarray) -> np.ndarray:
        """Read rows of a record, given in ascending order, and say which match their checksums."""
        runs = [0, *(np.flatnonzero(np.diff(local) != 1) + 1).tolist(), len(local)]
        for start, stop in zip(runs, runs[1:], strict=False):
            record.read(int(local[start]), into[start:stop])
        sums = np.array([checksum(row.data) for row in into], np.uint64)
        return sums == record.checksums[local]

    def _discard(self, record: Record, damaged: np.ndarray) -> None:
        """Forget rows that are not what was written."""
        with self._lock:
            index = self._index.get(record.part, {})
            for row in damaged.tolist():
                index.pop(record.digests[row], None)
            self._distrusted = True
        warnings.warn(
            f"{len(damaged)} texts' activations in {record.shelf.path} are damaged; they will be "
            "computed again.",
            stacklevel=2,
        )

    # Writing

    def put(self, part: Part, digests: Sequence[bytes], rows: np.ndarray, limit: int) -> None:
        """Keep the rows that are not here yet, in ``limit`` bytes altogether."""
        with self._lock:
            self._refresh()
            index = self._index.get(part, {})
            new = list(
                {digest: i for i, digest in enumerate(digests) if digest not in index}.values()
            )
            most = limit // _SHELVES_IN_LIMIT - space_for(part, 0)
            step = max(1, most // (space_for(part, 1) - space_for(part, 0)))
            for start in range(0, len(new), step):
                chosen = new[start : start + step]
                n_bytes = space_for(part, len(chosen))
                shelf = self._shelf_for(n_bytes, limit // _SHELVES_IN_LIMIT)
                if self._make_room(n_bytes, limit):
                    self._append(shelf, part, [digests[i] for i in chosen], rows[chosen])

    def _append(self, shelf: Shelf, part: Part, digests: list[bytes], rows: np.ndarray) -> None:
        try:
            record = shelf.append(part, digests, np.ascontiguousarray(rows, "<f4"))
        except BaseException:
            # Full disk or Ctrl-C: whoever writes here next begins after the last whole record.
            self._let_go()
            raise
        self._add(record)
        self._note_use({shelf})

    def _shelf_for(self, n_bytes: int, shelf_limit: int) -> Shelf:
        """Find a shelf to write to, of ours, of a process that has ended, or a new one."""
        if self._ours is not None:
            if not self._distrusted and _fits(self._ours, n_bytes, shelf_limit):
                return self._ours
            self._let_go()
        # A new shelf is read last, so what is there twice is taken from where it is sound.
        for shelf in [] if self._distrusted else self._whole_shelves():
            if _fits(shelf, n_bytes, shelf_limit) and shelf.lock():
                self._scan(shelf)
                if _fits(shelf, n_bytes, shelf_limit):
                    self._ours = shelf
                    return shelf
                shelf.unlock()
        self._ours = self._new_shelf()
        self._distrusted = False
        return self._ours

    def _new_shelf(self) -> Shelf:
        numbers = [int(name.split("-")[0]) for name in self._shelves]
        while True:
            name = f"{max(numbers, default=0) + 1:08}-{uuid.uuid4().hex[:8]}.shelf"
            shelf = Shelf.create(self._folder / name)
            self._shelves[name] = shelf
            if shelf.lock():  # else another process was quicker to find a use for it
                return shelf

    def _let_go(self) -> None:
        if self._ours is not None:
            self._ours.unlock()
            self._ours = None

    # Making room

    def _note_use(self, used: set[Shelf]) -> None:
        """Tell the store's clock, which counts uses, since a machine's clock may jump."""
        times = {shelf: shelf.last_use for shelf in self._whole_shelves()}
        now = max(times.values(), default=0)
        if any(time == now and shelf not in used for shelf, time in times.items()):
            now += 1
        for shelf in used:
            if times.get(shelf) != now:
                shelf.touch(now)

    def _make_room(self, n_bytes: int, limit: int) -> bool:
        """Remove the shelves used longest ago until ``n_bytes`` more fit; say whether they do."""
        sizes = {shelf: shelf.size for shelf in self._whole_shelves()}
        free = limit - sum(sizes.values())
        victims = sorted(sizes.keys() - {self._ours}, key=lambda shelf: shelf.last_use)
        for shelf in victims:
            if free >= n_bytes:
                break
            self._remove(shelf)
            free += sizes[shelf]
        self._forget_shelves()
        return free >= n_bytes

    def _remove(self, shelf: Shelf) -> None:
        self._shelves.pop(shelf.path.name)
        shelf.path.unlink(missing_ok=True)

    def shrink(self, limit: int) -> None:
        """Make the folder no larger than ``limit`` bytes."""
        with self._lock:
            self._refresh()
            self._let_go()
            self._make_room(0, limit)

    def clear(self) -> None:
        """Remove every shelf of this format."""
        self.shrink(0)
        for path in self._folder.glob("*.new"):
            path.unlink(missing_ok=True)

    def count(self) -> tuple[int, dict[str, int]]:
        """Count bytes, and entries by the name of their model."""
        with self._lock:
            self._refresh()
            models: Counter[str] = Counter()
            for part, index in self._index.items():
                models[part.label] += len(index) * len(part.keys)
            return sum(shelf.size for shelf in self._whole_shelves()), dict(+models)


def _fits(shelf: Shelf, n_bytes: int, shelf_limit: int) -> bool:
    return not shelf.damaged and (shelf.is_empty or shelf.end + n_bytes <= shelf_limit)


def _open(path: Path) -> Shelf | None:
    try:
        return Shelf(path)
    except (FileNotFoundError, ValueError):  # just removed; of another format
        return None
