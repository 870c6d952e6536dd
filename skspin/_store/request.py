"""What a caller asks a store for, and how far it has been filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skspin._layout import Layout, Segment
from skspin._store.digest import text_digests
from skspin._store.part import Part


@dataclass(frozen=True, eq=False)
class Overlap:
    """Where the columns of a stored row belong in the caller's rows.

    Parameters
    ----------
    asked : ndarray of shape (n_common,), int
        The segments asked for that the stored row has.
    copies : list of pairs of slices
        From the stored row's columns to the caller's; neighbours are copied as one.
    """

    asked: np.ndarray
    copies: list[tuple[slice, slice]]


@dataclass(frozen=True, eq=False)
class Request:
    """Texts and segments asked for, and the caller's array.

    Parameters
    ----------
    context : str
        Everything but text and segment that decides the numbers.
    digests : list of bytes, length n_texts
        The texts.
    segments : tuple of Segment, length n_segments
        The columns of `out`.
    out : ndarray of shape (n_texts, n_columns), float32
        The caller's rows.
    found : ndarray of shape (n_texts, n_segments), bool
        Which parts of `out` are filled in.
    """

    context: str
    digests: list[bytes]
    segments: tuple[Segment, ...]
    out: np.ndarray
    found: np.ndarray

    @classmethod
    def of(
        cls, context: str, texts: Sequence[str], segments: Sequence[Segment], out: np.ndarray
    ) -> Request:
        """Begin with nothing found."""
        found = np.zeros((len(texts), len(segments)), dtype=bool)
        return cls(context, text_digests(texts), tuple(segments), out, found)

    def overlap(self, part: Part) -> Overlap | None:
        """Find what a part has of what is asked for; None if that is nothing."""
        stored = part.columns
        common = [
            (index, stored[segment.key], columns)
            for index, (segment, columns) in enumerate(
                zip(self.segments, Layout(self.segments).slices, strict=True)
            )
            if segment.key in stored
        ]
        if not common:
            return None
        copies: list[tuple[slice, slice]] = []
        for _, source, target in common:
            if copies and (copies[-1][0].stop, copies[-1][1].stop) == (source.start, target.start):
                before = copies.pop()
                source = slice(before[0].start, source.stop)
                target = slice(before[1].start, target.stop)
            copies.append((source, target))
        return Overlap(np.array([index for index, _, _ in common]), copies)

    def lacking(self, overlap: Overlap) -> np.ndarray:
        """List the positions of texts for which a part could add something."""
        return np.flatnonzero(~self.found[:, overlap.asked].all(axis=1))

    def texts_at(self, positions: np.ndarray) -> list[bytes]:
        """Return the digests of some texts."""
        return [self.digests[i] for i in positions.tolist()]

    def mark(self, positions: np.ndarray, overlap: Overlap) -> None:
        """Note that these texts have been filled in as far as a part has them."""
        self.found[positions[:, None], overlap.asked] = True

    def takes_rows_of(self, part: Part, overlap: Overlap) -> bool:
        """Whether the stored rows, as they are, are the caller's rows."""
        whole = slice(0, part.n_columns)
        return (
            overlap.copies == [(whole, whole)]
            and self.out.shape[1] == part.n_columns
            and self.out.dtype == "<f4"
            and self.out.flags.c_contiguous
        )
