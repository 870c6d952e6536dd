"""What lies where on disk, as far as this process knows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from skspin._store.part import Part
from skspin._store.shelf import Record, Shelf


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one record that are read together.

    Parameters
    ----------
    record : Record
        Where they are.
    rows : ndarray of shape (n_rows,), int
        Their numbers in the record, ascending.
    positions : ndarray of shape (n_rows,), int
        The positions of their texts in what the caller asked for.
    """

    record: Record
    rows: np.ndarray
    positions: np.ndarray

    def runs(self) -> Iterator[tuple[int, int]]:
        """Cut the group where its rows are not neighbours."""
        cuts = (np.flatnonzero(np.diff(self.rows) != 1) + 1).tolist()
        return zip([0, *cuts], [*cuts, len(self.rows)], strict=True)


class Index:
    """Records, and in which of them each text's latest row is.

    Rows are numbered through, in the order in which their records were added.
    """

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._starts: list[int] = []  # number of each record's first row
        self._n_rows = 0
        self._numbers: dict[Part, dict[bytes, int]] = {}  # by part and text

    def add(self, record: Record) -> None:
        """Learn of a record, whose rows replace those that are known of the same texts."""
        numbers = range(self._n_rows, self._n_rows + len(record.digests))
        self._records.append(record)
        self._starts.append(numbers.start)
        self._n_rows = numbers.stop
        self._numbers.setdefault(record.part, {}).update(zip(record.digests, numbers, strict=True))

    def only(self, shelves: Container[Shelf]) -> Index:
        """Make an index without the records of other shelves."""
        index = Index()
        for record in self._records:
            if record.shelf in shelves:
                index.add(record)
        return index

    def discard(self, record: Record, rows: Sequence[int]) -> None:
        """Forget rows of a record."""
        numbers = self._numbers.get(record.part, {})
        for row in rows:
            numbers.pop(record.digests[row], None)

    def parts(self, context: str) -> list[Part]:
        """List what there is for a context."""
        return [part for part in self._numbers if part.context == context]

    def lacking(self, part: Part, digests: Sequence[bytes]) -> list[int]:
        """List the positions of texts that have no row, each text once."""
        numbers = self._numbers.get(part, {})
        return list({text: i for i, text in enumerate(digests) if text not in numbers}.values())

    def locate(
        self, part: Part, digests: Sequence[bytes], positions: np.ndarray, most: int
    ) -> list[Group]:
        """Find the rows of some texts, in the order in which they lie, at most ``most`` a group."""
        asked = [digests[i] for i in positions.tolist()]
        known = map(self._numbers.get(part, {}).get, asked, repeat(-1))
        numbers = np.fromiter(known, np.int64, len(asked))
        order = np.argsort(numbers)
        order = order[np.searchsorted(numbers, 0, sorter=order) :]  # -1 for those that are not here
        numbers, positions = numbers[order], positions[order]
        groups, start = [], 0
        while start < len(numbers):
            place = bisect_right(self._starts, numbers[start]) - 1
            record, first = self._records[place], self._starts[place]
            stop = int(np.searchsorted(numbers, first + len(record.digests)))
            stop = min(stop, start + most)
            groups.append(Group(record, numbers[start:stop] - first, positions[start:stop]))
            start = stop
        return groups

    def entries(self) -> dict[str, int]:
        """Count texts times segments by the name of their model."""
        counts: dict[str, int] = {}
        for part, numbers in self._numbers.items():
            counts[part.label] = counts.get(part.label, 0) + len(numbers) * len(part.keys)
        return counts
