"""The score of a search against sparsity, and how many neurons each sparsity keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from skspin._display.axes import BLUE, ORANGE, given_or_new, legend_above, panel_below


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
        if not hasattr(search, "refit"):
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
        rows = _path(results["params"], name, best_params)
        if len(rows) == 1:
            rows = _best_of_each(results["params"], name, results[f"mean_test_{metric}"])
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
        legend_above(self.ax_)
        bottom = self.ax_
        self.count_ax_ = None
        if self.n_neurons is not None:
            self.count_ax_ = bottom = panel_below(self.ax_)
            # On a linear scale, a handful of neurons would look like none beside thousands.
            bottom.set_yscale("log", subs=())
            bottom.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            bottom.yaxis.set_major_formatter("{x:g}")
            bottom.plot(self.sparsity, self.n_neurons, **line)
            bottom.set_ylabel("neurons\nkept")
        bottom.set_xlabel("sparsity")
        return self


def _sparsity_parameter(params: dict[str, Any]) -> str:
    names = [name for name in params if name.split("__")[-1] == "sparsity"]
    if len(names) != 1:
        raise ValueError(
            f"The search tried {list(params)}, but the sparsity of one selector (and no more) is "
            'needed among them, e.g. {"select__sparsity": [0.2, 0.4, 0.6]}.'
        )
    return names[0]


def _path(candidates: list[dict[str, Any]], name: str, best: dict[str, Any]) -> dict[float, int]:
    """Find each sparsity's row among the candidates that share the best one's other parameters."""
    # In successive halving, the last round, which saw most data, overwrites earlier ones.
    return {
        params[name]: row
        for row, params in enumerate(candidates)
        if params.keys() == best.keys()
        and all(
            key == name or value is best[key] or np.array_equal(value, best[key])
            for key, value in params.items()
        )
    }


def _best_of_each(
    candidates: list[dict[str, Any]], name: str, scores: np.ndarray
) -> dict[float, int]:
    """Find the row of each sparsity's best candidate."""
    ascending = [row for row in np.argsort(-scores, kind="stable")[::-1] if name in candidates[row]]
    return {candidates[row][name]: int(row) for row in ascending}  # the last, and best, one stays


def _metric(search: Any, metric: str | None) -> str:
    """Name the score to draw as `cv_results_` names it."""
    scores = [key[10:] for key in search.cv_results_ if key.startswith("mean_test_")]
    if metric is None:
        metric = search.refit if isinstance(search.refit, str) else "score"
    if metric not in scores:
        raise ValueError(
            f"metric={metric!r} is not among the search's scores. Choose from {scores}."
        )
    return metric


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
