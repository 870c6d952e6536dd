"""From a probe's coefficients to the neurons worth keeping; pure functions.

The rule is SPIN's [1]_: a neuron's salience, (n_neurons,), is its squared weight in the layer's
sparse probe, and a layer keeps the fewest neurons that together hold a given share of its salience.
A rule returns a mask of the neurons to keep, which are none if all salience is zero.

References
----------
.. [1] Jiao et al., "SPIN: Sparsifying and Integrating Internal Neurons in Large Language Models
   for Text Classification", Findings of ACL 2024, arXiv:2311.15983.
"""

from __future__ import annotations

import numpy as np


def squared(coef: np.ndarray) -> np.ndarray:
    """Sum squared weights over classes: (n_classes, n_neurons) -> (n_neurons,), SPIN's salience."""
    return np.square(coef, dtype=np.float64).sum(axis=0)


def absolute(coef: np.ndarray) -> np.ndarray:
    """Sum absolute weights over classes: (n_classes, n_neurons) -> (n_neurons,)."""
    return np.abs(coef, dtype=np.float64).sum(axis=0)


SALIENCES = {"squared": squared, "absolute": absolute}


def smallest_covering_set(salience: np.ndarray, sparsity: float) -> np.ndarray:
    """Keep the fewest neurons that together hold at least ``1 - sparsity`` of the salience."""
    order = _by_salience(salience)
    held = np.cumsum(salience[order], dtype=np.float64)
    if held[-1] == 0:
        return np.zeros(salience.shape, dtype=bool)
    # Rounding must not add a neuron: of ten neurons with 0.1 each, three hold 0.3, not four.
    rounding = salience.size * np.finfo(np.float64).eps
    goal = (1.0 - sparsity) * held[-1] * (1.0 - rounding)
    return _first(order, np.searchsorted(held, goal) + 1)


def largest_share(salience: np.ndarray, sparsity: float) -> np.ndarray:
    """Drop the given share of neurons, rounded down, those with the least salience."""
    if not salience.any():
        return np.zeros(salience.shape, dtype=bool)
    dropped = int(np.floor(sparsity * salience.size + 1e-9))  # 0.29 * 100 is 28.999999999999996
    return _first(_by_salience(salience), salience.size - dropped)


CRITERIA = {"salience": smallest_covering_set, "count": largest_share}


def _by_salience(salience: np.ndarray) -> np.ndarray:
    # A stable sort of the negated values: ties go to the lower column.
    return np.argsort(-salience, kind="stable")


def _first(order: np.ndarray, count: int) -> np.ndarray:
    keep = np.zeros(order.shape, dtype=bool)
    keep[order[:count]] = True
    return keep
