"""A folder of shelves: rows read from them, written to them, and room made among them."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import numpy as np

from skspin._store.fork import renew_in_child
from skspin._store.part import Part
from skspin._store.places import Place, new_name, note_use, places_in
from skspin._store.request import Overlap, Request
from skspin._store.shelf import DamagedShelf, Shelf, size_of

_SHELVES_IN_LIMIT = 16  # room is made by whole shelves, so this is how finely
_CHUNK_BYTES = 1 << 20  # of rows copied at a time, to be checked while in the CPU's cache

Reread = Callable[[Part, list[bytes], np.ndarray], None]


class Shelves:
    """Rows on disk.

    Threads and processes may share a folder. Each process knows where the texts are that it may be
    asked for, and whenever it is used, learns of those that others have added since.

    Parameters
    ----------
    folder : Path
        Exists and holds nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ours: dict[Part, Shelf] = {}  # those that this process writes to
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Begin without lock, files and knowledge, as in a new process."""
        for shelf in self._ours.values():
            shelf.unlock()
        self._ours = {}
        self._lock = threading.RLock()
        self._shelves: dict[str, Shelf | None] = {}  # by name; None for one that is damaged
        self._foreign: set[str] = set()  # of another format, and so not ours to touch
        self._distrusted: set[Part] = set()  # parts whose next row goes to a new shelf

    # What is there

    def _refresh(self) -> dict[str, Place]:
        """Learn which shelves there are."""
        places = places_in(self._folder)
        for name in self._shelves.keys() - places.keys():
            self._drop(name)
        for name in sorted(places.keys() - self._shelves.keys() - self._foreign):
            with suppress(FileNotFoundError):  # not whole yet, or no longer
                self._shelves[name] = self._open(name)
        return places

    def _open(self, name: str) -> Shelf | None:
        try:
            return Shelf(self._folder / name)
        except DamagedShelf as error:
            _warn(error)
        except ValueError:
            self._foreign.add(name)
        return None

    def _shelves_of(self, wanted: Callable[[Part], bool]) -> Iterator[Shelf]:
        """Go through the shelves of some parts, each brought up to date.

        The latest comes first, so that a row is found before a damaged one that it replaces.
        """
        for name in sorted(self._shelves, reverse=True):
            shelf = self._shelves[name]
            if shelf is not None and wanted(shelf.part):
                try:
                    shelf.refresh()
                except FileNotFoundError:  # another process has just removed it
                    continue
                except DamagedShelf as error:
                    _warn(error)
                yield shelf

    def _drop(self, name: str) -> None:
        shelf = self._shelves.pop(name, None)
        if shelf is not None and self._ours.get(shelf.part) is shelf:
            self._release(shelf.part)

    def _release(self, part: Part) -> None:
        shelf = self._ours.pop(part, None)
        if shelf is not None:
            shelf.unlock()

    # Reading

    def fill(self, request: Request, reread: Reread) -> None:
        """Fill in what is here and not yet found.

        Rows that this process has read before are also given to ``reread``, all their columns.
        """
        with self._lock:
            places = self._refresh()
            shelves = list(self._shelves_of(lambda part: part.context == request.context))
        used = set()
        for shelf in shelves:
            overlap = request.overlap(shelf.part)
            if overlap is None:
                continue
            lacking = request.lacking(overlap)
            known = map(shelf.numbers.get, request.texts_at(lacking), repeat(-1))
            numbers = np.fromiter(known, np.int64, len(lacking))
            here = numbers >= 0
            numbers, positions = numbers[here], lacking[here]
            if len(numbers):
                used.add(shelf.name)
                sound = self._copy(shelf, numbers, request, positions, overlap)
                request.mark(positions[sound], overlap)
                again = sound & shelf.note_read(numbers)
                self._bring_forward(
                    shelf, numbers[again], request.texts_at(positions[again]), reread
                )
        note_use(self._folder, used, places)

    def _copy(
        self,
        shelf: Shelf,
        numbers: np.ndarray,
        request: Request,
        positions: np.ndarray,
        overlap: Overlap,
    ) -> np.ndarray:
        """Copy rows of a shelf to where the request wants them; say which are sound."""
        out = request.out
        texts = request.texts_at(positions)
        sound = np.empty(len(numbers), bool)
        buffer = np.empty((_rows_in_chunk(shelf), shelf.part.n_columns), "<f4")
        # A damaged row must not be copied over something sound that was found before.
        straight = request.takes_rows_of(shelf.part, overlap) and not request.found[positions].any()
        for start in range(0, len(numbers), len(buffer)):
            chunk = slice(start, start + len(buffer))
            to = positions[chunk]
            if straight and to[-1] - to[0] == len(to) - 1:
                rows = out[to[0] : to[-1] + 1]
                sound[chunk] = shelf.take(numbers[chunk], texts[chunk], rows)
                continue
            rows = buffer[: len(to)]
            sound[chunk] = good = shelf.take(numbers[chunk], texts[chunk], rows)
            for source, target in overlap.copies:
                out[to[good], target] = rows[good, source]
        if not sound.all():
            self._discard(shelf, request.texts_at(positions[~sound]))
        return sound

    def _bring_forward(
        self, shelf: Shelf, numbers: np.ndarray, texts: list[bytes], reread: Reread
    ) -> None:
        """Hand on rows that this process keeps asking for."""
        step = _rows_in_chunk(shelf)
        for start in range(0, len(numbers), step):
            chunk = slice(start, start + step)
            rows = np.empty((len(texts[chunk]), shelf.part.n_columns), "<f4")
            if shelf.take(numbers[chunk], texts[chunk], rows).all():
                reread(shelf.part, texts[chunk], rows)

    def _discard(self, shelf: Shelf, digests: list[bytes]) -> None:
        """Forget texts whose rows are not what was written."""
        with self._lock:
            for digest in digests:
                shelf.numbers.pop(digest, None)
            self._distrusted.add(shelf.part)
        _warn(f"The activations of {len(digests)} texts in {self._folder / shelf.name} are damaged")

    # Writing

    def put(self, part: Part, digests: Sequence[bytes], rows: np.ndarray, limit: int) -> None:
        """Keep the rows that are not here yet, in ``limit`` bytes altogether."""
        with self._lock:
            self._refresh()
            new = {digest: i for i, digest in enumerate(digests)}  # each text once
            for shelf in self._shelves_of(lambda other: other == part):
                new = {digest: i for digest, i in new.items() if digest not in shelf.numbers}
            most = max(1, limit // _SHELVES_IN_LIMIT // size_of(part, 1))  # rows in a shelf
            texts, chosen = list(new), list(new.values())
            for start in range(0, len(new), most):
                chunk = slice(start, start + most)
                values = np.ascontiguousarray(rows[chosen[chunk]], "<f4")
                self._append(part, texts[chunk], values, limit, most)

    def _append(
        self, part: Part, digests: list[bytes], rows: np.ndarray, limit: int, most: int
    ) -> None:
        shelf = self._shelf_for(part, len(rows), most)
        places = self._make_room(size_of(part, len(rows)), limit, shelf)
        if places is None:
            return
        try:
            shelf.append(digests, rows)
        except FileNotFoundError:  # another process has just removed it to make room
            self._drop(shelf.name)
        except BaseException:  # a full disk, or Ctrl-C
            self._release(part)  # whoever writes here next begins after the last whole row
            raise
        else:
            note_use(self._folder, {shelf.name}, places)

    def _shelf_for(self, part: Part, n_rows: int, most: int) -> Shelf:
        """Find a shelf to write to: ours, that of a process that has ended, or a new one."""

        def fits(shelf: Shelf) -> bool:
            return shelf.n_rows + n_rows <= most

        if part in self._ours:
            if part not in self._distrusted and fits(self._ours[part]):
                return self._ours[part]
            self._release(part)
        if part not in self._distrusted:
            for shelf in self._shelves_of(lambda other: other == part):
                if fits(shelf) and shelf.lock():
                    shelf.refresh()  # of what was written before we had the lock
                    self._ours[part] = shelf
                    if fits(shelf):
                        return shelf
                    self._release(part)
        self._ours[part] = self._new_shelf(part)
        self._distrusted.discard(part)
        return self._ours[part]

    def _new_shelf(self, part: Part) -> Shelf:
        while True:
            name = new_name(self._shelves)
            shelf = self._shelves[name] = Shelf.create(self._folder / name, part)
            if shelf.lock(is_new=True):  # else another process was quicker to take it
                return shelf

    # Making room

    def _make_room(
        self, n_bytes: int, limit: int, wanted: Shelf | None = None
    ) -> dict[str, Place] | None:
        """Remove what was used longest ago until ``n_bytes`` more fit; None if they cannot."""
        places = self._refresh()
        for name in self._foreign:
            places.pop(name, None)
        free = limit - sum(place.size for place in places.values())
        for name, place in sorted(places.items(), key=lambda item: item[1].last_use):
            if free < n_bytes and (wanted is None or name != wanted.name):
                with suppress(PermissionError):  # Windows keeps files that somebody has open
                    for path in sorted(place.paths):  # rows before texts, which we still find
                        path.unlink(missing_ok=True)
                    self._drop(name)
                    free += place.size
        return places if free >= n_bytes else None

    def shrink(self, limit: int) -> None:
        """Make the folder no larger than ``limit`` bytes."""
        with self._lock:
            self._refresh()
            self._make_room(0, limit)

    def count(self) -> tuple[int, dict[str, int]]:
        """Count bytes, and texts times segments by the name of their model."""
        with self._lock:
            places = self._refresh()
            models: Counter[str] = Counter()
            for shelf in self._shelves_of(lambda part: True):
                models[shelf.part.label] += len(shelf.numbers) * len(shelf.part.keys)
            return sum(place.size for place in places.values()), dict(+models)


def _rows_in_chunk(shelf: Shelf) -> int:
    return max(1, _CHUNK_BYTES // shelf.part.row_bytes)


def _warn(trouble: object) -> None:
    warnings.warn(f"{trouble}; what is missing will be computed again.", stacklevel=2)
