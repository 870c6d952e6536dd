"""Batches on a CPU: one on each core side by side, or one after another on all of them.

Threads that share a batch wait for each other after every product, long on a busy machine. Threads
with a batch each do not, but each reads all weights, so with a large model sharing may be faster.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from skspin._system import after_fork

Result = TypeVar("Result")
# Takes a job; gives a function that waits for its result.
Runner = Callable[[Callable[[], Result]], Callable[[], Result]]

_lock = threading.Lock()
_n_pools = 0  # pools that run now, each for an extraction of its own
_n_threads = 1  # torch's number of threads before the first pool, restored after the last


def usable_cores(device: torch.device) -> int:
    """Count the batches that may run side by side: torch's limit on threads, shared by callers."""
    if device.type != "cpu":
        return 1
    with _lock:
        n_threads = _n_threads if _n_pools else torch.get_num_threads()
        return max(1, n_threads // (_n_pools + 1))


@contextmanager
def runner(n_at_once: int) -> Iterator[Runner]:
    """Run jobs at once in the caller's thread, or several side by side on one core each."""
    global _n_pools, _n_threads
    if n_at_once == 1:
        yield _run_now
        return
    with _lock:
        if not _n_pools:
            _n_threads = torch.get_num_threads()
        _n_pools += 1
    pool = ThreadPoolExecutor(n_at_once, "skspin-core", torch.set_num_threads, (1,))
    try:
        yield lambda job: pool.submit(job).result
    finally:
        pool.shutdown(cancel_futures=True)  # no job starts after an error or an interrupt
        # Part of the setting is per thread and part (MKL's) per process, so only the last pool can
        # restore it.
        with _lock:
            _n_pools -= 1
            if not _n_pools:
                torch.set_num_threads(_n_threads)


def _run_now(job: Callable[[], Result]) -> Callable[[], Result]:
    result = job()
    return lambda: result


@after_fork
def _recover_from_fork() -> None:
    """Forget the parent's pools, whose threads do not exist in the child."""
    global _lock, _n_pools
    _lock, _n_pools = threading.Lock(), 0
