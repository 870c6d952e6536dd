"""Which column is which, and the array that carries that knowledge.

A matrix of activations is a row of *segments*: the neurons of one layer, at one site, under one
pooling, in consecutive columns. A `Layout` is that row. It names the columns, finds them again from
their names, and tells which of them one probe sees together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

# Every name that a segment may have; all other tables of them are keyed by these.
SITES = ("hidden", "mlp", "attention")
POOLINGS = ("mean", "max", "first", "last")
STACKS = ("encoder", "decoder")

_NAME = re.compile(
    r"(?:(?P<stack>encoder|decoder)_)?layer(?P<layer>\d+)_(?P<site>[a-z]+)_(?P<pooling>[a-z]+)"
    r"_(?P<neuron>\d+)"
)


@dataclass(frozen=True)
class Segment:
    """The neurons of one layer, at one site, under one pooling."""

    stack: str | None  # of an encoder-decoder model; None for a model that has one stack
    layer: int  # 0 for the embeddings, i for what is found in or after block i
    site: str
    pooling: str
    width: int  # number of neurons that the model has here
    neurons: tuple[int, ...] | None = None  # those that have a column; None for all of them

    @property
    def key(self) -> str:
        """What decides this segment's numbers, given a model and a text; e.g. ``"3/mlp/mean"``."""
        place = f"{self.layer}/{self.site}/{self.pooling}"
        return place if self.stack is None else f"{self.stack}/{place}"

    @property
    def n_columns(self) -> int:
        """Number of columns: all neurons, or those that are kept."""
        return self.width if self.neurons is None else len(self.neurons)


@dataclass(frozen=True)
class LayerColumns:
    """The columns that one probe sees: one layer at one site, under all its poolings."""

    name: str
    layer: int
    columns: slice

    @property
    def n_columns(self) -> int:
        """Number of columns of this layer."""
        return self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Layout:
    """The columns of an activation matrix, in order."""

    segments: tuple[Segment, ...]

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The columns of each segment."""
        ends = np.cumsum([0, *(segment.n_columns for segment in self.segments)]).tolist()
        return tuple(slice(a, b) for a, b in zip(ends, ends[1:], strict=False))

    @property
    def n_columns(self) -> int:
        """Number of columns altogether."""
        return self.slices[-1].stop if self.segments else 0

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        # One stack needs no prefix; with two, each name says which half of the model it is from.
        several = len({segment.stack for segment in self.segments}) > 1
        return tuple(f"{s.stack}_" if several and s.stack else "" for s in self.segments)

    def feature_names(self) -> np.ndarray:
        """Name every column, e.g. ``layer3_hidden_mean_412``."""
        names = [
            f"{prefix}layer{s.layer}_{s.site}_{s.pooling}_{neuron}"
            for prefix, s in zip(self._prefixes, self.segments, strict=True)
            for neuron in (range(s.width) if s.neurons is None else s.neurons)
        ]
        return np.asarray(names, dtype=object)

    def layers(self) -> list[LayerColumns]:
        """List what one probe sees at a time, in column order."""
        named = [
            (f"{prefix}layer{s.layer}_{s.site}", s.layer, columns)
            for prefix, s, columns in zip(self._prefixes, self.segments, self.slices, strict=True)
        ]
        layers = []
        for (name, layer), members in groupby(named, key=lambda row: row[:2]):
            columns = [row[2] for row in members]
            layers.append(LayerColumns(name, layer, slice(columns[0].start, columns[-1].stop)))
        return layers

    def keep(self, support: np.ndarray) -> Layout:
        """Drop the columns where ``support`` is False, and the segments that are left empty."""
        kept = []
        for segment, columns in zip(self.segments, self.slices, strict=True):
            neurons = np.arange(segment.width) if segment.neurons is None else segment.neurons
            chosen = tuple(np.asarray(neurons)[support[columns]].tolist())
            if chosen:
                kept.append(_with_neurons(segment, chosen))
        return Layout(tuple(kept))

    @classmethod
    def from_feature_names(cls, names: Sequence[Any]) -> Layout | None:
        """Read a layout off column names; None if any of them is not an activation's name."""
        matches = [_NAME.fullmatch(name) if isinstance(name, str) else None for name in names]
        if not matches or any(match is None for match in matches):
            return None
        places = [match.groups() for match in matches if match is not None]
        segments = []
        for place, members in groupby(places, key=lambda groups: groups[:4]):
            stack, layer, site, pooling = place
            neurons = tuple(int(groups[4]) for groups in members)
            # The width is unknown: it is at least what holds these neurons.
            bare = Segment(stack, int(layer), site, pooling, max(neurons) + 1)
            segments.append(_with_neurons(bare, neurons))
        return cls(tuple(segments))

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Layout:
        """Lay out a plain matrix whose layers are ``sizes`` columns wide, one after another."""
        return cls(
            tuple(Segment(None, layer, "input", "none", size) for layer, size in enumerate(sizes))
        )


