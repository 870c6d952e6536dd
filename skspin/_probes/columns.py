"""One layer's columns, standardised in passing, and the three products that probes need of them.

Each product is split by rows among threads. These replace BLAS's own threads, which wait for one
another at every small product: where other programs keep the cores busy, thousands of products wait
for the scheduler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController


class Columns:
    """Products with the matrix ``Z = (X - mean) / scale``, which is never computed.

    Mean and scale are folded into the products. Arguments and results are float64, except for the
    Gram matrix. ``X`` is read without a copy, or converted to ``dtype`` in blocks of rows. A tensor
    stays where it is, so ``device`` is then its own.
    """

    def __init__(
        self,
        X: Any,  # (n_texts, n_columns), float32; an array or a tensor
        mean: np.ndarray,  # (n_columns,), as is scale
        scale: np.ndarray,
        dtype: str,
        device: str | None,
        threads: Threads,
    ) -> None:
        self._arrays: Any = _HostArrays(dtype) if device is None else _TorchArrays(dtype, device)
        # A device divides its work by itself.
        self._threads = threads if device is None else Threads()
        self._X = self._arrays.hold(X)  # (n, d)
        self._mean, self._scale = mean, scale  # (d,)

    def scores(self, coef: np.ndarray) -> np.ndarray:
        """Compute ``coef @ Z.T``: (n_problems, n_columns) to (n_problems, n_texts)."""
        folded = coef / self._scale  # (P, d)
        weights = self._arrays.load(folded)

        def multiply(stretch: slice) -> np.ndarray:
            products = [weights @ block.T for _, block in self._blocks(stretch)]
            return np.concatenate([self._arrays.unload(product) for product in products], axis=1)

        shares = self._threads.map(multiply, self._stretches())
        return np.concatenate(shares, axis=1) - (folded @ self._mean)[:, None]

    def correlate(self, residuals: np.ndarray) -> np.ndarray:
        """Compute ``residuals @ Z``: (n_problems, n_texts) to (n_problems, n_columns)."""
        loaded = self._arrays.load(residuals)  # (P, n)

        def multiply(stretch: slice) -> np.ndarray:
            products = [loaded[:, rows] @ block for rows, block in self._blocks(stretch)]
            return np.sum([self._arrays.unload(product) for product in products], axis=0)

        sums = np.sum(self._threads.map(multiply, self._stretches()), axis=0)  # (P, d)
        return (sums - residuals.sum(axis=1, keepdims=True) * self._mean) / self._scale

    def gram(self, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Compute ``Z.T @ diag(weights) @ Z`` of chosen columns, less their weighted means.

        Subtracting the means has the effect of an intercept without a penalty. The result has the
        dtype of the products, and is not finite where the dtype overflows.
        """
        arrays = self._arrays
        index = arrays.load_index(chosen)
        mean, scale = arrays.load(self._mean[chosen]), arrays.load(self._scale[chosen])  # (k,)

        def multiply(stretch: slice) -> tuple[Any, Any]:
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
                with np.errstate(over="ignore", invalid="ignore"):  # the caller checks
                    products = products + columns.T @ columns  # (k, k)
                sums = sums + roots @ columns  # (k,)
            return products, sums

        shares = self._threads.map(multiply, self._stretches())
        products, sums = (sum(terms[1:], start=terms[0]) for terms in zip(*shares, strict=True))
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
            n_rows = min(n_rows, max(1, self._arrays.converted // self._X.shape[1]))
        for start in range(stretch.start, stretch.stop, n_rows):
            rows = slice(start, min(start + n_rows, stretch.stop))
            yield rows, self._arrays.cast(self._X[rows])


class _HostArrays:
    """The array operations of the products, in NumPy."""

    # A block of this size stays in a core's cache between the few passes over it.
    gram_rows = 1024
    converted = 2**20  # values converted at a time, however wide rows are: 8 MiB of float64

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
    """The same operations in torch."""

    rows = None
    converts = False  # an array from the host is converted once, by `hold`
    converted = 2**24
    gram_rows = 65_536

    def __init__(self, dtype: str, device: str) -> None:
        import torch

        self._torch, self._dtype, self._device = torch, getattr(torch, dtype), device

    def hold(self, X: Any) -> Any:
        if isinstance(X, np.ndarray):
            return self.load(X)
        self.converts = X.dtype != self._dtype
        return X

    def load(self, array: np.ndarray) -> Any:
        return self._torch.tensor(array, dtype=self._dtype, device=self._device)

    def load_index(self, index: np.ndarray) -> Any:
        return self._torch.tensor(index, device=self._device)

    def cast(self, block: Any) -> Any:
        return block.to(self._dtype)

    def take(self, block: Any, index: Any) -> Any:
        return block.index_select(1, index)

    def unload(self, array: Any, keep_dtype: bool = False) -> np.ndarray:
        values = array.cpu().numpy()
        return values if keep_dtype else values.astype(np.float64)


class Threads:
    """Calls a function for several arguments in parallel, where that can pay."""

    def __init__(self, n_threads: int = 1, pool: Executor | None = None) -> None:
        self.n_threads = n_threads
        self._pool = pool
        self._inside = threading.local()

    def map(self, function: Callable, *arguments: Iterable) -> list[Any]:
        """Call a function for each argument; return the results in the order of the arguments."""
        calls = list(zip(*arguments, strict=True))
        # With fewer arguments than threads, and inside another call, one thread does it all: work
        # is split by problems or by rows, and the other split then keeps all threads busy.
        if self._pool is None or len(calls) < self.n_threads or hasattr(self._inside, "busy"):
            return [function(*call) for call in calls]

        def run(call: tuple) -> Any:
            self._inside.busy = True
            return function(*call)

        return list(self._pool.map(run, calls))

    def split(self, n_rows: int, smallest: int) -> list[slice]:
        """Cut rows into one stretch per thread, none much smaller than ``smallest``."""
        n_shares = max(1, min(self.n_threads, n_rows // smallest))
        edges = [n_rows * share // n_shares for share in range(n_shares + 1)]
        return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


@contextmanager
def threads_in_place_of_blas() -> Iterator[Threads]:
    """Start as many threads as BLAS would use, and limit BLAS to one meanwhile.

    Limits on BLAS that joblib, threadpoolctl or the environment set so apply to these threads.
    """
    with _BLAS.limited() as n_threads:
        if n_threads == 1:
            yield Threads()
            return
        with ThreadPoolExecutor(n_threads) as pool:
            yield Threads(n_threads, pool)


class _Blas:
    """Counts the callers that limit BLAS to one thread, as the limit is one per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._n_threads = 1
        self._limit: Any = None

    @contextmanager
    def limited(self) -> Iterator[int]:
        blas = _libraries().select(user_api="blas")
        with self._lock:
            if self._n_users == 0:
                self._n_threads = max(
                    (library["num_threads"] for library in blas.info()), default=1
                )
                self._limit = blas.limit(limits=1)
            self._n_users += 1
        try:
            yield self._n_threads
        finally:
            with self._lock:
                self._n_users -= 1
                if self._n_users == 0:
                    self._limit.restore_original_limits()
                # From threadpoolctl 3.8 on, the first thread that sets a limit is the only one that
                # may set limits, until it leaves a "with". The last caller may be another thread.
                with blas.limit(limits=None):
                    pass


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


_BLAS = _Blas()
