"""What an estimator says of itself in scikit-learn's HTML diagrams, without loading a model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from skspin._layout import Layout
from skspin._sklearn import VisualBlock


def diagram_block(estimator: Any, facts: Iterable[str]) -> VisualBlock:
    """Make an estimator's box, with facts under its name.

    Parameters
    ----------
    estimator : estimator
        Fitted or not.
    facts : iterable of str
        A few words each.
    """
    return VisualBlock(
        "single",
        estimator,
        names=type(estimator).__name__,
        name_caption=" · ".join(facts),
        name_details=type(estimator).__name__,  # not str(estimator), which writes out a model
    )


def model_name(model: Any) -> str:
    """Name a model shortly: a hub id, the end of a folder's path, or a class."""
    if not isinstance(model, str | os.PathLike):
        return type(model).__name__
    return "/".join(PurePath(model).parts[-2:])


def layout_facts(layout: Layout) -> list[str]:
    """Say which layers, sites and poolings a layout has, and how many columns."""
    layers = sorted({segment.layer for segment in layout.segments})
    sites = dict.fromkeys(segment.site for segment in layout.segments)
    poolings = dict.fromkeys(segment.pooling for segment in layout.segments)
    word = "layer" if len(layers) == 1 else "layers"
    return [
        f"{word} {_as_ranges(layers)}",
        ", ".join(sites),
        ", ".join(poolings),
        f"{layout.n_columns:,} columns",
    ]


def _as_ranges(numbers: list[int]) -> str:
    """Write ascending numbers with runs drawn together, e.g. ``"0-3, 6"``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
