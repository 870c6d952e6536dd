"""Sparse logistic regressions, many at once on the same columns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress, repeat

import numpy as np
from numpy.typing import ArrayLike

from skspin._probes.columns import Columns
from skspin._probes.penalties import PENALTIES
from skspin._probes.problem import Problem
from skspin._probes.threads import Threads, own_threads


@dataclass(frozen=True)
class ProbeSolution:
    """Solutions of several problems.

    Parameters
    ----------
    coef : ndarray of shape (n_problems, n_columns), float64
        Weights, in units of the standardised columns.
    intercept : ndarray of shape (n_problems,), float64
        Intercepts; infinite where all weight is on one side, which no finite one fits best.
    n_iter : ndarray of shape (n_problems,), int
        Number of Newton steps.
    dual_gap : ndarray of shape (n_problems,), float64
        How far, at most, the objective is above its minimum, as a share of the objective.
    """

    coef: np.ndarray
    intercept: np.ndarray
    n_iter: np.ndarray
    dual_gap: np.ndarray

    def split(self, n_parts: int) -> list[ProbeSolution]:
        """Cut into parts of equally many problems, in order."""
        columns = (self.coef, self.intercept, self.n_iter, self.dual_gap)
        parts = zip(*(np.split(column, n_parts) for column in columns), strict=True)
        return [ProbeSolution(*part) for part in parts]


def solve_probes(
    X: np.ndarray,
    targets: np.ndarray,
    *,
    C: ArrayLike,
    sample_weight: np.ndarray | None = None,
    penalty: str = "l1",
    tol: float = 1e-3,
    max_iter: int = 100,
    mean: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    device: str | None = None,
) -> ProbeSolution:
    """Solve logistic regressions that share their columns.

    Problem p minimises over weights w and an intercept b, which costs nothing::

        C[p] * sum_i sample_weight[i, p] * log(1 + exp(-targets[i, p] * (z_i @ w + b))) + |w|_1

    with z_i the standardised row i, and ``w @ w / 2`` instead of ``|w|_1`` for ``penalty="l2"``.
    Problems share arithmetic and nothing else: each is solved as if it were alone.

    Parameters
    ----------
    X : ndarray of shape (n_texts, n_columns)
        One layer's activations, finite. They are copied if they are not float32, or rows do not
        follow each other in memory; nothing else of this size is held.
    targets : ndarray of shape (n_texts, n_problems)
        +1 or -1.
    C : float or array-like of shape (n_problems,)
        Weight of the losses against the penalty; positive.
    sample_weight : ndarray of shape (n_texts,) or (n_texts, n_problems), default=None
        Weights of the rows, not negative; 0 leaves a row out, so that folds are weights.
    penalty : {"l1", "l2"}, default="l1"
        The penalty.
    tol : float, default=1e-3
        Relative duality gap at which a problem is solved.
    max_iter : int, default=100
        Newton steps after which a problem is given up.
    mean, scale : ndarray of shape (n_columns,), default=None
        Columns are standardised in passing, as ``(X - mean) / scale``.
    device : str or None, default=None
        The torch device that multiplies in float32; None for NumPy. Gaps are always measured by
        NumPy, in float64.

    Returns
    -------
    solution : ProbeSolution
        Of each problem the best that was found. Nothing warns here: the caller, who knows what the
        problems are, compares ``dual_gap`` with ``tol``.

    Raises
    ------
    ValueError
        If shapes do not agree, or a value is not one of those that are allowed.

    Notes
    -----
    A proximal Newton method on working sets [1]_ [2]_; the design note on probes tells the steps.

    References
    ----------
    .. [1] Lee, Sun and Saunders, "Proximal Newton-type methods for minimizing composite functions",
       SIAM Journal on Optimization 24, 2014.
    .. [2] Massias, Vaiter, Gramfort and Salmon, "Dual extrapolation for sparse generalized linear
       models", Journal of Machine Learning Research 21, 2020.

    Examples
    --------
    The same rows, separated by their first column, for two values of C:

    >>> import numpy as np
    >>> from skspin._probes.solver import solve_probes
    >>> X = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    >>> targets = np.where(X[:, [0, 0]] > 0, 1, -1)
    >>> solution = solve_probes(X, targets, C=[0.02, 0.1])
    >>> np.flatnonzero(solution.coef[0])
    array([0])
    >>> bool(solution.dual_gap.max() <= 1e-3)
    True
    """
    X = np.ascontiguousarray(X, dtype=np.float32)
    n, d = X.shape
    mean = np.zeros(d) if mean is None else np.asarray(mean, np.float64)
    scale = np.ones(d) if scale is None else np.asarray(scale, np.float64)
    if mean.shape != (d,) or scale.shape != (d,) or not (scale > 0).all():
        raise ValueError(
            f"mean has shape {mean.shape} and scale {scale.shape}; both must have one value for "
            f"each of the {d} columns, and scale only positive ones (1 for a constant column)."
        )
    if penalty not in PENALTIES:
        raise ValueError(f"penalty={penalty!r} must be one of {sorted(PENALTIES)}.")
    signs, weights = _signs_and_weights(targets, C, sample_weight, n)
    problems = [
        Problem(t, s, PENALTIES[penalty], np.zeros(d)) for t, s in zip(signs, weights, strict=True)
    ]
    for problem in problems:
        problem.solve_if_one_sided()
    # First in float32, which is fast, then in float64, which is true: problems that float32 has
    # solved are measured once more and done; any others are finished there.
    with own_threads() as threads:
        for dtype, place in (("float32", device), ("float64", None)):
            unsolved = [problem for problem in problems if problem.objective > 0]
            columns = Columns(X, mean, scale, dtype, place, threads)
            _descend(unsolved, columns, threads, tol, max_iter, final=dtype == "float64")
    return ProbeSolution(
        coef=np.stack([problem.coef for problem in problems]),
        intercept=np.array([problem.intercept for problem in problems]),
        n_iter=np.array([problem.n_iter for problem in problems]),
        dual_gap=np.array([problem.gap for problem in problems]),
    )


def _signs_and_weights(
    targets: np.ndarray, C: ArrayLike, sample_weight: np.ndarray | None, n_texts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lay targets and weights, C included, out by problem: two arrays (n_problems, n_texts)."""
    signs = np.asarray(targets, np.float64).T
    if signs.ndim != 2 or signs.shape[1] != n_texts or not (np.abs(signs) == 1).all():
        raise ValueError(
            f"targets has shape {np.shape(targets)}; it must hold +1 or -1 for each of the "
            f"{n_texts} rows of X and each problem, in shape (n_texts, n_problems)."
        )
    costs = np.asarray(C, np.float64)
    if costs.shape not in ((), (len(signs),)) or not (np.isfinite(costs) & (costs > 0)).all():
        raise ValueError(
            f"C={C!r} must be one positive number, or one for each of the {len(signs)} problems."
        )
    weights = np.ones(n_texts) if sample_weight is None else np.asarray(sample_weight, np.float64).T
    allowed = ((n_texts,), signs.shape)
    if weights.shape not in allowed or not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            f"sample_weight has shape {weights.T.shape}; it must hold finite numbers that "
            f"are not negative, in shape ({n_texts},) or ({n_texts}, {len(signs)})."
        )
    return signs, np.broadcast_to(weights, signs.shape) * np.atleast_1d(costs)[:, None]


