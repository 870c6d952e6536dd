"""Sparse logistic regressions, many at once on the same columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from skspin._probe_columns import Columns
from skspin._probe_penalties import PENALTIES, Penalty
from skspin._probe_problem import Problem


@dataclass(frozen=True)
class ProbeSolution:
    """Solutions of P problems.

    Parameters
    ----------
    coef : ndarray of shape (n_problems, n_columns), float64
        Weights, in units of the standardised columns.
    intercept : ndarray of shape (n_problems,), float64
        Intercepts; infinite where all weight is on one side, which has no finite best intercept.
    n_iter : ndarray of shape (n_problems,), int
        Number of steps.
    dual_gap : ndarray of shape (n_problems,), float64
        Bound on how far the objective is above its minimum, as a share of the objective.
    """

    coef: np.ndarray
    intercept: np.ndarray
    n_iter: np.ndarray
    dual_gap: np.ndarray


def solve_probes(
    X: np.ndarray,
    targets: np.ndarray,
    *,
    C: Any,
    sample_weight: np.ndarray | None = None,
    penalty: str = "l1",
    tol: float = 1e-3,
    max_iter: int = 1000,
    mean: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    device: str | None = None,
) -> ProbeSolution:
    """Solve sparse logistic regressions that share their columns.

    Problem p minimises over weights w and intercept b::

        C[p] * sum_i sample_weight[i, p] * log(1 + exp(-targets[i, p] * (x_i @ w + b))) + ||w||_1

    with ``||w||^2 / 2`` instead of ``||w||_1`` for ``penalty="l2"``.

    Parameters
    ----------
    X : ndarray of shape (n_texts, n_columns), float32
        One layer's activations.
    targets : ndarray of shape (n_texts, n_problems)
        +1 or -1.
    C : float or array-like of shape (n_problems,)
        Weight of the loss against the penalty.
    sample_weight : ndarray of shape (n_texts,) or (n_texts, n_problems), default=None
        Weights of the rows; 0 leaves a row out.
    penalty : {"l1", "l2"}, default="l1"
        The penalty.
    tol : float, default=1e-3
        Relative duality gap at which a problem is solved.
    max_iter : int, default=1000
        Steps after which a problem is given up; the caller reads that from ``dual_gap``.
    mean, scale : ndarray of shape (n_columns,), default=None
        The columns are standardised on the fly as ``(X - mean) / scale``.
    device : str or None, default=None
        None for NumPy on the CPU.
    """
    X = np.ascontiguousarray(X, dtype=np.float32)
    n, d = X.shape
    mean = np.zeros(d) if mean is None else np.asarray(mean, np.float64)
    scale = np.ones(d) if scale is None else np.asarray(scale, np.float64)
    problems = _problems(targets, C, sample_weight, PENALTIES[penalty], d)
    # First in float32, which is fast, then in float64, which is true: problems that float32 has
    # solved are measured once more and done; any others are finished there.
    for dtype, place in (("float32", device), ("float64", None)):
        _descend(
            [problem for problem in problems if problem.objective > 0],
            Columns(X, mean, scale, dtype, place),
            tol,
            max_iter,
        )
    return ProbeSolution(
        coef=np.stack([problem.coef for problem in problems]),
        intercept=np.array([problem.intercept for problem in problems]),
        n_iter=np.array([problem.n_iter for problem in problems]),
        dual_gap=np.array([problem.gap for problem in problems]),
    )


def _problems(
    targets: np.ndarray, C: Any, sample_weight: np.ndarray | None, penalty: Penalty, n_columns: int
) -> list[Problem]:
    n, n_problems = targets.shape
    weights = np.ones(n) if sample_weight is None else np.asarray(sample_weight, np.float64)
    weights = np.broadcast_to(weights[:, None] if weights.ndim == 1 else weights, targets.shape)
    weights = (weights * C).T  # (P, n)
    signs = np.asarray(targets, np.float64).T  # (P, n)
    problems = [
        Problem(t, s, penalty, np.zeros(n_columns)) for t, s in zip(signs, weights, strict=True)
    ]
    for problem in problems:
        problem.solve_if_one_sided()
    return problems


def _descend(problems: list[Problem], columns: Columns, tol: float, max_iter: int) -> None:
    """Step problems side by side until each is solved or gets no further.

    They share nothing but the products with the columns, which are cheaper for many at once.
    """
    if not problems:
        return
    scores = columns.scores(np.stack([problem.coef for problem in problems]))  # (P, n)
    for problem, own in zip(problems, scores, strict=True):
        problem.scores, problem.idle = own, 0
    while problems:
        gradients = columns.correlate(np.stack([problem.residuals() for problem in problems]))
        for problem, gradient in zip(problems, gradients, strict=True):
            problem.measure(gradient)
        unsolved = [
            (problem, gradient, problem.direction(columns, gradient))
            for problem, gradient in zip(problems, gradients, strict=True)
            if problem.gap > tol and problem.n_iter < max_iter and not problem.stalled
        ]
        if not unsolved:
            return
        changes = columns.scores(np.stack([direction for _, _, direction in unsolved]))  # (P, n)
        problems = [
            problem
            for (problem, gradient, direction), change in zip(unsolved, changes, strict=True)
            if problem.advance(direction, change, gradient)
        ]
