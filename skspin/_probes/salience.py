"""From a probe's coefficients to the neurons worth keeping; pure functions.

The rule is SPIN's [1]_: a neuron's salience, (n_neurons,), is its squared weight in the layer's
sparse probe, and a layer keeps the fewest neurons that together hold a given share of its salience.

References
----------
.. [1] Jiao et al., "SPIN: Sparsifying and Integrating Internal Neurons in Large Language Models
   for Text Classification", Findings of ACL 2024, arXiv:2311.15983.
"""

from __future__ import annotations

import numpy as np

# How a weight becomes salience, which is then summed over classes.
SALIENCES = {"squared": np.square, "absolute": np.abs}


def most_salient(salience: np.ndarray, sparsity: float, criterion: str) -> np.ndarray:
    """Return a mask of the neurons to keep, none if all salience is zero; (n_neurons,)."""
    order = np.argsort(-salience, kind="stable")  # ties go to the lower column
    keep = np.zeros(salience.shape, dtype=bool)
    if salience.any():
        keep[order[: CRITERIA[criterion](salience[order], sparsity)]] = True
    return keep


def _fewest_that_hold(falling: np.ndarray, sparsity: float) -> int:
    """Count the largest neurons that together hold at least ``1 - sparsity`` of the salience."""
    held = np.cumsum(falling)
    # Rounding must not add a neuron: of ten neurons with 0.1 each, three hold 0.3, not four.
    rounding = falling.size * np.finfo(np.float64).eps
    return int(np.searchsorted(held, (1.0 - sparsity) * held[-1] * (1.0 - rounding))) + 1


def _share_of_neurons(falling: np.ndarray, sparsity: float) -> int:
    """Count the neurons that are left when the given share of them, rounded down, is dropped."""
    # 0.29 * 100 is 28.999999999999996
    return falling.size - int(np.floor(sparsity * falling.size + 1e-9))


CRITERIA = {"salience": _fewest_that_hold, "count": _share_of_neurons}
