"""Sparse logistic regressions, many at once on the same columns.

A proximal Newton method on working sets; the design note on probes explains its steps. Problem p
minimises over weights w and an intercept b without penalty::

    C[p] * sum_i sample_weight[i, p] * log(1 + exp(-targets[i, p] * (z_i @ w + b))) + |w|_1

with z_i the standardised row i, and ``w @ w / 2`` instead of ``|w|_1`` for ``penalty="l2"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress, repeat
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from skspin._probes.columns import Columns, Threads, threads_in_place_of_blas
from skspin._probes.penalties import PENALTIES
from skspin._probes.problem import Problem
from skspin._probes.tensors import is_tensor


@dataclass(frozen=True)
class ProbeSolution:
    """The best solution found for each problem."""

    coef: np.ndarray  # (n_problems, n_columns), float64, in units of the standardised columns
    intercept: np.ndarray  # (n_problems,); infinite where all weight is on one side
    n_iter: np.ndarray  # (n_problems,): Newton steps
    dual_gap: np.ndarray  # (n_problems,): (objective - its lower bound) / objective

    def split(self, n: int) -> list[ProbeSolution]:
        """Cut into pieces of equally many problems, in order."""
        columns = (self.coef, self.intercept, self.n_iter, self.dual_gap)
        pieces = zip(*(np.split(column, n) for column in columns), strict=True)
        return [ProbeSolution(*piece) for piece in pieces]


def solve_probes(
    X: Any,  # (n_texts, n_columns), finite; not copied if contiguous float32; a tensor stays
    targets: np.ndarray,  # (n_texts, n_problems): +1 or -1
    *,
    C: ArrayLike,  # one positive number, or (n_problems,)
    sample_weight: np.ndarray | None = None,  # (n_texts,) or (n_texts, n_problems); folds too
    penalty: str = "l1",
    tol: float = 1e-3,  # relative duality gap at which a problem is solved
    max_iter: int = 100,  # Newton steps after which it is given up
    mean: np.ndarray | None = None,  # (n_columns,): columns become (X - mean) / scale in passing
    scale: np.ndarray | None = None,
    device: str | None = None,  # of torch, a tensor's own; gaps are measured in float64
) -> ProbeSolution:
    """Solve many independent logistic regressions, whose products are computed together.

    There is no warning of unsolved problems: the caller compares ``dual_gap`` to ``tol``.
    """
    if not is_tensor(X):
        X = np.ascontiguousarray(X, dtype=np.float32)
    n, d = X.shape
    mean = np.zeros(d) if mean is None else np.asarray(mean, np.float64)
    scale = np.ones(d) if scale is None else np.asarray(scale, np.float64)
    if mean.shape != (d,) or scale.shape != (d,) or not (scale > 0).all():
        raise ValueError(
            f"mean has shape {mean.shape} and scale {scale.shape}; both must have one value for "
            f"each of the {d} columns, and scale only positive ones (inf leaves a column out)."
        )
    if penalty not in PENALTIES:
        raise ValueError(f"penalty={penalty!r} must be one of {sorted(PENALTIES)}.")
    signs, weights = _signs_and_weights(targets, C, sample_weight, n)
    problems = [
        Problem(t, s, PENALTIES[penalty], np.zeros(d)) for t, s in zip(signs, weights, strict=True)
    ]
    for problem in problems:
        problem.solve_if_one_sided()
    # First in float32, which is fast, then in float64, which is accurate: problems that float32 has
    # solved are only measured again there; the others are continued.
    with threads_in_place_of_blas() as threads:
        for dtype, where in (("float32", device), ("float64", device if is_tensor(X) else None)):
            unsolved = [problem for problem in problems if problem.objective > 0]
            columns = Columns(X, mean, scale, dtype, where, threads)
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
    """Check targets and weights; return both by problem, C included: (n_problems, n_texts)."""
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
    """Take Newton steps in all problems together until each is solved or stalls."""
    if not problems:
        return
    # They share nothing but the products with the columns, which are cheaper for many at once.
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
        problems, slopes = (list(pair) for pair in zip(*unsolved, strict=True))
        directions = threads.map(
            Problem.direction, problems, repeat(columns, len(problems)), slopes
        )
        changes = columns.scores(np.stack(directions))  # (P, n)
        advanced = threads.map(Problem.advance, problems, directions, changes, slopes)
        problems = list(compress(problems, advanced))
