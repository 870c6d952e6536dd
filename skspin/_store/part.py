"""Segments that were written together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from skspin._layout import Segment
from skspin._store.digest import text_digest


@dataclass(frozen=True)
class Part:
    """Segments that were written together: side by side in one stored row for each text.

    All segments of a call come from the model at once, so one row for all of them is far faster to
    write and to read than a row each, and any of them can still be read alone.

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

    @cached_property
    def columns(self) -> dict[str, slice]:
        """The columns of each segment in a stored row, by key."""
        ends = np.cumsum([0, *self.widths]).tolist()
        slices = (slice(a, b) for a, b in zip(ends, ends[1:], strict=False))
        return dict(zip(self.keys, slices, strict=True))

    @cached_property
    def n_columns(self) -> int:
        """Number of columns of a stored row."""
        return sum(self.widths)

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row, float32."""
        return 4 * self.n_columns

    @property
    def label(self) -> str:
        """What to show people: the model's name, where it was given."""
        return self.model or self.context

    def to_json(self) -> bytes:
        """Write down everything."""
        return json.dumps([self.context, self.keys, self.widths, self.model]).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Part:
        """Read what `to_json` wrote."""
        context, keys, widths, model = json.loads(text)
        return cls(context, tuple(keys), tuple(widths), model)
