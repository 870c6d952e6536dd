"""Segments that were written together, and what they have in common with those asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from skspin._digest import text_digest
from skspin._layout import Layout, Segment


@dataclass(frozen=True)
class Overlap:
    """Where the columns of a stored row belong in the caller's rows.

    Parameters
    ----------
    asked : ndarray of shape (n_common,), int
        The segments asked for that the stored row has.
    copies : tuple of pairs of slices
        From the stored row's columns to the caller's; neighbours are copied as one.
    """

    asked: np.ndarray
    copies: tuple[tuple[slice, slice], ...]

    def is_all_of(self, part: Part, out: np.ndarray) -> bool:
        """Whether the stored rows, as they are, are the caller's rows."""
        n_columns = part.row_bytes // 4
        whole = (slice(0, n_columns), slice(0, n_columns))
        contiguous = out.dtype == "<f4" and out.strides[1] == 4
        return contiguous and out.shape[1] == n_columns and self.copies == (whole,)

    def lacking(self, found: np.ndarray) -> np.ndarray:
        """List the rows of ``found`` to which this could add something."""
        return np.flatnonzero(~found[:, self.asked].all(axis=1))


@dataclass(frozen=True)
class Part:
    """Segments that were written together: side by side in one stored row for each text.

    Texts come from a model with all segments of a call at once, so one row for all of them is far
    faster to write and to read than a row each, and any of them can still be read alone.

    Parameters
    ----------
    context : str
        Everything but text and segment that decides the numbers.
    keys, widths : tuples
        Each segment's key and number of columns.
    model : str
        For people to see; two parts that differ only here are one.
    """

    context: str
    keys: tuple[str, ...]
    widths: tuple[int, ...]
    model: str = field(default="", compare=False)

    @classmethod
    def of(cls, context: str, segments: Sequence[Segment], model: str) -> Part:
        """Describe a call's segments."""
        keys = tuple(segment.key for segment in segments)
        return cls(context, keys, tuple(segment.width for segment in segments), model)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name this part."""
        return text_digest(json.dumps([self.context, self.keys, self.widths]))

    @property
    def label(self) -> str:
        """What to show people: the model's name where it was given."""
        return self.model or self.context

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one stored row, float32."""
        return 4 * sum(self.widths)

    def to_json(self) -> bytes:
        """Write down everything."""
        return json.dumps([self.context, self.keys, self.widths, self.model]).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Part:
        """Read what `to_json` wrote."""
        context, keys, widths, model = json.loads(text)
        return cls(context, tuple(keys), tuple(widths), model)

    def overlap(self, segments: Sequence[Segment]) -> Overlap | None:
        """Find the segments asked for that are here, None if there are none."""
        ends = np.cumsum([0, *self.widths]).tolist()
        stored = {
            key: slice(start, stop)
            for key, start, stop in zip(self.keys, ends, ends[1:], strict=False)
        }
        pairs = {
            index: (stored[segment.key], columns)
            for index, (segment, columns) in enumerate(
                zip(segments, Layout(tuple(segments)).slices, strict=True)
            )
            if segment.key in stored
        }
        return Overlap(np.array(list(pairs)), _joined(list(pairs.values()))) if pairs else None


def _joined(pairs: list[tuple[slice, slice]]) -> tuple[tuple[slice, slice], ...]:
    """Join pairs that are neighbours on both sides, in order."""
    joined: list[tuple[slice, slice]] = []
    for source, target in pairs:
        if joined and joined[-1][0].stop == source.start and joined[-1][1].stop == target.start:
            before = joined.pop()
            source = slice(before[0].start, source.stop)
            target = slice(before[1].start, target.stop)
        joined.append((source, target))
    return tuple(joined)
