"""One layer's columns, standardised in passing, and the three products that probes need of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from skspin._probes.threads import Threads

_CONVERTED = 2**20  # values converted at a time, however wide rows are: 8 MiB of float64


class Columns:
    """The matrix ``Z = (X - mean) / scale``, without ever holding it.

    Mean and scale are folded into the products. ``X`` is read as it lies; where the arithmetic is
    not its own, it is converted block of rows by block of rows.

    Parameters
    ----------
    X : ndarray of shape (n_texts, n_columns), float32
        Raw activations.
    mean, scale : ndarray of shape (n_columns,), float64
        What to subtract and what to divide by.
    dtype : {"float32", "float64"}
        The arithmetic of the products. All that goes in and comes out is float64, save the Gram
        matrix.
    device : str or None
        None for NumPy, or the torch device that holds a copy of ``X`` and multiplies.
    threads : Threads or None
        Share NumPy's work out by rows; None for one thread.
    """

    def __init__(
        self,
        X: np.ndarray,
        mean: np.ndarray,
        scale: np.ndarray,
        dtype: str = "float32",
        device: str | None = None,
        threads: Threads | None = None,
    ) -> None:
        self._arrays: Any = _HostArrays(dtype) if device is None else _TorchArrays(dtype, device)
        # A device shares its work out by itself.
        self._threads = Threads() if threads is None or device is not None else threads
        self._X = self._arrays.hold(X)  # (n, d)
        self._mean, self._scale = mean, scale  # (d,)

    def scores(self, coef: np.ndarray) -> np.ndarray:
        """Compute ``coef @ Z.T``: (n_problems, n_columns) to (n_problems, n_texts)."""
        folded = coef / self._scale  # (P, d)
        weights = self._arrays.load(folded)

        def part(stretch: slice) -> np.ndarray:
            products = [weights @ block.T for _, block in self._blocks(stretch)]
            return np.concatenate([self._arrays.unload(product) for product in products], axis=1)

        parts = self._threads.map(part, self._stretches())
        return np.concatenate(parts, axis=1) - (folded @ self._mean)[:, None]

    def correlate(self, residuals: np.ndarray) -> np.ndarray:
        """Compute ``residuals @ Z``: (n_problems, n_texts) to (n_problems, n_columns)."""
        loaded = self._arrays.load(residuals)  # (P, n)

        def part(stretch: slice) -> np.ndarray:
            products = [loaded[:, rows] @ block for rows, block in self._blocks(stretch)]
            return np.sum([self._arrays.unload(product) for product in products], axis=0)

        sums = np.sum(self._threads.map(part, self._stretches()), axis=0)  # (P, d)
        return (sums - residuals.sum(axis=1, keepdims=True) * self._mean) / self._scale

    def gram(self, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Compute the weighted covariance of some columns of Z, times the sum of the weights.

        Taking each column's weighted mean out of it is what an intercept does that costs nothing.

        Parameters
        ----------
        chosen : ndarray of shape (n_chosen,), int
            Which columns.
        weights : ndarray of shape (n_texts,), float64
            Weights of the rows, not negative.

        Returns
        -------
        gram : ndarray of shape (n_chosen, n_chosen)
            In the arithmetic of the products; not finite where it cannot hold them.
        """
        arrays = self._arrays
        index = arrays.load_index(chosen)
        mean, scale = arrays.load(self._mean[chosen]), arrays.load(self._scale[chosen])  # (k,)

        def part(stretch: slice) -> tuple[Any, Any]:
            products: Any = 0.0
            sums: Any = 0.0
            for rows, block in self._blocks(stretch, arrays.gram_rows):
                columns, roots = arrays.take(block, index), np.sqrt(weights[rows])  # (m, k), (m,)
                kept = np.flatnonzero(roots)
                if len(kept) < 0.9 * len(roots):  # rows outside a fold
                    columns, roots = columns[arrays.load_index(kept)], roots[kept]
                roots = arrays.load(roots)
                # Centred before it is squared: float32 loses small differences of large numbers.
                columns -= mean
                columns *= roots[:, None]
                with np.errstate(over="ignore", invalid="ignore"):  # then infinite, as promised
                    products = products + columns.T @ columns  # (k, k)
                sums = sums + roots @ columns  # (k,)
            return products, sums

        parts = self._threads.map(part, self._stretches())
        products, sums = (sum(terms[1:], start=terms[0]) for terms in zip(*parts, strict=True))
        with np.errstate(over="ignore", invalid="ignore"):
            products -= sums[:, None] * (sums / float(weights.sum()))
        products /= scale
        products /= scale[:, None]
        return arrays.unload(products, keep_dtype=True)

    def _stretches(self) -> list[slice]:
        return self._threads.split(len(self._X), self._arrays.gram_rows)

    def _blocks(self, stretch: slice, n_rows: int | None = None) -> Iterator[tuple[slice, Any]]:
        n_rows = n_rows or self._arrays.rows or len(self._X)
        if self._arrays.converts:
            n_rows = min(n_rows, max(1, _CONVERTED // self._X.shape[1]))
        for start in range(stretch.start, stretch.stop, n_rows):
            rows = slice(start, min(start + n_rows, stretch.stop))
            yield rows, self._arrays.cast(self._X[rows])


class _HostArrays:
    """What NumPy calls things."""

    # A block of this size stays in a core's cache between the few passes over it.
    gram_rows = 1024

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self.converts = dtype != "float32"
        self.rows = self.gram_rows if self.converts else None

    def hold(self, X: np.ndarray) -> np.ndarray:
        return X

    def load(self, array: np.ndarray) -> np.ndarray:
        return array.astype(self._dtype)

    def load_index(self, index: np.ndarray) -> np.ndarray:
        return index

    def cast(self, block: np.ndarray) -> np.ndarray:
        return block.astype(self._dtype, copy=False)

    def take(self, block: np.ndarray, index: np.ndarray) -> np.ndarray:
        # "clip" does without the buffer that errors need, in a fraction of the time.
        return block.take(index, axis=1, mode="clip")

    def unload(self, array: np.ndarray, keep_dtype: bool = False) -> np.ndarray:
        return array if keep_dtype else array.astype(np.float64, copy=False)


class _TorchArrays:
    """What torch calls them."""

    rows = None
    converts = False  # all is held in the arithmetic of the products
    gram_rows = 65_536

    def __init__(self, dtype: str, device: str) -> None:
        import torch

        self._torch, self._dtype, self._device = torch, getattr(torch, dtype), device

    def hold(self, X: np.ndarray) -> Any:
        return self.load(X)

    def load(self, array: np.ndarray) -> Any:
        return self._torch.tensor(array, dtype=self._dtype, device=self._device)

    def load_index(self, index: np.ndarray) -> Any:
        return self._torch.tensor(index, device=self._device)

    def cast(self, block: Any) -> Any:
        return block

    def take(self, block: Any, index: Any) -> Any:
        return block.index_select(1, index)

    def unload(self, array: Any, keep_dtype: bool = False) -> np.ndarray:
        values = array.cpu().numpy()
        return values if keep_dtype else values.astype(np.float64)
