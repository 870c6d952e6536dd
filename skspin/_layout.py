"""Which column is which, and the array that carries that knowledge.

A matrix of activations is a row of *segments*: the neurons of one layer, at one site, under one
pooling, in consecutive columns. A `Layout` is that row. It names the columns, finds them again from
their names, and tells which of them one probe sees together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np

from skspin._system import warn

# All sites, poolings and stacks; every other table is keyed by these names.
SITES = ("hidden", "mlp", "attention")
POOLINGS = ("mean", "max", "first", "last")
STACKS = ("encoder", "decoder")

# Of a column, without its neuron: prefix, stack, layer, site, pooling.
_NAME = re.compile(r"(.+__)?((?:encoder|decoder)_)?layer(\d+)_([a-z]+)_([a-z]+)", flags=re.DOTALL)


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
        key = f"{self.layer}/{self.site}/{self.pooling}"
        return key if self.stack is None else f"{self.stack}/{key}"

    @property
    def n_columns(self) -> int:
        """Number of columns: all neurons, or those that are kept."""
        return self.width if self.neurons is None else len(self.neurons)


@dataclass(frozen=True, eq=False)
class LayerColumns:
    """The columns that one probe sees: one layer at one site, under all its poolings."""

    name: str
    layer: int
    columns: np.ndarray  # int; ordered by pooling and neuron, wherever they stand in the matrix
    key: tuple  # what layers are sorted by: prefix, stack, layer, site


@dataclass(frozen=True)
class Layout:
    """The columns of an activation matrix, in order."""

    segments: tuple[Segment, ...]
    # The model's fingerprint, by which columns of two models are told apart; "" if it is not known.
    model: str = field(default="", compare=False, repr=False)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The columns of each segment."""
        return tuple(_side_by_side([segment.n_columns for segment in self.segments]))

    def segment_of(self, column: int) -> Segment:
        """Find the segment that a column is in."""
        return next(
            s for s, own in zip(self.segments, self.slices, strict=True) if column < own.stop
        )

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
        """List the columns that each probe sees, by stack, layer and site."""
        members: dict[tuple, list[tuple[int, np.ndarray]]] = {}
        for stack, s, columns in zip(self._prefixes, self.segments, self.slices, strict=True):
            taken = _rank(POOLINGS, s.pooling), np.arange(columns.start, columns.stop)
            members.setdefault(("", stack, s.layer, s.site), []).append(taken)
        return [
            _layer(key, np.concatenate([own for _, own in sorted(taken, key=lambda t: t[0])]))
            for key, taken in members.items()
        ]

    def select(self, support: np.ndarray) -> Layout:
        """Drop the columns where ``support`` is False, and the segments that are left empty."""
        kept = []
        for segment, columns in zip(self.segments, self.slices, strict=True):
            neurons = np.arange(segment.width) if segment.neurons is None else segment.neurons
            chosen = tuple(np.asarray(neurons)[support[columns]].tolist())
            if chosen:
                everything = chosen == tuple(range(segment.width))
                kept.append(replace(segment, neurons=None if everything else chosen))
        return replace(self, segments=tuple(kept))


def find_layers(
    layer_sizes: Any,  # as SalientNeuronSelector takes it
    layout: Layout | None,  # carried by X
    names: Sequence[str] | None,  # of the columns of X
    n_columns: int,
    max_layer: int | None,
) -> list[LayerColumns]:
    """List the layers whose probes are to be fitted, in order."""
    if not isinstance(layer_sizes, str):  # "auto"
        layers = _layers_from_sizes(layer_sizes, n_columns)
    elif layout is not None:
        layers = layout.layers()
    else:
        found = None if names is None else layers_from_names(names)
        if found is None:
            _warn_of_no_layers(names)
        layers = found or _layers_from_sizes(None, n_columns)
    n_described = sum(len(layer.columns) for layer in layers)
    if n_described != n_columns:
        raise ValueError(
            f"layer_sizes={layer_sizes!r} describes {n_described} columns, but X has {n_columns}. "
            "Give the number of columns of each layer, in order."
        )
    chosen = [layer for layer in layers if max_layer is None or layer.layer <= max_layer]
    if not chosen:
        first = min(layer.layer for layer in layers)
        raise ValueError(f"max_layer={max_layer} leaves no layer: the first in X is layer {first}.")
    return sorted(chosen, key=lambda layer: layer.key)


