"""Threads of our own in place of BLAS's, which wait for one another at every small product."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


class Threads:
    """Runs a function for several arguments at once, where that can pay.

    Parameters
    ----------
    n_threads : int
        How many to use.
    pool : Executor or None
        Runs them; None for one thread.
    """

    def __init__(self, n_threads: int = 1, pool: Executor | None = None) -> None:
        self.n_threads = n_threads
        self._pool = pool
        self._inside = threading.local()

    def map(self, function: Callable, *arguments: Iterable) -> list[Any]:
        """Call a function for each argument, in order of results.

        Fewer arguments than threads are left to one thread, and so is what a thread of ours calls
        again: the other level of the work has more of it.
        """
        calls = list(zip(*arguments, strict=True))
        if self._pool is None or len(calls) < self.n_threads or hasattr(self._inside, "busy"):
            return [function(*call) for call in calls]

        def run(call: tuple) -> Any:
            self._inside.busy = True
            return function(*call)

        return list(self._pool.map(run, calls))

    def split(self, n_rows: int, smallest: int) -> list[slice]:
        """Cut rows into one stretch per thread, none much smaller than ``smallest``."""
        n_parts = max(1, min(self.n_threads, n_rows // smallest))
        edges = [n_rows * part // n_parts for part in range(n_parts + 1)]
        return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


@contextmanager
def own_threads() -> Iterator[Threads]:
    """Use as many threads as BLAS would, which has one meanwhile.

    A product that BLAS shares out ends when its last thread does; where other programs keep the
    cores busy, each of thousands of small products waits for the scheduler. Our threads meet a few
    times per step. Limits that joblib, threadpoolctl or the environment set are BLAS's limits and
    so hold here.
    """
    with _BLAS.limited() as n_threads:
        if n_threads == 1:
            yield Threads()
            return
        with ThreadPoolExecutor(n_threads) as pool:
            yield Threads(n_threads, pool)


class _Blas:
    """Counts who wants BLAS to have one thread: its setting belongs to the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._n_threads = 1
        self._limit: Any = None

    @contextmanager
    def limited(self) -> Iterator[int]:
        with self._lock:
            if self._n_users == 0:
                blas = _libraries().select(user_api="blas")
                self._n_threads = max((part["num_threads"] for part in blas.info()), default=1)
                self._limit = blas.limit(limits=1)
            self._n_users += 1
        try:
            yield self._n_threads
        finally:
            with self._lock:
                self._n_users -= 1
                if self._n_users == 0:
                    self._limit.restore_original_limits()


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


_BLAS = _Blas()
