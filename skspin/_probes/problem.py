"""One probe's problem on the way to its minimum: objective, duality gap, Newton step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from skspin._probes.columns import Columns
from skspin._probes.penalties import Penalty

# Added to a Gram matrix's diagonal, as a share of it: more than rounding can take from the smallest
# eigenvalue, and too little to change a Newton step.
_RIDGE = {np.dtype("float32"): 1e-6, np.dtype("float64"): 1e-12}
_TINY = 1e-300
_IDLE_STEPS = 3
_FARTHEST = 1e18  # no solution has such a coefficient; float32 could not hold much more


@dataclass
class Problem:
    """A logistic regression and the best solution known."""

    signs: np.ndarray  # (n_texts,): +1 or -1
    weights: np.ndarray  # (n_texts,): weights of the rows' losses, C included
    penalty: Penalty
    coef: np.ndarray  # (n_columns,): where to start
    intercept: float = 0.0
    n_iter: int = 0
    gap: float = np.inf
    objective: float = np.inf
    idle: int = 0
    scores: np.ndarray = field(init=False)  # (n,): decision values less the intercept
    misfit: np.ndarray = field(init=False)  # (n,): the probability of the other sign

    def solve_if_one_sided(self) -> None:
        """Solve a problem with all weight on one sign, by an infinite intercept alone."""
        sides = self.signs[self.weights > 0]
        if not len(sides) or (sides == sides[0]).all():
            self.intercept = float(sides[0]) * np.inf if len(sides) else 0.0
            self.objective, self.gap = 0.0, 0.0

    def residuals(self) -> np.ndarray:
        """Put the intercept where it is best and return the loss's derivative, (n_texts,)."""
        self._solve_intercept()
        return -self.signs * self.weights * self.misfit

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

    @property
    def stalled(self) -> bool:
        """Whether the last steps made no progress in the arithmetic in use."""
        return self.idle >= _IDLE_STEPS

    def direction(self, columns: Columns, gradient: np.ndarray) -> np.ndarray:
        """Compute the step (n_columns,) from ``coef`` to the minimum of the quadratic model."""
        chosen = self.penalty.working_set(self.coef, gradient)
        direction = np.zeros_like(self.coef)
        gram = columns.gram(chosen, self._curvature())  # (k, k)
        # In float32, squares of columns may overflow, and rounding may make a nearly singular
        # matrix indefinite, so that there is no minimum. A step of zero leaves the problem to
        # float64.
        if not np.isfinite(gram).all():
            return direction
        diagonal = gram.diagonal() * (1 + _RIDGE[gram.dtype])
        gram[np.diag_indices_from(gram)] = np.where(diagonal > 0, diagonal, 1)
        start = self.coef[chosen]
        tol = 0.1 * self.penalty.violation(self.coef, gradient)
        step = self.penalty.minimise(gram, gradient[chosen], start, tol) - start
        if np.abs(step).max(initial=0) < _FARTHEST:
            direction[chosen] = step
        return direction

    def advance(self, direction: np.ndarray, change: np.ndarray, gradient: np.ndarray) -> bool:
        """Step as far along ``direction`` as the objective falls; False if it does not fall."""
        here = self.penalty.value(self.coef)
        slope = float(gradient @ direction) + self.penalty.value(self.coef + direction) - here
        curvature = self._curvature()
        shift = -float(curvature @ change) / float(curvature.sum())  # the intercept's part
        rounding = 1e-12 * self.objective
        share = 1.0
        while share > 1e-6 and slope < 0:
            coef, scores = self.coef + share * direction, self.scores + share * change
            intercept = self.intercept + share * shift
            objective = self._loss(scores, intercept) + self.penalty.value(coef)
            if objective <= self.objective + 0.01 * share * slope + rounding:
                self.coef, self.scores, self.intercept = coef, scores, intercept
                self.n_iter += 1
                return True
            share /= 2
        return False

    def _curvature(self) -> np.ndarray:
        # The floor keeps the sum above zero if every row is classified with certainty.
        return self.weights * np.maximum(self.misfit * (1 - self.misfit), 1e-18)

    def _loss(self, scores: np.ndarray, intercept: float) -> float:
        margins = self.signs * (scores + intercept)
        return float(self.weights @ (np.log1p(np.exp(-np.abs(margins))) - np.minimum(margins, 0)))

    def _solve_intercept(self) -> None:
        """Find the intercept at which the residuals of both signs balance."""
        # Newton's method on the logarithms of the two sums, whose difference is nearly linear in
        # the intercept even where both sums vanish; bisection where that leaves the bracket.
        positive = np.where(self.signs > 0, self.weights, 0)  # (n,)
        negative = self.weights - positive
        b, low, high = self.intercept, -np.inf, np.inf
        for _ in range(100):
            p = _misfit(self.signs * (self.scores + b))  # (n,)
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


def _misfit(margins: np.ndarray) -> np.ndarray:
    """Compute 1 / (1 + exp(margins)) without overflow."""
    small = np.exp(-np.abs(margins))
    return np.where(margins >= 0, small, 1) / (1 + small)
