"""Displays of a selector's layers and of a search over sparsity, and axes as all displays have."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from skspin._pipeline import is_search, only_step
from skspin._selector import SalientNeuronSelector

# Okabe and Ito's palette: told apart under every common kind of colour blindness, and in print.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
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
        self.count_ax_ = _panel_below(self.ax_)
        parsed = [_LAYER_NAME.findall(name)[-1] for name in self.layer_names]
        layers = np.array([int(layer) for _, layer, _ in parsed])
        series = [(stack, site) for stack, _, site in parsed]
        self.line_ = []
        floor = np.zeros(layers.max() + 1, dtype=int)  # what the bars of a layer stand on
        for stack, site in dict.fromkeys(series):
            rows = np.flatnonzero([member == (stack, site) for member in series])
            at, counts = layers[rows], self.n_selected[rows]
            color = _SITE_COLORS.get(site, BLUE)
            line = {"color": color, "marker": "o", "markersize": 4}
            bars = {"color": color, "edgecolor": "white", "linewidth": 0.5}
            if stack == "decoder":  # told apart by line, marker and hatch, not by colour
                line |= {"marker": "s", "markerfacecolor": "white", "linestyle": "--"}
                bars |= {"color": "white", "edgecolor": color, "hatch": "////"}
            label = f"{stack}, {site}" if stack else site
            self.line_ += self.ax_.plot(at, self.layer_scores[rows], label=label, **line)
            self.count_ax_.bar(at, counts, bottom=floor[at], **bars)
            floor[at] += counts
        self.ax_.set_ylabel("probe score")
        self.count_ax_.set_ylabel("neurons\nselected")
        self.count_ax_.set_xlabel("layer")
        for axis in (self.count_ax_.xaxis, self.count_ax_.yaxis):
            axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        self.count_ax_.set_xlim(layers.min() - 0.9, layers.max() + 0.9)
        if len(self.line_) > 1:
            self.ax_.legend(loc="best", fontsize="small")
        return self


class SparsityPathDisplay:
    """The score of a search against sparsity, and how many neurons each sparsity keeps.

    It is best made with :meth:`from_search`. The parameters are kept as attributes. Read more in
    the user guide, :doc:`/user_guide/searching`.

    Parameters
    ----------
    sparsity : ndarray of shape (n_values,)
        The values searched, ascending.
    score_mean : ndarray of shape (n_values,)
        Test score, averaged over folds.
    score_std : ndarray of shape (n_values,)
        Standard deviation of the test score over folds.
    n_neurons : ndarray of shape (n_values,), int, or None
        Number of neurons kept by the probes that were fitted to all data; None where there is no
        refitted model.
    best_sparsity : float
        The value that the search chose.
    score_name : str, default="score"
        Label of the scores.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The (upper) panel, with the scores.
    count_ax_ : matplotlib Axes or None
        The lower panel, with the numbers of neurons, where they are known.
    figure_ : matplotlib Figure
        The figure that holds them.

    See Also
    --------
    LayerSalienceDisplay : Scores and numbers of neurons by layer.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn.pipeline import make_pipeline
    >>> from skspin import SalientNeuronSelector, SparsityPathDisplay
    >>> X = np.random.default_rng(0).normal(size=(200, 40))
    >>> model = make_pipeline(
    ...     SalientNeuronSelector(layer_sizes=10), LogisticRegression()
    ... )
    >>> grid = {"salientneuronselector__sparsity": [0.2, 0.5, 0.8]}
    >>> search = GridSearchCV(model, grid).fit(X, X[:, 25] > 0)
    >>> display = SparsityPathDisplay.from_search(search)
    >>> display.n_neurons.shape
    (3,)
    """

    def __init__(
        self, *, sparsity, score_mean, score_std, n_neurons, best_sparsity, score_name="score"
    ):
        self.sparsity = sparsity
        self.score_mean = score_mean
        self.score_std = score_std
        self.n_neurons = n_neurons
        self.best_sparsity = best_sparsity
        self.score_name = score_name

    @classmethod
    def from_search(cls, search, *, metric=None, ax=None):
        """Draw a fitted search.

        Other parameters that were searched along with sparsity are held at the values that the
        search chose, so that one path is drawn and not a cloud. If no other sparsity was tried with
        those, as in a random search, the best candidate of each sparsity is drawn. In successive
        halving, candidates that were dropped keep the score of their last round, on less data.

        Parameters
        ----------
        search : GridSearchCV or alike
            Fitted, with the ``sparsity`` of one selector among its parameters.
        metric : str or None, default=None
            Which score, where the search has several; None for the one it refits by.
        ax : matplotlib Axes, default=None
            See :meth:`plot`.

        Returns
        -------
        display : SparsityPathDisplay

        Raises
        ------
        TypeError
            If ``search`` is no search.
        ValueError
            If the search did not try values of one selector's ``sparsity``, or has several scores
            and none is chosen.
        """
        if not is_search(search):
            raise TypeError(
                f"search is a {type(search).__name__}, but from_search takes a fitted search, such "
                "as GridSearchCV."
            )
        check_is_fitted(search, "cv_results_")
        results = search.cv_results_
        metric = _metric(search, metric)
        best = getattr(search, "best_index_", np.argmin(results[f"rank_test_{metric}"]))
        best_params = results["params"][best]
        name = _sparsity_parameter(best_params)
        rows = _path(results["params"], name, best_params, results[f"mean_test_{metric}"])
        sparsity = np.array(sorted(rows))
        chosen = [rows[value] for value in sparsity]
        display = cls(
            sparsity=sparsity,
            score_mean=results[f"mean_test_{metric}"][chosen],
            score_std=results[f"std_test_{metric}"][chosen],
            n_neurons=_count_neurons(search, name, sparsity),
            best_sparsity=best_params[name],
            score_name=search.scoring if isinstance(search.scoring, str) else metric,
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
        self : SparsityPathDisplay
            With ``ax_``, ``count_ax_`` and ``figure_``.
        """
        self.ax_, self.figure_ = given_or_new(ax)
        low, high = self.score_mean - self.score_std, self.score_mean + self.score_std
        line = {"color": BLUE, "marker": "o", "markersize": 4}
        self.ax_.plot(self.sparsity, self.score_mean, label="mean of folds", **line)
        band = {"color": BLUE, "alpha": 0.2, "linewidth": 0, "label": "± 1 standard deviation"}
        self.ax_.fill_between(self.sparsity, low, high, **band)
        chosen = self.sparsity == self.best_sparsity
        star = {"color": ORANGE, "markeredgecolor": "black", "markersize": 13, "label": "chosen"}
        self.ax_.plot(self.sparsity[chosen], self.score_mean[chosen], "*", **star)
        self.ax_.set_ylabel(self.score_name)
        self.ax_.legend(loc="best", fontsize="small")
        self.count_ax_ = None
        if self.n_neurons is not None:
            self.count_ax_ = below = _panel_below(self.ax_)
            # On a linear scale, a handful of neurons would look like none beside thousands.
            below.set_yscale("log", subs=())
            below.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            below.yaxis.set_major_formatter("{x:g}")
            below.plot(self.sparsity, self.n_neurons, **line)
            below.set_ylabel("neurons\nkept")
        (self.count_ax_ or self.ax_).set_xlabel("sparsity")
        return self