def _layers_from_sizes(layer_sizes: Any, n_columns: int) -> list[LayerColumns]:
    """List the layers of a plain matrix, one after another."""
    sizes = [n_columns] if layer_sizes is None else layer_sizes
    if isinstance(layer_sizes, Integral):
        sizes = [int(layer_sizes)] * max(1, n_columns // int(layer_sizes))
    sizes = list(sizes)
    if not sizes or not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
        raise ValueError(
            f"layer_sizes={layer_sizes!r} must hold one positive int per layer, the number of its "
            "columns."
        )
    return [
        _layer(("", "", number, "input"), np.arange(columns.start, columns.stop))
        for number, columns in enumerate(_side_by_side(sizes))
    ]


def layers_from_names(names: Sequence[str]) -> list[LayerColumns] | None:
    """Find layers by their columns' names; None if any of them is not an activation's name."""
    parts = [name.rpartition("_") if isinstance(name, str) else ("", "", "") for name in names]
    heads = {head: _NAME.fullmatch(head) for head in {head for head, _, _ in parts}}
    known = {head: match.groups(default="") for head, match in heads.items() if match is not None}
    if not known or len(known) < len(heads) or not all(n.isdecimal() for _, _, n in parts):
        return None
    found = [(*known[head], neuron) for head, _, neuron in parts]
    together = _are_one_model(found)
    members: dict[tuple, list[tuple[int, int, int]]] = {}
    for column, (prefix, stack, layer, site, pooling, neuron) in enumerate(found):
        key = "" if together else prefix, stack, int(layer), site
        members.setdefault(key, []).append((_rank(POOLINGS, pooling), int(neuron), column))
    return [_layer(key, np.array(sorted(own))[:, -1]) for key, own in members.items()]


def _are_one_model(names: Sequence[tuple[str, ...]]) -> bool:
    """Whether columns with different prefixes, such as ``mean__``, come from the same model."""
    # Names do not say which model they are from. Two models that are read in the same way give each
    # name twice. If each is read with another pooling, their layers seldom have the same width.
    if len({prefix for prefix, *_ in names}) == 1:
        return True
    neurons: dict[tuple[str, ...], list[int]] = {}  # by stack, layer, site and pooling
    for _, *segment, neuron in names:
        neurons.setdefault(tuple(segment), []).append(int(neuron))
    widths = {(segment[:-1], max(own)) for segment, own in neurons.items()}
    distinct = all(len(set(own)) == len(own) for own in neurons.values())
    return distinct and len(widths) == len({layer for layer, _ in widths})


def _side_by_side(widths: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *widths]).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def _layer(key: tuple[str, str, int, str], columns: np.ndarray) -> LayerColumns:
    prefix, stack, layer, site = key
    rank = prefix, _rank(STACKS, stack.rstrip("_")), layer, _rank(SITES, site)
    return LayerColumns(f"{prefix}{stack}layer{layer}_{site}", layer, columns, rank)


