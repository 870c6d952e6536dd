"""What holds locks or files must start anew in a forked child."""

from __future__ import annotations

import os
import weakref
from typing import Any

_RENEWABLE: weakref.WeakSet[Any] = weakref.WeakSet()


def renew_in_child(thing: Any) -> None:
    """Have ``thing.renew()`` called in every process that is forked from this one.

    A lock that another thread held at the fork would stay locked for ever in the child, and a file
    that both processes append to would be torn.
    """
    _RENEWABLE.add(thing)


def _renew_all() -> None:
    for thing in list(_RENEWABLE):
        thing.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
