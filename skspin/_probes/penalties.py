"""The probes' penalties: value, dual, and the direction of a Newton step.

``gradient`` is the gradient of the loss at ``coef``; both have shape (n_columns,). A direction
leads to the minimum of the penalty plus the quadratic model ``gradient @ e + e @ gram @ e / 2`` of
the loss, where e is the difference from ``coef``. Only e is ever multiplied by the Gram matrix,
because e is small where accuracy matters.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np
from scipy.linalg import cho_solve

from skspin._probes.columns import Columns, Threads

# The bound on a working set is so many columns or so many times the support, whichever is more. So
# it grows in few steps, while the Gram matrix, whose cost is quadratic in it, stays small for long.
_SMALLEST_SET = 64
_GROWTH = 1.5
# Columns with a smaller correlation stay outside; above 1, a column gets a weight.
_EDGE = 0.9
# Added to a Gram matrix's diagonal, as a share of it: more than rounding can take from the smallest
# eigenvalue, and too little to change a Newton step.
_RIDGE = {np.dtype("float32"): 1e-6, np.dtype("float64"): 1e-12}
# What a Newton step may leave of its model's gradient: the next step corrects it.
_ACCURACY = 0.1
_CONJUGATE_STEPS = 100  # after which a direct solution is worth its Gram matrix
_ROUNDS = 30
_STEPS_A_ROUND = 20
_SOLVES_A_ROUND = 5


class L2:
    """``coef @ coef / 2``."""

    def value(self, coef: np.ndarray) -> float:
        """Return the penalty of ``coef``."""
        return float(coef @ coef) / 2

    def dual(self, gradient: np.ndarray) -> tuple[float, float]:
        """Return the dual feasible share of the residuals, here all, and the dual penalty."""
        return 1.0, float(gradient @ gradient) / 2

    def directions(
        self,
        coefs: np.ndarray,  # (n_problems, n_columns), as are gradients
        gradients: np.ndarray,
        curvatures: np.ndarray,  # (n_problems, n_texts)
        columns: Columns,
        threads: Threads,
    ) -> np.ndarray:
        """Find all directions together, by conjugate gradients: wide layers' matrices are large."""
        totals = curvatures.sum(axis=1, keepdims=True)  # (P, 1)
        # The preconditioner: about the inverse diagonal of each problem's matrix.
        scaling = 1 / (1 + totals * columns.variances)  # (P, d)
        directions, residuals = np.zeros_like(coefs), -(gradients + coefs)  # (P, d)
        search = scaling * residuals  # (P, d)
        squares = _dot(residuals, search)  # (P,)
        goals = _ACCURACY**2 * squares
        left = np.flatnonzero(squares)
        for _ in range(_CONJUGATE_STEPS):
            if not left.size:
                break
            line, weights = search[left], curvatures[left]
            scores = columns.scores(line)  # (P, n)
            # Less their weighted means, because the intercept has no penalty.
            scores -= _dot(weights, scores)[:, None] / totals[left]
            products = columns.correlate(weights * scores) + line
            lengths = (squares[left] / _dot(line, products))[:, None]
            directions[left] += lengths * line
            residuals[left] -= lengths * products
            scaled = scaling[left] * residuals[left]
            new = _dot(scaled, residuals[left])
            search[left] = scaled + (new / squares[left])[:, None] * line
            squares[left] = new
            left = left[new > goals[left]]
        for p in left:
            gram = _gram(columns, np.arange(coefs.shape[1]), curvatures[p]).astype(np.float64)
            if np.isfinite(gram).all():
                gram[np.diag_indices_from(gram)] += 1
                directions[p] = _solve(gram, -(gradients[p] + coefs[p]))
        return directions


