"""Give memory that was freed back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_free_memory() -> None:
    """Have glibc hand freed memory back; left alone, it keeps most of it, in pieces.

    Other C libraries do so by themselves, or have no word for it: then nothing happens.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