def _descend(
    problems: list[Problem],
    columns: Columns,
    threads: Threads,
    tol: float,
    max_iter: int,
    final: bool,
) -> None:
    """Step problems side by side until each is solved or gets no further.

    They share nothing but the products with the columns, which are cheaper for many at once.
    """
    if not problems:
        return
    scores = columns.scores(np.stack([problem.coef for problem in problems]))  # (P, n)
    for problem, own in zip(problems, scores, strict=True):
        problem.scores, problem.idle = own, 0
    while problems:
        residuals = threads.map(Problem.residuals, problems)
        gradients = columns.correlate(np.stack(residuals))  # (P, d)
        if not np.isfinite(gradients).all():
            raise ValueError(
                "X holds values that are not finite or too large for float32. Drop or scale the "
                "columns that hold them."
            )
        threads.map(Problem.measure, problems, gradients, repeat(final, len(problems)))
        unsolved = [
            (problem, gradient)
            for problem, gradient in zip(problems, gradients, strict=True)
            if problem.gap > tol and problem.n_iter < max_iter and not problem.stalled
        ]
        if not unsolved:
            return
        problems, slopes = (list(part) for part in zip(*unsolved, strict=True))
        directions = threads.map(
            Problem.direction, problems, repeat(columns, len(problems)), slopes
        )
        changes = columns.scores(np.stack(directions))  # (P, n)
        advanced = threads.map(Problem.advance, problems, directions, changes, slopes)
        problems = list(compress(problems, advanced))
