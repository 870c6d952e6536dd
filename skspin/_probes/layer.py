"""One layer's probe: standardise its columns, choose C on validation rows, solve on all rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.utils import gen_batches

from skspin._probes.solver import ProbeSolution, solve_probes
from skspin._probes.targets import Targets

_PART_BYTES = 1 << 20  # of rows in float64 at a time; they stay in a core's cache
_LARGEST = 1e12  # of an activation; sums of squares stay far below what float32 holds


@dataclass(frozen=True)
class ProbeSettings:
    """What a probe's solution depends on besides the data; sparsity is not among it.

    ``eps`` is the relative rounding of the activations, that of the number format they came in.
    """

    C: tuple[float, ...]
    penalty: str
    standardize: bool
    tol: float
    max_iter: int
    device: str | None
    eps: float = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class LayerProbe:
    """The solution for one layer.

    Parameters
    ----------
    coef : ndarray of shape (n_problems, n_neurons)
        Weights in standardised units (where the settings standardise).
    score : float
        Accuracy on the validation rows, when fitted on the others.
    C : float
        The value chosen.
    dual_gap : float
        The largest relative duality gap over problems.
    n_iter : int
        The largest number of steps over problems.
    """

    coef: np.ndarray
    score: float
    C: float
    dual_gap: float
    n_iter: int


def fit_layer_probe(
    block: np.ndarray, targets: Targets, validation: np.ndarray, settings: ProbeSettings
) -> LayerProbe:
    """Solve one layer's problems.

    The columns' mean and scale come from all rows, validation rows included; labels do not enter
    into them.

    Parameters
    ----------
    block : ndarray of shape (n_texts, n_neurons)
        The layer's activations; copied if they are not float32, or cut out of a larger array.
    targets : Targets
        The problems.
    validation : ndarray of shape (n_rows,), int
        Rows held out while C is chosen and the score is measured.
    settings : ProbeSettings
        How to solve.
    """
    with np.errstate(over="ignore"):  # what becomes infinite is refused with better words
        block = np.ascontiguousarray(block, dtype=np.float32)
    _refuse_large(block)
    mean, scale = np.zeros(block.shape[1]), np.ones(block.shape[1])
    if settings.standardize:
        mean, scale = _mean_and_scale(block, targets.row_weights, settings.eps)

    def solve(tasks: list[tuple[float, np.ndarray]]) -> list[ProbeSolution]:
        """Solve all problems, for each pair of a value of C and weights of the rows."""
        return solve_probes(
            block,
            np.tile(targets.signs, (1, len(tasks))),
            C=np.repeat([C for C, _ in tasks], targets.n_problems),
            sample_weight=np.hstack([weights for _, weights in tasks]),
            penalty=settings.penalty,
            tol=settings.tol,
            max_iter=settings.max_iter,
            mean=mean,
            scale=scale,
            device=settings.device,
        ).split(len(tasks))

    training = targets.weights.copy()
    training[validation] = 0
    trials = [(C, training) for C in settings.C]
    # With nothing to choose, all rows need not wait for the trial: solved in one go, both take one
    # pass over the columns, and two threads have a problem each.
    known = [(C, targets.weights) for C in settings.C if len(settings.C) == 1]
    solved = solve(trials + known)
    coef = np.vstack([probe.coef for probe in solved[: len(trials)]])
    intercept = np.hstack([probe.intercept for probe in solved[: len(trials)]])
    # By parts, for the same reason as below: this is a copy in float64.
    decisions = np.concatenate(
        [
            (block[validation[rows]] - mean) / scale @ coef.T + intercept
            for rows in _parts(len(validation), block)
        ]
    )  # (n_rows, n_trials * n_problems)
    scores = [
        targets.score(decision, validation) for decision in np.split(decisions, len(trials), axis=1)
    ]
    # Candidates ascend, so of equals the first, and with it the sparsest probe, is taken.
    best = int(np.argmax(scores))
    final = solved[-1] if known else solve([(settings.C[best], targets.weights)])[0]
    return LayerProbe(
        coef=final.coef,
        score=scores[best],
        C=settings.C[best],
        dual_gap=float(final.dual_gap.max()),
        n_iter=int(final.n_iter.max()),
    )


def _parts(n_rows: int, block: np.ndarray) -> Iterator[slice]:
    return gen_batches(n_rows, max(1, _PART_BYTES // (8 * block.shape[1])))


def _refuse_large(block: np.ndarray) -> None:
    largest = max(-float(block.min()), float(block.max()))
    if not largest <= _LARGEST:
        raise ValueError(
            f"X holds values as large as {largest:.3g}, but probes compute in float32, where the "
            f"squares of more than {_LARGEST:.0e} have no room. Scale or drop the columns that "
            "hold them."
        )


def _mean_and_scale(
    block: np.ndarray, row_weights: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Measure each column; one that does not vary gets a scale of 1, and so stays (nearly) 0."""
    mean, scale = _mean_and_deviation(block, row_weights)
    # Activations that differ in their last float32 digits only do not vary: divided by so little,
    # rounding would look like signal. Nor do those of a dead neuron, so small that float32 has no
    # digits left for their squares.
    float32 = np.finfo(np.float32)
    rounding = np.maximum(8 * float32.eps * np.abs(mean), np.sqrt(float32.tiny) / float32.eps)
    varies = scale > rounding
    if varies.any():
        # A nearly dead neuron carries the rounding of the large numbers that its layer computed it
        # from: GELU gives 1e-6 at -5, give or take 1e-7, and differently in every batch. What
        # varies by less than half the digits of its layer's columns is taken for that.
        varies &= scale > np.sqrt(eps) * np.median(scale[varies])
    return mean, np.where(varies, scale, 1.0)


def _mean_and_deviation(
    block: np.ndarray, row_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average and standard deviation of each column, in float64.

    scikit-learn's StandardScaler gives the same numbers, in more time than it takes to solve the
    probe: it looks for missing values and corrects for rounding that two passes do not have.
    """
    shares = row_weights / row_weights.sum()  # (n_texts,)
    parts = list(_parts(len(block), block))
    mean = sum(shares[rows] @ block[rows].astype(np.float64) for rows in parts)
    variance = np.zeros(block.shape[1])
    for rows in parts:
        away = block[rows].astype(np.float64)  # (n_rows, n_neurons)
        away -= mean
        variance += shares[rows] @ np.square(away, out=away)
    return mean, np.sqrt(variance)
