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

from skspin._probes.columns import Columns, Threads, is_tensor, threads_in_place_of_blas
from skspin._probes.penalties import PENALTIES, Penalty

_TINY = 1e-300  # a lower bound, so that logarithms and shares exist
_IDLE_STEPS = 3  # in a row, after which a problem is given up
_FARTHEST = 1e18  # no solution has such a coefficient; float32 could not hold much more


@dataclass(frozen=True)
class ProbeSolution:
    """The best solution found for each problem."""

    coef: np.ndarray  # (n_problems, n_columns), float64, in units of the standardised columns
    intercept: np.ndarray  # (n_problems,); infinite where all weight is on one side
    decisions: np.ndarray  # (n_problems, n_texts): decision values of all rows
    n_iter: np.ndarray  # (n_problems,): Newton steps
    dual_gap: np.ndarray  # (n_problems,): (objective - its lower bound) / objective

    def split(self, n: int) -> list[ProbeSolution]:
        """Cut into pieces of equally many problems, in order."""
        pieces = zip(*(np.split(values, n) for values in vars(self).values()), strict=True)
        return [ProbeSolution(*piece) for piece in pieces]


def solve_probes(
    X: Any,  # (n_texts, n_columns), finite; not copied if contiguous float32; a tensor stays
    targets: np.ndarray,  # (n_texts, n_problems): +1 or -1
    *,
    C: ArrayLike,  # one positive number, or (n_problems,)
    sample_weight: ArrayLike = 1.0,  # (n_texts,) or (n_texts, n_problems), not negative; folds too
    penalty: str = "l1",
    tol: float = 1e-3,  # relative duality gap at which a problem is solved
    max_iter: float = np.inf,  # Newton steps after which it is given up
    mean: ArrayLike = 0.0,  # (n_columns,): columns become (X - mean) / scale in passing
    scale: ArrayLike = 1.0,  # positive; infinity leaves a column out
    device: str | None = None,  # of torch, a tensor's own; gaps are measured in float64
) -> ProbeSolution:
    """Solve many independent logistic regressions, whose products are computed together.

    There is no warning of unsolved problems: the caller compares ``dual_gap`` to ``tol``.
    """
    if not is_tensor(X):
        X = np.ascontiguousarray(X, dtype=np.float32)
    mean, scale = np.broadcast_to(mean, X.shape[1]), np.broadcast_to(scale, X.shape[1])
    signs = np.asarray(targets, np.float64).T  # (P, n)
    weights = np.broadcast_to(np.asarray(sample_weight).T * np.reshape(C, (-1, 1)), signs.shape)
    problems = [
        Problem(t, s, PENALTIES[penalty], X.shape[1]) for t, s in zip(signs, weights, strict=True)
    ]
    # First in float32, which is fast, then in float64, which is accurate: problems that float32 has
    # solved are only measured again there; the others are continued.
    with threads_in_place_of_blas() as threads:
        for dtype, where in (("float32", device), ("float64", device if is_tensor(X) else None)):
            columns = Columns(X, mean, scale, dtype, where, threads)
            unsolved = [problem for problem in problems if problem.objective > 0]
            _descend(unsolved, columns, threads, tol, max_iter, final=dtype == "float64")
    return ProbeSolution(
        coef=np.stack([problem.coef for problem in problems]),
        intercept=np.array([problem.intercept for problem in problems]),
        decisions=np.stack([problem.scores + problem.intercept for problem in problems]),
        n_iter=np.array([problem.n_iter for problem in problems]),
        dual_gap=np.array([problem.gap for problem in problems]),
    )


def _descend(
    problems: list[Problem],
    columns: Columns,
    threads: Threads,
    tol: float,
    max_iter: float,
    final: bool,
) -> None:
    """Take Newton steps in all problems together until each is solved or stalls."""
    if not problems:
        return
    penalty = problems[0].penalty  # the same for all
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
        threads.map(Problem.measure, problems, gradients, repeat(final))
        unsolved = [
            problem.gap > tol and problem.n_iter < max_iter and problem.idle < _IDLE_STEPS
            for problem in problems
        ]
        problems, slopes = list(compress(problems, unsolved)), gradients[unsolved]
        if not problems:
            return
        coefs = np.stack([problem.coef for problem in problems])  # (P, d)
        curvatures = np.stack(threads.map(Problem.curvature, problems))  # (P, n)
        directions = penalty.directions(coefs, slopes, curvatures, columns, threads)  # (P, d)
        # In float32, squares of columns may overflow, and rounding may leave a model without a
        # minimum. A step of zero leaves the problem to float64.
        directions[~(np.abs(directions).max(axis=1) < _FARTHEST)] = 0
        changes = columns.scores(directions)  # (P, n)
        advanced = threads.map(Problem.advance, problems, directions, changes, slopes)
        problems = list(compress(problems, advanced))


