"""A thread in the background that makes one call at a time, in order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from skspin._system import held_warnings, warn


class Writer:
    """Calls a function in the background, and passes its errors and warnings on by `wait`.

    There is at most one call at a time. It is finished even if the caller is interrupted meanwhile.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[list[str]] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a call is running."""
        return self._running is not None and not self._running.done()

    def begin(self, function: Callable[[], object]) -> None:
        """Call a function when the call before it has ended."""
        self.wait()
        if self._pool is None:  # most callers write once, at their end
            self._pool = ThreadPoolExecutor(1, "skspin-store")
        self._running = self._pool.submit(_call, function)

    def wait(self) -> None:
        """Wait for the end of the call; raise its error, or issue its warnings."""
        if self._running is not None:
            wait([self._running])  # interrupted here, it can be waited for again
            running, self._running = self._running, None
            for message in running.result():
                warn(message)

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()


def _call(function: Callable[[], object]) -> list[str]:
    with held_warnings() as messages:
        function()
    return messages
