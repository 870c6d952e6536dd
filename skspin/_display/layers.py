"""Each layer's probe score, and how many of its neurons were selected."""

from __future__ import annotations

import re

import numpy as np
from sklearn.utils.validation import check_is_fitted

from skspin._display.axes import BLUE, GREEN, ORANGE, given_or_new, legend_above, panel_below
from skspin._pipeline import only_step
from skspin._selector import SalientNeuronSelector

_SITE_COLORS = {"hidden": BLUE, "mlp": ORANGE, "attention": GREEN}
_LAYER_NAME = re.compile(r"(?:(encoder|decoder)_)?layer(\d+)_([a-z]+)")


class LayerSalienceDisplay:
    """Each layer's probe score, and how many of its neurons were selected.

    It is best made with :meth:`from_estimator`. The parameters are kept as attributes. Read more in
    the user guide, :doc:`/user_guide/explaining`.

    Parameters
    ----------
    layer_names : list of str
        As in ``layer_names_`` of :class:`SalientNeuronSelector`, e.g. ``"layer3_hidden"``.
    layer_scores : ndarray of shape (n_layers,)
        Each probe's validation score.
    n_selected : ndarray of shape (n_layers,), int
        Number of neurons selected in each layer.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The upper panel, with the scores.
    count_ax_ : matplotlib Axes
        The lower panel, with the numbers of neurons.
    figure_ : matplotlib Figure
        The figure that holds them.
    line_ : list of matplotlib Line2D
        The scores, one line per site and stack.

    See Also
    --------
    SparsityPathDisplay : The score along a search over sparsity.

    Examples
    --------
    >>> import numpy as np
    >>> from skspin import LayerSalienceDisplay, SalientNeuronSelector
    >>> X = np.random.default_rng(0).normal(size=(200, 40))
    >>> selector = SalientNeuronSelector(layer_sizes=10).fit(X, X[:, 25] > 0)
    >>> display = LayerSalienceDisplay.from_estimator(selector)
    >>> display.ax_.get_ylabel()
    'probe score'
    """

    def __init__(self, *, layer_names, layer_scores, n_selected):
        self.layer_names = layer_names
        self.layer_scores = layer_scores
        self.n_selected = n_selected

    @classmethod
    def from_estimator(cls, estimator, *, ax=None):
        """Draw a fitted selector.

        Parameters
        ----------
        estimator : SalientNeuronSelector or Pipeline
            Fitted; a pipeline (or a ColumnTransformer or FeatureUnion) must hold one selector.
        ax : matplotlib Axes, default=None
            See :meth:`plot`.

        Returns
        -------
        display : LayerSalienceDisplay

        Raises
        ------
        ValueError
            If there is not one selector. Of a search, pass its ``best_estimator_``.
        NotFittedError
            If the estimator is not fitted.
        """
        check_is_fitted(estimator)
        selector = only_step(estimator, SalientNeuronSelector)
        check_is_fitted(selector)
        display = cls(
            layer_names=selector.layer_names_,
            layer_scores=selector.layer_scores_,
            n_selected=selector.n_selected_,
        )
        return display.plot(ax=ax)

    def plot(self, ax=None):
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; its space is divided into two panels, and it becomes the upper one. None
            makes a new figure.

        Returns
        -------
        self : LayerSalienceDisplay
            With ``ax_`` and ``figure_``.
        """
        self.ax_, self.figure_ = given_or_new(ax)
        self.count_ax_ = panel_below(self.ax_)
        parsed = [_LAYER_NAME.findall(name)[0] for name in self.layer_names]
        layers = np.array([int(layer) for _, layer, _ in parsed])
        series = [(stack, site) for stack, _, site in parsed]
        self.line_ = []
        floor = np.zeros(layers.max() + 1, dtype=int)  # what the bars of a layer stand on
        for stack, site in dict.fromkeys(series):
            rows = np.flatnonzero([member == (stack, site) for member in series])
            color = _SITE_COLORS.get(site, BLUE)
            # The decoder differs from the encoder in line and marker, not in colour.
            second = stack == "decoder"
            self.line_ += self.ax_.plot(
                layers[rows],
                self.layer_scores[rows],
                color=color,
                marker="s" if second else "o",
                markersize=4,
                markerfacecolor="white" if second else color,
                linestyle="--" if second else "-",
                label=f"{stack}, {site}" if stack else site,
            )
            self.count_ax_.bar(
                layers[rows],
                self.n_selected[rows],
                bottom=floor[layers[rows]],
                color="white" if second else color,
                edgecolor=color if second else "white",
                hatch="////" if second else None,
                linewidth=0.5,
            )
            floor[layers[rows]] += self.n_selected[rows]
        self.ax_.set_ylabel("probe score")
        self.count_ax_.set_ylabel("neurons\nselected")
        self.count_ax_.set_xlabel("layer")
        for axis in (self.count_ax_.xaxis, self.count_ax_.yaxis):
            axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        self.count_ax_.set_xlim(layers.min() - 0.9, layers.max() + 0.9)
        if len(self.line_) > 1:
            legend_above(self.ax_)
        return self
