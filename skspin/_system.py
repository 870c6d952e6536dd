"""Warnings at the line of the user's code, threads, forked processes, and the machine's memory."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Frames of these packages stand between a user's line and the code that warns.
_IN_BETWEEN = {"skspin", "sklearn", "joblib", "contextlib"}
_ASSUMED_MEMORY = 8 * 1024**3  # bytes, where the system does not tell
_held = threading.local()
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest line that is neither skspin's nor scikit-learn's nor joblib's."""
    if (held := getattr(_held, "messages", None)) is not None:
        held.append(str(message))
        return
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in _IN_BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def hold_warnings(function: Callable[..., object], *args: Any) -> list[str]:
    """Call a function, and return its warnings, for the thread of the user's line to issue."""
    messages: list[str] = []
    _held.messages = messages
    try:
        function(*args)
    finally:
        del _held.messages
    return messages


def after_fork(recover: Callable[[], None]) -> Callable[[], None]:
    """Call a function in each process that is forked from this one."""
    if hasattr(os, "register_at_fork"):  # Windows never forks.
        os.register_at_fork(after_in_child=recover)
    return recover


@contextmanager
def thread_pool(
    n_threads: int, name: str, start: Callable[[], object] = lambda: None
) -> Iterator[ThreadPoolExecutor]:
    """Run jobs in threads, each of which calls ``start`` first; none is left in the end."""
    # Python takes a thread for ended a little before the system does. Meanwhile MKL cleans up under
    # a lock, for which a process that is forked at this moment would wait forever.
    own: list[str] = []  # as long as there is such a file, there is the thread; on Linux

    def begin() -> None:
        own.append(f"/proc/self/task/{threading.get_native_id()}")
        start()

    pool = ThreadPoolExecutor(n_threads, name, begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # no job starts after an error or an interrupt
        deadline = time.monotonic() + 1  # another thread may have got the number
        while any(map(os.path.exists, own)) and time.monotonic() < deadline:
            time.sleep(1e-4)


def machine_memory() -> int:
    """Return the memory in bytes of this machine, or of its container if that has less."""
    sizes = []
    with suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # ValueError: the file says "max"
            sizes.append(int(Path(path).read_text()))
    return min(sizes, default=_ASSUMED_MEMORY)


def return_free_memory() -> None:
    """Have glibc hand freed memory back to the system; other C libraries do so by themselves."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
