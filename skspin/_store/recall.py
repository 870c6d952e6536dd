"""Rows of activations: from the store where it has them, the rest computed and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from skspin._layout import Layout, Segment

_CHUNK = 2048  # texts looked up at once; bounds the copy that choosing neurons needs

Extract = Callable[[list[str], Sequence[Segment]], Iterator[tuple[np.ndarray, np.ndarray]]]


def recall_or_compute(
    chunks: Iterable[list[str]],
    layout: Layout,
    out: np.ndarray,
    *,
    context: str,
    store: Any,
    extract: Extract,
    model: str = "",
) -> None:
    """Fill a matrix of activations.

    Whatever was computed is stored at once, so that a call that is broken off loses nothing.

    Parameters
    ----------
    chunks : iterable of list of str
        The texts of all rows, in order; no more than one chunk is held at a time.
    layout : Layout
        The columns to fill.
    out : ndarray of shape (n_texts, n_columns), float32
        What to fill, chunk by chunk.
    context : str
        Everything but text and segment that decides a number.
    store : store of activations
        Read first, written with what was computed.
    extract : callable
        ``extract(texts, segments)`` computes rows and gives them in any order as pairs of positions
        of shape (k,) and values of shape (k, n_columns); called only for what the store lacks.
    model : str, default=""
        The name under which the store shows these activations to people.
    """
    start = 0
    for texts in chunks:
        _fill(texts, layout, out[start : start + len(texts)], context, store, extract, model)
        start += len(texts)


def _fill(
    texts: list[str],
    layout: Layout,
    out: np.ndarray,
    context: str,
    store: Any,
    extract: Extract,
    model: str,
) -> None:
    whole = Layout(tuple(replace(segment, neurons=None) for segment in layout.segments))
    missing = _recall(texts, layout, whole, context, store, out)  # (n_texts, n_segments)
    # Most often all rows lack the same segments: one pass through the model for each combination.
    for lacking in np.unique(missing[missing.any(axis=1)], axis=0):
        rows = np.flatnonzero((missing == lacking).all(axis=1))
        asked = np.flatnonzero(lacking)
        segments = [whole.segments[index] for index in asked]
        columns = Layout(tuple(segments)).slices
        for positions, values in extract([texts[row] for row in rows], segments):
            done = rows[positions]
            store.write(context, [texts[row] for row in done], segments, values, model=model)
            if segments == list(layout.segments):
                out[done] = values  # all columns at once is several times as fast
                continue
            for index, taken in zip(asked, columns, strict=True):
                chosen = _choose(values[:, taken], layout.segments[index])
                out[done, layout.slices[index]] = chosen


def _recall(
    texts: list[str], layout: Layout, whole: Layout, context: str, store: Any, out: np.ndarray
) -> np.ndarray:
    """Fill ``out`` from the store and say which (text, segment) it lacks."""
    missing = np.ones((len(texts), len(layout.segments)), dtype=bool)
    for start in range(0, len(texts), _CHUNK):
        rows = slice(start, start + _CHUNK)
        if whole == layout:
            missing[rows] = ~store.read(context, texts[rows], whole.segments, out[rows])
            continue
        full = np.empty((len(texts[rows]), whole.n_columns), dtype=np.float32)
        missing[rows] = ~store.read(context, texts[rows], whole.segments, full)
        for segment, source, target in zip(
            layout.segments, whole.slices, layout.slices, strict=True
        ):
            out[rows, target] = _choose(full[:, source], segment)
    return missing


def _choose(values: np.ndarray, segment: Segment) -> np.ndarray:
    return values if segment.neurons is None else values[:, list(segment.neurons)]
