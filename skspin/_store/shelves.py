"""A folder of shelves: rows read from them, written to them, and room made among them."""

from __future__ import annotations

import os
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import joblib
import numpy as np

from skspin._fork import renew_in_child
from skspin._layout import Segment
from skspin._store.index import Group, Index
from skspin._store.part import Overlap, Part
from skspin._store.shelf import DamagedShelf, Shelf, checksum, space_for

_NAME = re.compile(r"(\d{8,})-[0-9a-f]{8}\.shelf")
_SHELVES_IN_LIMIT = 16  # room is made by whole shelves, so this is how finely
_GROUP_BYTES = 1 << 20  # that are read at a time, to be checked while in the CPU's cache
_GROUPS_PER_THREAD = 8  # that are worth the start of a thread
_MOST_THREADS = 4

Reread = Callable[[Part, list[bytes], list[np.ndarray]], None]


class Shelves:
    """Rows on disk.

    Threads and processes may share a folder. Every process has its own index of what lies where,
    and brings it up to date whenever it is used, by reading the heads of what is new.

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
        """Begin without lock, files and index, as in a new process."""
        self._lock = threading.RLock()
        self._shelves: dict[str, Shelf | None] = {}  # by file name; None if of another format
        self._index = Index()
        self._ours: Shelf | None = None  # the one that this process writes to
        self._repairing = False  # whether what is written next replaces what is damaged

    def _known(self) -> list[Shelf]:
        return [shelf for shelf in self._shelves.values() if shelf is not None]

    def _refresh(self) -> None:
        """Learn what other processes have written and removed."""
        names = sorted(name for name in os.listdir(self._folder) if _NAME.fullmatch(name))
        gone = self._shelves.keys() - set(names)
        if gone:
            self._drop([self._shelves[name] for name in gone])
        for name in names:
            if name not in self._shelves:
                self._shelves[name] = _open(self._folder / name)
        for shelf in self._known():
            if shelf is not self._ours:
                self._scan(shelf)

    def _drop(self, shelves: Sequence[Shelf | None]) -> None:
        """Forget shelves that are no longer there."""
        self._shelves = {name: s for name, s in self._shelves.items() if s not in shelves}
        self._index = self._index.only(set(self._known()))
        if self._ours in shelves:
            self._ours = None

    def _scan(self, shelf: Shelf) -> None:
        if shelf.damaged:
            return
        try:
            for record in shelf.scan():
                self._index.add(record)
        except DamagedShelf as error:
            self._repairing = True
            warnings.warn(f"{error}; what was there will be computed again.", stacklevel=2)

    # Reading

    def fill(
        self,
        context: str,
        digests: Sequence[bytes],
        segments: Sequence[Segment],
        out: np.ndarray,
        found: np.ndarray,
        reread: Reread,
    ) -> None:
        """Fill in what is here and not yet found.

        Rows that were read before are also given to ``reread``, all columns of their part.
        """
        with self._lock:
            self._refresh()
            parts = self._index.parts(context)
        used: set[Shelf] = set()
        for part in parts:
            overlap = part.overlap(segments)
            if overlap is None:
                continue
            lacking = overlap.lacking(found)
            with self._lock:
                groups = self._index.locate(
                    part, digests, lacking, max(1, _GROUP_BYTES // part.row_bytes)
                )
            # Damaged rows must not go where something sound was filled in before.
            straight = overlap.is_all_of(part, out) and not found[lacking].any()
            load = partial(self._load, digests, overlap, straight, out, found, reread)
            _for_each(load, groups)
            used.update(group.record.shelf for group in groups)
        with self._lock:
            self._note_use(used)

    def _load(
        self,
        digests: Sequence[bytes],
        overlap: Overlap,
        straight: bool,
        out: np.ndarray,
        found: np.ndarray,
        reread: Reread,
        group: Group,
    ) -> None:
        """Fill in one group, reading straight into ``out`` if that has the rows' columns."""
        record, positions = group.record, group.positions
        buffer = np.empty((0 if straight else len(positions), record.part.row_bytes // 4), "<f4")
        rows = [out[i] for i in positions.tolist()] if straight else list(buffer)
        sound = self._read(group, rows)
        if not straight:
            for source, target in overlap.copies:
                out[positions[sound], target] = buffer[sound, source]
        found[np.ix_(positions[sound], overlap.asked)] = True
        again = np.flatnonzero(sound & record.was_read[group.rows]).tolist()
        if again:
            texts = [digests[i] for i in positions[again].tolist()]
            reread(record.part, texts, [rows[i] for i in again])
        record.was_read[group.rows] = True

    def _read(self, group: Group, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Read a group's rows and say which of them are what was written."""
        record = group.record
        for start, stop in group.runs():
            record.read(int(group.rows[start]), rows[start:stop])
        sound = np.array(list(map(checksum, rows)), np.uint64) == record.checksums[group.rows]
        if not sound.all():
            damaged = group.rows[~sound].tolist()
            with self._lock:
                self._index.discard(record, damaged)
                self._repairing = True
            warnings.warn(
                f"The activations of {len(damaged)} texts in {record.shelf.path} are damaged and "
                "will be computed again.",
                stacklevel=2,
            )
        return sound

    # Writing

    def put(self, part: Part, digests: Sequence[bytes], rows: np.ndarray, limit: int) -> None:
        """Keep the rows that are not here yet, in ``limit`` bytes altogether."""
        with self._lock:
            self._refresh()
            new = self._index.lacking(part, digests)
            one, none = space_for(part, 1), space_for(part, 0)
            step = max(1, (limit // _SHELVES_IN_LIMIT - none) // (one - none))
            for start in range(0, len(new), step):
                chosen = new[start : start + step]
                values = np.ascontiguousarray(rows[chosen], "<f4")
                self._append(part, [digests[i] for i in chosen], values, limit)

    def _append(self, part: Part, digests: list[bytes], rows: np.ndarray, limit: int) -> None:
        n_bytes = space_for(part, len(rows))
        shelf = self._shelf_for(n_bytes, limit // _SHELVES_IN_LIMIT)
        if not self._make_room(n_bytes, limit):
            return
        try:
            record = shelf.append(part, digests, rows)
        except BaseException:
            # A full disk or Ctrl-C: whoever writes here next begins after the last whole record.
            self._let_go()
            raise
        self._index.add(record)
        self._note_use({shelf})

    def _shelf_for(self, n_bytes: int, shelf_limit: int) -> Shelf:
        """Find a shelf to write to: ours, that of a process that has ended, or a new one."""
        # A new shelf is read last, so of two rows for one text, the one that repairs is taken.
        shelves = [] if self._repairing else self._known()
        if self._ours is not None:
            if self._ours in shelves and _fits(self._ours, n_bytes, shelf_limit):
                return self._ours
            self._let_go()
        for shelf in shelves:
            if _fits(shelf, n_bytes, shelf_limit) and shelf.lock():
                self._scan(shelf)
                if _fits(shelf, n_bytes, shelf_limit):
                    self._ours = shelf
                    return shelf
                shelf.unlock()
        self._ours = self._new_shelf()
        self._repairing = False
        return self._ours

    def _new_shelf(self) -> Shelf:
        number = 1 + max((int(name.split("-")[0]) for name in self._shelves), default=0)
        while True:
            name = f"{number:08}-{uuid.uuid4().hex[:8]}.shelf"
            shelf = self._shelves[name] = Shelf.create(self._folder / name)
            if shelf.lock():  # else another process was quicker to take it
                return shelf

    def _let_go(self) -> None:
        if self._ours is not None:
            self._ours.unlock()
            self._ours = None

    # Making room

    def _note_use(self, used: set[Shelf]) -> None:
        """Advance the store's clock, which counts uses because the machine's clock may jump."""
        times = {shelf: shelf.last_use for shelf in self._known()}
        now = max(times.values(), default=0)
        if any(time == now and shelf not in used for shelf, time in times.items()):
            now += 1
        for shelf in used:
            if times.get(shelf) != now:
                shelf.touch(now)

    def _make_room(self, n_bytes: int, limit: int) -> bool:
        """Remove the shelves used longest ago until ``n_bytes`` more fit; say whether they do."""
        sizes = {shelf: shelf.size for shelf in self._known()}
        free = limit - sum(sizes.values())
        removed: list[Shelf | None] = []
        for shelf in sorted(sizes, key=lambda shelf: shelf.last_use):
            if free < n_bytes and shelf is not self._ours:
                shelf.path.unlink(missing_ok=True)
                removed.append(shelf)
                free += sizes[shelf]
        if removed:
            self._drop(removed)
        return free >= n_bytes

    def shrink(self, limit: int) -> None:
        """Make the folder no larger than ``limit`` bytes."""
        with self._lock:
            self._refresh()
            self._let_go()
            self._make_room(0, limit)

    def clear(self) -> None:
        """Remove every shelf, and what was to become one."""
        self.shrink(0)
        for path in self._folder.glob("*.new"):
            path.unlink(missing_ok=True)

    def count(self) -> tuple[int, dict[str, int]]:
        """Count bytes, and entries by the name of their model."""
        with self._lock:
            self._refresh()
            return sum(shelf.size for shelf in self._known()), self._index.entries()


def _for_each(load: Callable[[Group], None], groups: Sequence[Group]) -> None:
    """Load groups; where there are many, in threads, since memory is filled faster by several."""
    n_threads = min(_MOST_THREADS, joblib.cpu_count(), len(groups) // _GROUPS_PER_THREAD)
    if n_threads < 2:
        for group in groups:
            load(group)
    else:
        with ThreadPoolExecutor(n_threads) as threads:
            list(threads.map(load, groups))


def _fits(shelf: Shelf, n_bytes: int, shelf_limit: int) -> bool:
    return not shelf.damaged and (shelf.is_empty or shelf.end + n_bytes <= shelf_limit)


def _open(path: Path) -> Shelf | None:
    try:
        return Shelf(path)
    except (FileNotFoundError, ValueError):  # just removed; of another format
        return None