class Problem:
    """A logistic regression, the best solution known, and the steps towards its minimum."""

    misfit: np.ndarray  # (n_texts,): the probability of the other sign

    def __init__(
        self,
        signs: np.ndarray,  # (n_texts,): +1 or -1
        weights: np.ndarray,  # (n_texts,): weights of the rows' losses, C included
        penalty: Penalty,
        n_columns: int,
    ) -> None:
        self.signs, self.weights, self.penalty = signs, weights, penalty
        self.coef = np.zeros(n_columns)
        self.scores = np.zeros(len(signs))  # decision values less the intercept
        self.intercept, self.n_iter, self.idle = 0.0, 0, 0
        self.objective = self.gap = np.inf
        sides = np.unique(signs[weights > 0])
        if len(sides) < 2:  # an infinite intercept alone solves it
            self.intercept = float(sides[0]) * np.inf if len(sides) else 0.0
            self.objective = self.gap = 0.0

    def residuals(self) -> np.ndarray:
        """Put the intercept where residuals balance; return the loss's derivative, (n_texts,)."""
        # Newton's method on the logarithms of the two sums, whose difference is nearly linear in
        # the intercept even where both sums vanish; bisection where that leaves the bracket.
        positive = np.where(self.signs > 0, self.weights, 0)  # (n,)
        negative = self.weights - positive
        b, low, high = self.intercept, -np.inf, np.inf
        for _ in range(100):
            margins = self.signs * (self.scores + b)  # (n,)
            small = np.exp(-np.abs(margins))  # 1 / (1 + exp(margins)) would overflow
            p = np.where(margins >= 0, small, 1) / (1 + small)
            up, down = max(positive @ p, _TINY), max(negative @ p, _TINY)
            squares = p * p
            slope = 2 - positive @ squares / up - negative @ squares / down
            step = float(np.log(up / down) / max(slope, 0.1))
            if abs(step) <= 1e-10 * (1 + abs(b)):
                break
            low, high = (b, high) if step > 0 else (low, b)
            b += step
            if not low < b < high:
                b = (low + high) / 2
        self.intercept, self.misfit = b, p
        return -self.signs * self.weights * p

    def measure(self, gradient: np.ndarray, final: bool) -> None:
        """Measure the relative duality gap; ``final`` says that no finer arithmetic follows."""
        # With the best intercept the residuals sum to zero, so a share of them, which depends on
        # the penalty, is a feasible point of the dual problem.
        share, dual_penalty = self.penalty.dual(gradient)
        theta = np.clip(share * self.misfit, _TINY, 1 - 1e-16)  # (n,)
        entropy = -theta * np.log(theta) - (1 - theta) * np.log1p(-theta)  # (n,)
        dual = max(float(self.weights @ entropy) - dual_penalty, 0.0)  # 0: no residuals at all
        objective = self._loss(self.scores, self.intercept) + self.penalty.value(self.coef)
        gap = max(objective - dual, 0.0) / objective
        # Where rounding dominates, a step neither gains a fair part of the gap nor closes it. Where
        # the bound is loose, useful steps may look the same. So the final arithmetic counts a step
        # as idle only if its gain is within the rounding of the objective.
        least = 1e-13 if final else 1e-3 * self.gap
        idle = self.objective - objective < least * objective and gap > self.gap / 2
        self.idle = self.idle + 1 if idle else 0
        self.objective, self.gap = objective, gap

    def advance(self, direction: np.ndarray, change: np.ndarray, gradient: np.ndarray) -> bool:
        """Step as far along ``direction`` as the objective falls; False if it does not fall."""
        here = self.penalty.value(self.coef)
        slope = float(gradient @ direction) + self.penalty.value(self.coef + direction) - here
        curvature = self.curvature()
        shift = -float(curvature @ change) / float(curvature.sum())  # the intercept's part
        rounding = 1e-12 * self.objective
        share = 1.0
        # Where rows are nearly certain, the quadratic model is so flat that steps are far too long.
        while share > 1e-18 and slope < 0:
            coef, scores = self.coef + share * direction, self.scores + share * change
            intercept = self.intercept + share * shift
            objective = self._loss(scores, intercept) + self.penalty.value(coef)
            if objective <= self.objective + 0.01 * share * slope + rounding:
                self.coef, self.scores, self.intercept = coef, scores, intercept
                self.n_iter += 1
                return True
            share /= 2
        return False

    def curvature(self) -> np.ndarray:
        """Return the second derivatives of the rows' losses, (n_texts,)."""
        # The floor keeps the sum above zero if every row is classified with certainty.
        return self.weights * np.maximum(self.misfit * (1 - self.misfit), 1e-18)

    def _loss(self, scores: np.ndarray, intercept: float) -> float:
        margins = self.signs * (scores + intercept)
        return float(self.weights @ (np.log1p(np.exp(-np.abs(margins))) - np.minimum(margins, 0)))