def _rank(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _warn_of_no_layers(names: Sequence[str] | None) -> None:
    reason = (
        "it is a plain array, as a scaler, a ColumnTransformer or a FeatureUnion makes of what "
        "LLMActivationTransformer gives (pipeline.set_output(transform='pandas') keeps names)"
    )
    if names is not None:
        others = [name for name in names if layers_from_names([name]) is None]
        reason = f"{len(others):,} of its {len(names):,} columns, such as {others[0]!r}, are not "
        reason += "named as LLMActivationTransformer names them, e.g. 'layer3_hidden_mean_412' "
        reason += "(set_output on the whole pipeline, not on one step, keeps its names)"
    warn(
        f"X carries no layers, so all its columns are taken for one layer: {reason}. Put the "
        "selector directly behind LLMActivationTransformer, inside any ColumnTransformer or "
        "FeatureUnion; or say where layers are, e.g. layer_sizes=768, or layer_sizes=None for one "
        "layer."
    )


def as_slice(columns: np.ndarray) -> slice | np.ndarray:
    """Write neighbouring columns as a slice, which takes them out of an array without a copy."""
    if len(columns) and (np.diff(columns) == 1).all():
        return slice(int(columns[0]), int(columns[-1]) + 1)
    return columns


def _forgetting_layout(name: str) -> Any:
    """Make an array's method that changes it in place, so that columns are not what they were."""

    def method(self: ActivationArray, *args: Any, **kwargs: Any) -> None:
        getattr(np.ndarray, name)(self, *args, **kwargs)
        self.layout = None

    return method


class ActivationArray(np.ndarray):
    """A plain 2-D array that also says which column is which, as long as that stays true.

    Choosing rows keeps the layout, and joining the poolings of one model side by side joins
    layouts. Whatever else may change columns or values (choosing columns, arithmetic, a scaler)
    gives an array without one, because a layout that is silently wrong is worse than none. Only
    what is written through a view of the array, such as ``X.T``, is not seen.
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

    def __array_ufunc__(
        self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **kwargs: Any
    ) -> Any:
        """Return plain results from arithmetic; what is written over loses its layout."""
        for array in (*out, *(inputs[:1] if method == "at" else ())):
            if isinstance(array, ActivationArray):
                array.layout = None
        if out:
            kwargs["out"] = tuple(_plain(array) for array in out)
        return getattr(ufunc, method)(*(_plain(array) for array in inputs), **kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Join layouts where a FeatureUnion joins columns; what is written over loses its own."""
        result = super().__array_function__(func, types, args, kwargs)
        # np.copyto and the like return nothing, and write to what comes first.
        first, out = (*args[:1], kwargs.get("dst")), (*args[2:], kwargs.get("out"))
        for array in first if result is None else out:
            if isinstance(array, ActivationArray) and (result is None or array is result):
                array.layout = None
        joined = _join(*args, **kwargs) if func is np.concatenate else None
        return result if joined is None else ActivationArray(result, joined)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Write values; the layout stays only where they can't have come from other columns."""
        alike = isinstance(value, ActivationArray) and value.layout == self.layout
        if np.ndim(value) and not (alike and _chooses_rows(key)):
            self.layout = None
        super().__setitem__(key, value)

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

    __copy__ = copy
    sort, partition, put = map(_forgetting_layout, ("sort", "partition", "put"))

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
        index is Ellipsis or (isinstance(index, slice) and index == slice(None)) for index in rest
    )


def _plain(array: Any) -> Any:
    return np.asarray(array) if isinstance(array, ActivationArray) else array


def _join(arrays: Sequence[Any], axis: int | None = 0, *_: Any, **__: Any) -> Layout | None:
    """Find the layout of what ``np.concatenate`` joins; None for several models or widths."""
    layouts = [layout_of(array) for array in arrays]
    models = {None if layout is None else layout.model for layout in layouts}
    segments = [s for layout in layouts if layout is not None for s in layout.segments]
    poolings = {(s.stack, s.layer, s.site, s.pooling) for s in segments}
    widths = {(s.stack, s.layer, s.site, s.width) for s in segments}
    fits = len(poolings) == len(segments) and len(widths) == len({width[:-1] for width in widths})
    if axis not in (1, -1) or None in layouts or len(models) > 1 or not fits:
        return None
    return Layout(tuple(segments), models.pop() or "")


def layout_of(X: Any) -> Layout | None:
    """Find the layout that an array carries."""
    return X.layout if isinstance(X, ActivationArray) else None
