"""Solved probes, found again by their content.

A search over sparsity fits the same probes on the same rows again and again. They are told apart by
a digest of everything that decides a solution, so nothing is ever recalled for other data.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import xxhash

from skspin._digest import array_digest
from skspin._layer_probe import LayerProbe, ProbeSettings, fit_layer_probe
from skspin._targets import Targets

# Solutions are small beside the activations they stand for: 6 layers of 1,536 neurons and 77
# classes take 6 MB.
_LIMIT = 256 * 2**20  # bytes
_kept: OrderedDict[bytes, LayerProbe] = OrderedDict()
_lock = threading.Lock()


def recall_or_fit_layer_probe(
    block: np.ndarray, targets: Targets, validation: np.ndarray, settings: ProbeSettings
) -> LayerProbe:
    """Do as `fit_layer_probe`, unless this process has solved the very same probe before."""
    key = _content_of(block, targets, validation, settings)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    probe = fit_layer_probe(block, targets, validation, settings)
    probe.coef.flags.writeable = False  # it is handed out again and again
    with _lock:
        _kept[key] = probe
        while sum(kept.coef.nbytes for kept in _kept.values()) > _LIMIT:
            _kept.popitem(last=False)
    return probe


def forget_probes() -> None:
    """Release all kept probes."""
    with _lock:
        _kept.clear()


def _content_of(
    block: np.ndarray, targets: Targets, validation: np.ndarray, settings: ProbeSettings
) -> bytes:
    arrays = (block, targets.signs, targets.weights, targets.row_weights, validation)
    # Two targets of the same signs are scored alike only if classes exclude each other in both.
    parts = [array_digest(array) for array in arrays] + [
        repr((settings, targets.exclusive)).encode()
    ]
    return xxhash.xxh3_128_digest(b"".join(parts))
