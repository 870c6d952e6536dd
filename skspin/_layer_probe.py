"""One layer's probe: standardise its columns, choose C on validation rows, solve on all rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.preprocessing import StandardScaler
from sklearn.utils import gen_batches

from skspin._probes import solve_probes
from skspin._targets import Targets

_ROWS = 256  # measured at a time; scikit-learn's copies of so few stay in the CPU's cache


@dataclass(frozen=True)
class ProbeSettings:
    """What a probe's solution depends on besides the data; sparsity is not among it."""

    C: tuple[float, ...]
    penalty: str
    standardize: bool
    tol: float
    max_iter: int
    device: str | None


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
    block = np.ascontiguousarray(block, dtype=np.float32)
    mean, scale = np.zeros(block.shape[1]), np.ones(block.shape[1])
    if settings.standardize:
        mean, scale = _mean_and_scale(block, targets.row_weights)

    def solve(candidates: tuple[float, ...], weights: np.ndarray):
        n = len(candidates)
        return solve_probes(
            block,
            np.tile(targets.signs, (1, n)),
            C=np.repeat(candidates, targets.n_problems),
            sample_weight=np.tile(weights, (1, n)),
            penalty=settings.penalty,
            tol=settings.tol,
            max_iter=settings.max_iter,
            mean=mean,
            scale=scale,
            device=settings.device,
        )

    training = targets.weights.copy()
    training[validation] = 0
    trial = solve(settings.C, training)
    held_out = (block[validation] - mean) / scale  # (n_rows, n_neurons)
    decisions = held_out @ trial.coef.T + trial.intercept  # (n_rows, n_candidates * n_problems)
    scores = [
        targets.score(decision, validation)
        for decision in np.split(decisions, len(settings.C), axis=1)
    ]
    # Candidates ascend, so of equals the first, and with it the sparsest probe, is taken.
    best = int(np.argmax(scores))
    final = solve(settings.C[best : best + 1], targets.weights)
    return LayerProbe(
        coef=final.coef,
        score=scores[best],
        C=settings.C[best],
        dual_gap=float(final.dual_gap.max()),
        n_iter=int(final.n_iter.max()),
    )


def _mean_and_scale(block: np.ndarray, row_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure each column; one that does not vary gets a scale of 1, and so stays (nearly) 0."""
    scaler = StandardScaler()
    # By parts, because it works on a copy in float64 of what it is given.
    for rows in gen_batches(len(block), _ROWS):
        scaler.partial_fit(block[rows], sample_weight=row_weights[rows])
    # scikit-learn knows columns that are constant in float64. Activations that differ in their last
    # float32 digits only do not vary either: divided by so little, rounding would look like signal.
    # Nor do those of a dead neuron, so small that float32 has no digits left for their squares.
    float32 = np.finfo(np.float32)
    rounding = np.maximum(
        8 * float32.eps * np.abs(scaler.mean_), np.sqrt(float32.tiny) / float32.eps
    )
    return scaler.mean_, np.where(scaler.scale_ > rounding, scaler.scale_, 1.0)
