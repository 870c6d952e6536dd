"""Notice that another process holds the same model on the same GPU.

A process that loads a model on a GPU locks a file that is named after both. The system takes a lock
from a process that ends, however it ends; so a file that is locked means a process that is there.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import xxhash

try:
    import fcntl
except ImportError:  # Windows: nobody is noticed
    fcntl = None  # type: ignore[assignment]

_held: dict[Path, int] = {}  # locked files of this process, with their descriptors
_warned = False


def warn_of_neighbours(device: str, fingerprint: str, name: str) -> None:
    """Warn, once per process, if another process has loaded this model on this GPU.

    Parameters
    ----------
    device : str
        Where the model is loaded. Nothing happens unless it is a CUDA device.
    fingerprint : str
        Of the model.
    name : str
        Of the model, for people.
    """
    global _warned
    card = card_of(device)
    if card is None or fcntl is None or _is_first(card, fingerprint) or _warned:
        return
    _warned = True
    warnings.warn(
        f"Another process has loaded model={name!r} on this GPU ({device}) too, so its memory "
        "holds the model more than once. If these are the workers of a search: set cache to a "
        "folder and transform all texts once before the search; then no worker loads the model.",
        UserWarning,
        stacklevel=2,
    )


def leave() -> None:
    """Say that this process holds no model any more."""
    while _held:
        os.close(_held.popitem()[1])


def card_of(device: str) -> str | None:
    """Name the piece of hardware behind a CUDA device; None for other devices.

    A device's number will not do: each process may see other cards, and so number them otherwise.
    """
    if not device.startswith("cuda"):
        return None
    import torch

    properties: Any = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", None) or f"{properties.name} {device}")


def _is_first(card: str, fingerprint: str) -> bool:
    """Lock the file of this model on this card; False if another process has."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    folder = Path(tempfile.gettempdir(), f"skspin-{user}")
    path = folder / f"{xxhash.xxh3_128_hexdigest(f'{card} {fingerprint}'.encode())}.lock"
    if path in _held:
        return True
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # No place for files: advice is not worth an error.
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    except OSError:  # some network file systems
        os.close(file)
        return True
    _held[path] = file
    return True
