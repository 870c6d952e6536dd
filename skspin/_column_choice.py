"""Which columns a user asks for, as a layout, or an error that names what is not allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from skspin._layout import Layout
from skspin._model.shape import SITES, ModelShape

POOLINGS = ("mean", "max", "first", "last")
STACKS = ("encoder", "decoder")


def choose_columns(
    shape: ModelShape,
    *,
    stack: str | Sequence[str],
    site: str | Sequence[str],
    layers: int | Sequence[int] | None,
    pooling: str | Sequence[str],
) -> Layout:
    """Lay out the columns that the parameters of a transformer name.

    Parameters
    ----------
    shape : ModelShape
        What the model has to offer.
    stack, site, layers, pooling
        The parameters of :class:`~skspin.LLMActivationTransformer` of these names.

    Raises
    ------
    ValueError
        If a value is not one of those that are allowed, or the model has no such layer or site.
    """
    return shape.layout(
        stacks=_choice("stack", stack, STACKS),
        sites=_choice("site", site, SITES),
        layers=_as_layers(layers),
        poolings=_choice("pooling", pooling, POOLINGS),
    )


def _choice(name: str, value: str | Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    """Turn one choice or several into a tuple, in the order of ``allowed``."""
    chosen = (value,) if isinstance(value, str) else tuple(value)
    if not chosen or any(option not in allowed for option in chosen):
        raise ValueError(f"{name}={value!r} must be one of {list(allowed)} or a tuple of them.")
    return tuple(option for option in allowed if option in chosen)


def _as_layers(layers: Any) -> int | list[int] | None:
    if layers is None or isinstance(layers, Integral):
        return layers if layers is None else int(layers)
    chosen = list(layers)
    if not chosen or not all(isinstance(layer, Integral) for layer in chosen):
        raise ValueError(f"layers={layers!r} must be None, an int or a sequence of ints.")
    return [int(layer) for layer in chosen]