def _with_neurons(segment: Segment, neurons: tuple[int, ...]) -> Segment:
    everything = neurons == tuple(range(segment.width))
    return Segment(
        segment.stack,
        segment.layer,
        segment.site,
        segment.pooling,
        segment.width,
        None if everything else neurons,
    )


class ActivationArray(np.ndarray):
    """A plain 2-D array that also says which column is which, as long as that stays true.

    Choosing rows keeps the layout. Whatever may change columns or values (choosing columns,
    arithmetic, a scaler) gives an array without one, because a layout that is silently wrong is
    worse than none.
    """

    layout: Layout | None  # None where the columns are no longer known

    def __new__(cls, values: np.ndarray, layout: Layout | None) -> ActivationArray:
        """View ``values`` of shape (n_texts, n_columns) as an array that carries ``layout``."""
        array = np.asarray(values).view(cls)
        array.layout = layout
        return array

    def __array_finalize__(self, source: Any) -> None:
        """Start every derived array without a layout; the row operations below give it back."""
        self.layout = None

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """Return plain arrays and scalars from arithmetic."""
        return np.asarray(array)[()]  # a scalar where there is no dimension left

    def __getitem__(self, key: Any) -> Any:
        """Index as NumPy does; the layout stays where only rows were chosen."""
        chosen = np.asarray(self)[key]
        return ActivationArray(chosen, self.layout) if _chooses_rows(key) else chosen

    def take(self, indices: Any, axis: Any = None, out: Any = None, mode: Any = "raise") -> Any:
        """Take rows (axis 0) with the layout, anything else without."""
        taken = np.asarray(self).take(indices, axis=axis, out=out, mode=mode)
        by_rows = axis in (0, -2) and taken.ndim == 2
        return ActivationArray(taken, self.layout) if by_rows else taken

    def copy(self, order: Any = "C") -> ActivationArray:
        """Copy values and layout."""
        return ActivationArray(np.asarray(self).copy(order), self.layout)

    def sort(self, *args: Any, **kwargs: Any) -> None:
        """Sort in place; columns are then no longer what they were."""
        super().sort(*args, **kwargs)
        self.layout = None

    def __copy__(self) -> ActivationArray:
        """Copy values and layout."""
        return self.copy()

    def __deepcopy__(self, memo: Any) -> ActivationArray:
        """Copy values and layout."""
        return self.copy()

    def __reduce__(self) -> Any:
        """Pickle as a plain array beside its layout."""
        return ActivationArray, (np.asarray(self), self.layout)


def _chooses_rows(key: Any) -> bool:
    """Whether an index touches only rows: ``X[rows]``, ``X[rows, :]`` or ``X[rows, ...]``."""
    rows, *rest = key if isinstance(key, tuple) else (key,)
    several = isinstance(rows, slice) or np.ndim(rows) == 1  # neither one row, nor a 2-D mask
    return several and all(
        part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in rest
    )


def layout_of(X: Any) -> Layout | None:
    """Find the layout that ``X`` carries: on the array itself, or in a frame's column names."""
    if isinstance(X, ActivationArray):
        return X.layout
    columns = getattr(X, "columns", None)
    return None if columns is None else Layout.from_feature_names(list(columns))
