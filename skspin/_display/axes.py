"""What the displays share: colours, axes and legends."""

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
    _trim(ax)
    return ax, ax.figure


def panel_below(ax: Any) -> Any:
    """Divide the space of some axes between them and new axes below, which share the x axis."""
    place = ax.get_subplotspec()
    if place is None:
        raise ValueError(
            "ax is not part of a grid of subplots, so its space can't be divided into two panels. "
            "Make it with plt.subplots() or figure.add_subplot()."
        )
    grid = place.subgridspec(2, 1, height_ratios=[3, 2], hspace=0.1)
    ax.set_subplotspec(grid[0])
    below = ax.figure.add_subplot(grid[1], sharex=ax)
    ax.tick_params(labelbottom=False)
    _trim(below)
    ax.figure.align_ylabels([ax, below])
    return below


def _trim(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3, linewidth=0.5)
    ax.set_axisbelow(True)


def legend_above(ax: Any) -> None:
    """Put the legend over the axes, where it can't hide a curve."""
    n_entries = len(ax.get_legend_handles_labels()[0])
    n_columns = 2 if n_entries == 4 else 3  # two sites of two stacks fill two columns
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=n_columns, frameon=False, fontsize="small"
    )
