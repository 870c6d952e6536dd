"""One layer's columns, standardised in passing, and the products that probes need of them.

Activations may be an array, or a tensor, which stays on its device and is only read. Each product
is split by rows among threads. These replace BLAS's own threads, which wait for one another at
every small product: where other programs keep the cores busy, thousands of products wait for the
scheduler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
from sklearn.utils import gen_batches
from threadpoolctl import ThreadpoolController

from skspin._system import thread_pool

# Values converted at a time, however wide rows are: such a copy stays in a core's cache.
_CONVERTED_ON_HOST, _CONVERTED_ON_DEVICE = 2**17, 2**24
# Rows of a Gram matrix's product at a time; on the host they stay in a core's cache, too.
_GRAM_ROWS_ON_HOST, _GRAM_ROWS_ON_DEVICE = 1024, 65_536
_WORKER = "skspin-probes"


def is_tensor(array: Any) -> bool:
    """Whether an array that was validated is a tensor, found out without importing torch."""
    return not isinstance(array, np.ndarray)


def to_host(array: Any) -> Any:
    """Copy a tensor to NumPy; leave all else as it is."""
    return array.detach().cpu().numpy() if hasattr(array, "cpu") else array


def mean_and_deviation(X: Any, row_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average and standard deviation of each column of a float32 array or tensor, in float64."""
    # StandardScaler gives the same numbers, in more time than it takes to solve the probe: it looks
    # for missing values and corrects for rounding that two passes do not have.
    shares = row_weights / row_weights.sum()  # (n_texts,)
    n_values = _CONVERTED_ON_DEVICE if is_tensor(X) else _CONVERTED_ON_HOST
    batches = list(gen_batches(len(X), max(1, n_values // X.shape[1])))
    if is_tensor(X):
        shares = X[:0].double().new_tensor(shares)
    mean = sum(shares[rows] @ _double(X[rows]) for rows in batches)
    variance: Any = 0.0
    for rows in batches:
        away = _double(X[rows])  # (n_rows, n_columns)
        away -= mean
        away *= away
        variance += shares[rows] @ away
    return to_host(mean), np.sqrt(to_host(variance))


def _double(block: Any) -> Any:
    return block.double() if is_tensor(block) else block.astype(np.float64)


class Columns:
    """Products with the matrix ``Z = (X - mean) / scale``, which is never computed.

    Mean and scale are folded into the products. Arguments and results are float64, except for the
    Gram matrix. ``X`` is read without a copy, or converted to ``dtype`` in blocks of rows.
    """

    def __init__(
        self,
        X: Any,  # (n_texts, n_columns), float32; an array, or a tensor on `device`
        mean: np.ndarray,  # (n_columns,), as is scale
        scale: np.ndarray,
        dtype: str,
        device: str | None,  # of torch; None for NumPy
        threads: Threads,
    ) -> None:
        self._X, self._mean, self._scale = X, mean, scale
        self._given = X  # where it was: variances need float64, which not all devices have
        if device is None:
            self._load: Callable = partial(np.asarray, dtype=dtype)
            self._threads = threads
            self._gram_rows, self._n_converted = _GRAM_ROWS_ON_HOST, _CONVERTED_ON_HOST
        else:
            import torch

            options = {"dtype": getattr(torch, dtype), "device": device}
            self._load = partial(torch.as_tensor, **options)
            self._threads = Threads()  # a device divides its work by itself
            self._gram_rows, self._n_converted = _GRAM_ROWS_ON_DEVICE, _CONVERTED_ON_DEVICE
            if not is_tensor(X):
                self._X = torch.tensor(X, **options)
        self._converts = str(self._X.dtype).removeprefix("torch.") != dtype

    @cached_property
    def variances(self) -> np.ndarray:
        """Compute the variance of each column of ``Z``, (n_columns,)."""
        _, deviation = mean_and_deviation(self._given, np.ones(len(self._given)))
        return (deviation / self._scale) ** 2

    def scores(self, coef: np.ndarray) -> np.ndarray:
        """Compute ``coef @ Z.T``: (n_problems, n_columns) to (n_problems, n_texts)."""
        folded = coef / self._scale  # (P, d)
        weights = self._load(folded)

        def multiply(stretch: slice) -> np.ndarray:
            products = [_unload(weights @ block.T) for _, block in self._blocks(stretch)]
            return np.concatenate(products, axis=1)

        shares = self._threads.map(multiply, self._stretches())
        return np.concatenate(shares, axis=1) - (folded @ self._mean)[:, None]

    def correlate(self, residuals: np.ndarray) -> np.ndarray:
        """Compute ``residuals @ Z``: (n_problems, n_texts) to (n_problems, n_columns)."""
        loaded = self._load(residuals)  # (P, n)

        def multiply(stretch: slice) -> np.ndarray:
            products = [_unload(loaded[:, rows] @ block) for rows, block in self._blocks(stretch)]
            return np.sum(products, axis=0)

        sums = np.sum(self._threads.map(multiply, self._stretches()), axis=0)  # (P, d)
        return (sums - residuals.sum(axis=1, keepdims=True) * self._mean) / self._scale

    def gram(self, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Compute ``Z.T @ diag(weights) @ Z`` of chosen columns, less their weighted means.

        Subtracting the means has the effect of an intercept without a penalty. The result has the
        dtype of the products, and is not finite where the dtype overflows.
        """
        mean, scale = self._load(self._mean[chosen]), self._load(self._scale[chosen])  # (k,)

        def multiply(stretch: slice) -> tuple[Any, Any]:
            products: Any = 0.0
            sums: Any = 0.0
            for rows, block in self._blocks(stretch, self._gram_rows):
                columns, roots = _take(block, chosen), np.sqrt(weights[rows])  # (m, k), (m,)
                kept = np.flatnonzero(roots)
                if len(kept) < 0.9 * len(roots):  # rows outside a fold
                    columns, roots = columns[kept], roots[kept]
                roots = self._load(roots)
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
        return to_host(products)

    def _stretches(self) -> list[slice]:
        return self._threads.split(len(self._X), self._gram_rows)

    def _blocks(self, stretch: slice, n_rows: int | None = None) -> Iterator[tuple[slice, Any]]:
        n_rows = n_rows or len(self._X)
        if self._converts:
            n_rows = min(n_rows, max(1, self._n_converted // self._X.shape[1]))
        for start in range(stretch.start, stretch.stop, n_rows):
            rows = slice(start, min(start + n_rows, stretch.stop))
            yield rows, self._load(self._X[rows])


def _take(block: Any, columns: np.ndarray) -> Any:
    # "clip" does without the buffer that errors need, in a fraction of the time.
    return block[:, columns] if is_tensor(block) else block.take(columns, axis=1, mode="clip")


def _unload(product: Any) -> np.ndarray:
    return to_host(product).astype(np.float64, copy=False)


class Threads:
    """Calls a function for several arguments in parallel, where that can pay."""

    def __init__(self, n_threads: int = 1, pool: Executor | None = None) -> None:
        self._n_threads, self._pool = n_threads, pool

    def map(self, function: Callable, *arguments: Iterable) -> list[Any]:
        """Call a function for each argument; return the results in the order of the arguments."""
        calls = list(zip(*arguments, strict=False))  # what is the same for all comes from `repeat`
        # With fewer arguments than threads, and inside another call, one thread does it all: work
        # is split by problems or by rows, and the other split then keeps all threads busy.
        inside = threading.current_thread().name.startswith(_WORKER)
        if self._pool is None or len(calls) < self._n_threads or inside:
            return [function(*call) for call in calls]
        return list(self._pool.map(lambda call: function(*call), calls))

    def split(self, n_rows: int, smallest: int) -> list[slice]:
        """Cut rows into one stretch per thread, none much smaller than ``smallest``."""
        # scikit-learn's gen_even_slices takes longer for its checks than a small product.
        n_shares = max(1, min(self._n_threads, n_rows // smallest))
        edges = [n_rows * share // n_shares for share in range(n_shares + 1)]
        return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


class _Blas:
    """Counts the callers that limit BLAS to one thread, as the limit is one per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0

    @contextmanager
    def replaced(self) -> Iterator[Threads]:
        """Start as many threads as BLAS would use, and limit BLAS to one meanwhile.

        Limits on BLAS that joblib, threadpoolctl or the environment set so apply to these threads.
        """
        blas = _libraries().select(user_api="blas")
        with self._lock:
            if self._n_users == 0:
                sizes = [library["num_threads"] for library in blas.info()]
                self._n_threads = max(sizes, default=1)
                self._limit = blas.limit(limits=1)
            self._n_users += 1
            n_threads = self._n_threads
        try:
            if n_threads == 1:
                yield Threads()
            else:
                with thread_pool(n_threads, _WORKER) as pool:
                    yield Threads(n_threads, pool)
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


threads_in_place_of_blas = _Blas().replaced
