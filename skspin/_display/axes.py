"""What the displays share: colours and axes."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette: told apart under every common kind of colour blindness, and in print.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def given_or_new(ax: Any, **options: Any) -> tuple[Any, Any]:
    """Take the axes given, or those of a new figure made with options."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'Displays need matplotlib, which is not installed. Run: pip install "skspin[plot]"'
        ) from error
    if ax is None:
        _, ax = plt.subplots(layout="constrained", **options)
    return trim(ax), ax.figure


def trim(ax: Any) -> Any:
    """Leave out what distracts from the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3, linewidth=0.5)
    ax.set_axisbelow(True)
    return ax