class L1:
    """``abs(coef).sum()``."""

    def value(self, coef: np.ndarray) -> float:
        """Return the penalty of ``coef``."""
        return float(np.abs(coef).sum())

    def dual(self, gradient: np.ndarray) -> tuple[float, float]:
        """Return the share of the residuals with which no correlation exceeds 1, and penalty 0."""
        return 1 / max(1.0, float(np.abs(gradient).max())), 0.0

    def violation(self, coef: np.ndarray, gradient: np.ndarray) -> float:
        """Return the largest distance from the subdifferential."""
        away = np.abs(gradient + np.sign(coef))
        return float(np.where(coef == 0, np.maximum(np.abs(gradient) - 1, 0), away).max())

    def directions(
        self,
        coefs: np.ndarray,  # (n_problems, n_columns), as are gradients
        gradients: np.ndarray,
        curvatures: np.ndarray,  # (n_problems, n_texts)
        columns: Columns,
        threads: Threads,
    ) -> np.ndarray:
        """Find each direction by itself, on a working set."""
        return np.stack(threads.map(self._direction, coefs, gradients, curvatures, repeat(columns)))

    def _direction(
        self, coef: np.ndarray, gradient: np.ndarray, curvature: np.ndarray, columns: Columns
    ) -> np.ndarray:
        chosen = self.working_set(coef, gradient)
        direction = np.zeros_like(coef)
        gram = _gram(columns, chosen, curvature)
        if not np.isfinite(gram).all():
            return direction
        start = coef[chosen]
        tol = _ACCURACY * self.violation(coef, gradient)
        direction[chosen] = self.minimise(gram, gradient[chosen], start, tol) - start
        return direction

    def working_set(self, coef: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Take the support and the columns with the largest correlations."""
        support = coef != 0
        size = min(len(coef), max(_SMALLEST_SET, int(_GROWTH * support.sum())))
        urgency = np.where(support, np.inf, np.abs(gradient))
        chosen = np.argpartition(-urgency, size - 1)[:size]
        return np.sort(chosen[urgency[chosen] >= _EDGE])

    def minimise(
        self, gram: np.ndarray, gradient: np.ndarray, start: np.ndarray, tol: float
    ) -> np.ndarray:
        """Alternate accelerated steps, which find the support, with direct solves on it."""
        best, lowest = start, 0.0
        steps = _step_sizes(gram)
        for _ in range(_ROUNDS):
            u = _accelerated_steps(gram, gradient, start, best, steps)
            u = _solve_on_support(gram, gradient, start, u)
            change = _product(gram, u - start)  # (k,)
            violation = self.violation(u, gradient + change)
            value = float((u - start) @ (gradient + change / 2)) + self.value(u) - self.value(start)
            gained = lowest - value
            if gained > 0:
                best, lowest = u, value
            else:
                steps = steps / 2  # too long: the eigenvalue may have been underestimated
            if violation <= tol:
                break
        return best


Penalty = L1 | L2
PENALTIES: dict[str, Penalty] = {"l1": L1(), "l2": L2()}


def _gram(columns: Columns, chosen: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    gram = columns.gram(chosen, curvature)  # (k, k)
    diagonal = gram.diagonal() * (1 + _RIDGE[gram.dtype])
    gram[np.diag_indices_from(gram)] = np.where(diagonal > 0, diagonal, 1)
    return gram


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.einsum("pd,pd->p", one, other)


def _step_sizes(gram: np.ndarray) -> np.ndarray:
    """Find a gradient step size for each column, (k,), such that all may step together."""
    # The inverse diagonal, over the largest eigenvalue of the matrix scaled to a diagonal of ones.
    # The power method underestimates that eigenvalue; 1.2 times as much is an upper bound mostly.
    diagonal = gram.diagonal()  # (k,)
    roots = np.sqrt(diagonal)
    v = np.linspace(1, 2, len(gram), dtype=gram.dtype)
    for _ in range(10):
        v = gram @ (v / np.linalg.norm(v) / roots) / roots
    return 1 / (1.2 * float(np.linalg.norm(v)) * diagonal)


def _accelerated_steps(
    gram: np.ndarray, gradient: np.ndarray, start: np.ndarray, best: np.ndarray, steps: np.ndarray
) -> np.ndarray:
    """Take a few proximal gradient steps with Nesterov's momentum and adaptive restarts."""
    u = at = best
    momentum = 1.0
    for _ in range(_STEPS_A_ROUND):
        raw = at - steps * (gradient + _product(gram, at - start))
        new = raw - np.clip(raw, -steps, steps)  # soft threshold
        moved = new - u
        if ((at - new) / steps) @ moved > 0:  # uphill: momentum has carried too far
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        at = new + (momentum - 1) / following * moved
        u, momentum = new, following
    return u


def _solve_on_support(
    gram: np.ndarray, gradient: np.ndarray, start: np.ndarray, u: np.ndarray
) -> np.ndarray:
    """Minimise with the signs of ``u``; if some would flip, take a shorter step and repeat."""
    for _ in range(_SOLVES_A_ROUND):
        support = np.flatnonzero(u)
        if not support.size:
            return u
        old = u[support]
        slope = (gradient + _product(gram, u - start))[support]
        system = gram[np.ix_(support, support)].astype(np.float64)
        new = old - _solve(system, slope + np.sign(old))
        flipped = new * old < 0
        u = np.zeros_like(u)
        if not flipped.any():
            u[support] = new
            return u

        candidates = [np.where(flipped, 0, new), _best_zero(old, new, flipped, slope, system)]
        values = [_value(v - old, v, slope, system) for v in candidates]
        u[support] = candidates[int(np.argmin(values))]
    return u


def _value(step: np.ndarray, at: np.ndarray, slope: np.ndarray, system: np.ndarray) -> float:
    return step @ (slope + system @ step / 2) + np.abs(at).sum()


def _best_zero(
    old: np.ndarray, new: np.ndarray, flipped: np.ndarray, slope: np.ndarray, system: np.ndarray
) -> np.ndarray:
    """Of the points from ``old`` to ``new`` where an entry is zero, find that of lowest value."""
    # The first such point never raises the value; the best lies beyond entries close to zero.
    moves = new - old  # (k,)
    shares = old[flipped] / -moves[flipped]  # (n_flipped,)
    points = old + shares[:, None] * moves  # (n_flipped, k)
    curve = moves @ system @ moves / 2
    best = int((shares * (slope @ moves + shares * curve) + np.abs(points).sum(axis=1)).argmin())
    reached = points[best]
    reached[np.flatnonzero(flipped)[best]] = 0
    return reached


def _solve(system: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve a symmetric system: by Cholesky, or by LU where rounding has made it indefinite."""
    # NumPy's Cholesky lets other threads run meanwhile; SciPy's does not in all its versions.
    try:
        root = np.linalg.cholesky(system)
    except np.linalg.LinAlgError:
        return np.linalg.solve(system, right)
    return cho_solve((root.T, False), right, check_finite=False)


def _product(gram: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return (gram @ vector.astype(gram.dtype)).astype(np.float64)
