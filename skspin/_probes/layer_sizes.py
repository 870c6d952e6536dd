"""Where layers are in a matrix of activations: as it says itself, or as the user says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral

from skspin._layout import LayerColumns, Layout


def find_layers(
    layer_sizes: str | int | Sequence[int] | None,
    carried: Layout | None,
    n_features: int,
    max_layer: int | None,
) -> list[LayerColumns]:
    """List the layers whose probes are to be fitted.

    Parameters
    ----------
    layer_sizes : "auto", int, sequence of int or None
        As :class:`~skspin.SalientNeuronSelector` takes it.
    carried : Layout or None
        The layout that the matrix itself carries.
    n_features : int
        Number of columns of the matrix.
    max_layer : int or None
        The last layer to use; None for all.

    Raises
    ------
    ValueError
        If the layers do not add up to the columns, or ``max_layer`` leaves none of them.
    """
    layout = _find_layout(layer_sizes, carried, n_features)
    if layout.n_columns != n_features:
        raise ValueError(
            f"layer_sizes={layer_sizes!r} describes {layout.n_columns} columns, but X has "
            f"{n_features}. Give the number of columns of each layer, in order."
        )
    layers = layout.layers()
    if max_layer is None:
        return layers
    chosen = [layer for layer in layers if layer.layer <= max_layer]
    if not chosen:
        first = min(layer.layer for layer in layers)
        raise ValueError(f"max_layer={max_layer} leaves no layer: the first in X is layer {first}.")
    return chosen


def _find_layout(
    layer_sizes: str | int | Sequence[int] | None, carried: Layout | None, n_features: int
) -> Layout:
    if isinstance(layer_sizes, str):  # "auto"
        if carried is not None:
            return carried
        warnings.warn(
            "X carries no layers, so all its columns are taken for one layer. If X comes from "
            "LLMActivationTransformer, pass it on as it is (a scaler in between loses the "
            "layers: put it after the selector); otherwise say where layers are, e.g. "
            "layer_sizes=768, or layer_sizes=None for one layer.",
            UserWarning,
            stacklevel=5,
        )
    if layer_sizes is None or isinstance(layer_sizes, str):
        return Layout.from_sizes([n_features])
    if isinstance(layer_sizes, Integral):
        size = int(layer_sizes)
        return Layout.from_sizes([size] * max(1, n_features // size))
    sizes = list(layer_sizes)  # type: ignore[arg-type]
    if not sizes or not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
        raise ValueError(
            f"layer_sizes={layer_sizes!r} must hold one positive int per layer, the "
            "number of its columns."
        )
    return Layout.from_sizes(sizes)
