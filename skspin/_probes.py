"""Sparse logistic regressions, many at once on the same columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


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
    n, n_columns = X.shape
    shape = (n, targets.shape[1])
    C = np.broadcast_to(np.asarray(C, float), shape[1])
    s = np.ones(n) if sample_weight is None else np.asarray(sample_weight, float)
    s = np.broadcast_to(s[:, None] if s.ndim == 1 else s, shape) * C  # (n, P)
    mean = np.zeros(n_columns) if mean is None else mean
    scale = np.ones(n_columns) if scale is None else scale
    Z = ((X - mean) / scale).astype(np.float32)  # (n, d)
    solutions = [_solve(Z, targets[:, p], s[:, p], penalty, tol, max_iter) for p in range(shape[1])]
    coef, intercept, n_iter, gap = (np.array(part) for part in zip(*solutions, strict=True))
    return ProbeSolution(coef, intercept, n_iter, gap)


def _solve(Z, t, s, penalty, tol, max_iter):
    """Minimise by accelerated proximal gradient steps with restarts."""
    rows = np.flatnonzero(s)
    Z, t, s = Z[rows], t[rows].astype(float), s[rows]
    w, b = np.zeros(Z.shape[1]), 0.0
    if not len(t) or np.all(t == t[0]):
        return w, (t[0] * np.inf if len(t) else 0.0), 0, 0.0
    center = s @ Z / s.sum()  # decouples the intercept
    lipschitz = _largest_eigenvalue(Z - center.astype(np.float32), s) / 4 * 1.05
    shrink = 1 / lipschitz if penalty == "l1" else 0.0
    decay = 1 / (1 + 1 / lipschitz) if penalty == "l2" else 1.0
    previous, momentum, at = w, 1.0, w
    gap = np.inf
    for step in range(max_iter + 1):
        z = (Z @ at.astype(np.float32)).astype(float)  # (n,)
        b = _best_intercept(z, t, s, b)
        r = -s * t / (1 + np.exp(t * (z + b)))  # (n,)
        gradient = (r.astype(np.float32) @ Z).astype(float)  # (d,)
        if step % 10 == 0:
            gap = _relative_gap(at, z + b, t, s, gradient, penalty)
            if gap <= tol or step == max_iter:
                return at, b, step, gap
        raw = (at - gradient / lipschitz) * decay
        new = np.sign(raw) * np.maximum(np.abs(raw) - shrink, 0)
        if (at - new) @ (new - previous) > 0:
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        at = new + (momentum - 1) / following * (new - previous)
        previous, momentum = new, following
    raise AssertionError("unreachable")


def _relative_gap(w, z, t, s, gradient, penalty):
    theta = 1 / (1 + np.exp(t * z))
    loss = s @ np.logaddexp(0, -t * z)
    if penalty == "l1":
        theta = theta / max(1.0, np.abs(gradient).max())
        primal, dual = loss + np.abs(w).sum(), 0.0
    else:
        primal, dual = loss + w @ w / 2, -gradient @ gradient / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.nan_to_num(theta * np.log(theta)) + np.nan_to_num(
            (1 - theta) * np.log1p(-theta)
        )
    dual -= s @ entropy
    return max(primal - dual, 0.0) / primal


def _best_intercept(z, t, s, b):
    """Solve sum_i s_i t_i sigmoid(-t_i (z_i + b)) = 0, on a log scale where it is nearly linear."""
    positive = t > 0
    for _ in range(100):
        p = 1 / (1 + np.exp(t * (z + b)))
        up, down = s[positive] @ p[positive], s[~positive] @ p[~positive]
        slope = 2 - s[positive] @ p[positive] ** 2 / up - s[~positive] @ p[~positive] ** 2 / down
        step = np.log(up / down) / max(slope, 0.1)
        b += step
        if abs(step) < 1e-12 * (1 + abs(b)):
            break
    return b


def _largest_eigenvalue(Z, s):
    v = np.ones(Z.shape[1], np.float32)
    value = 1.0
    for _ in range(30):
        v = v / np.linalg.norm(v)
        v = (s.astype(np.float32) * (Z @ v)) @ Z
        value = float(np.linalg.norm(v))
    return value