# What a search tried


def _sparsity_parameter(params: dict[str, Any]) -> str:
    names = [name for name in params if name.split("__")[-1] == "sparsity"]
    if len(names) != 1:
        raise ValueError(
            f"The search tried {list(params)}, but the sparsity of one selector (and no more) is "
            'needed among them, e.g. {"select__sparsity": [0.2, 0.4, 0.6]}.'
        )
    return names[0]


def _path(
    candidates: list[dict[str, Any]], name: str, best: dict[str, Any], scores: np.ndarray
) -> dict[float, int]:
    """Find each sparsity's row: that with the best one's other parameters, or its best."""
    # In successive halving, the last round, which saw most data, overwrites earlier ones.
    rows = [
        row
        for row, params in enumerate(candidates)
        if params.keys() == best.keys()
        and all(
            key == name or value is best[key] or np.array_equal(value, best[key])
            for key, value in params.items()
        )
    ]
    if len({candidates[row][name] for row in rows}) == 1:
        ascending = np.argsort(-scores, kind="stable")[::-1].tolist()
        rows = [row for row in ascending if name in candidates[row]]
    return {candidates[row][name]: row for row in rows}  # the last one of a sparsity stays


def _metric(search: Any, metric: str | None) -> str:
    """Name the score to draw as `cv_results_` names it."""
    scores = [key[10:] for key in search.cv_results_ if key.startswith("mean_test_")]
    default = scores[0] if len(scores) == 1 else search.refit
    chosen = default if metric is None else metric
    if chosen not in scores:
        raise ValueError(
            f"metric={metric!r} is not among the search's scores {scores}. Pass one, e.g. "
            f"metric={scores[0]!r}."
        )
    return chosen


def _count_neurons(search: Any, parameter: str, sparsity: np.ndarray) -> np.ndarray | None:
    """Count what each sparsity keeps of the refitted model's probes; None without such a model."""
    step: Any = getattr(search, "best_estimator_", None)
    for name in parameter.split("__")[:-1]:
        groups = ("named_steps", "named_transformers_", "named_transformers")
        members = next((getattr(step, group) for group in groups if hasattr(step, group)), None)
        if members is None:
            return None
        step = members[name]
    return np.array([max(1, step._support_at(value).sum()) for value in sparsity])


# Axes, for the displays of texts, too


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
    return _trim(ax), ax.figure


def _trim(ax: Any) -> Any:
    """Leave out what distracts from the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3, linewidth=0.5)
    ax.set_axisbelow(True)
    return ax


def _panel_below(ax: Any) -> Any:
    """Divide the space of some axes between them and new axes below, which share the x axis."""
    place = ax.get_subplotspec()
    if place is None:
        raise ValueError(
            "ax is not part of a grid of subplots, so its space can't be divided into two panels. "
            "Make it with plt.subplots() or figure.add_subplot()."
        )
    grid = place.subgridspec(2, 1, height_ratios=[3, 2], hspace=0.1)
    ax.set_subplotspec(grid[0])
    below = _trim(ax.figure.add_subplot(grid[1], sharex=ax))
    ax.tick_params(labelbottom=False)
    ax.figure.align_ylabels([ax, below])
    return below
