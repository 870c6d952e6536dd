"""Activations that are tensors on a device, as scikit-learn's array API dispatch lets them through.

They stay there and are only read; small results are copied to the host, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_CONVERTED = 2**24  # values converted to float64 at a time: 128 MiB


def is_tensor(array: Any) -> bool:
    """Whether an array that was validated is a tensor, found out without importing torch."""
    return not isinstance(array, np.ndarray)


def to_host(array: Any) -> Any:
    """Copy a tensor to NumPy; leave all else as it is."""
    return array.detach().cpu().numpy() if hasattr(array, "cpu") else array


def blocks(X: Any) -> Iterator[tuple[slice, Any]]:
    """Convert rows of a tensor (n_rows, n_columns) to float64, some at a time."""
    step = max(1, _CONVERTED // X.shape[1])
    for start in range(0, len(X), step):
        rows = slice(start, start + step)
        yield rows, X[rows].double()


def mean_and_deviation(X: Any, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average and standard deviation of each column, given each row's share, (n_rows,)."""
    weights = next(blocks(X))[1].new_tensor(shares)
    mean = sum(weights[rows] @ block for rows, block in blocks(X))
    variance = sum(weights[rows] @ (block - mean).square() for rows, block in blocks(X))
    return to_host(mean), np.sqrt(to_host(variance))
