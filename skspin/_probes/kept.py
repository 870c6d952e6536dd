"""Solved probes, found again by their content.

A search over sparsity fits the same probes on the same rows again and again. They are told apart by
a digest of everything that decides a solution, so nothing is ever recalled for other data.
"""

from __future__ import annotations

import numpy as np
import xxhash

from skspin._probes.layer import LayerProbe, ProbeSettings, fit_layer_probe
from skspin._probes.targets import Targets
from skspin._store.digest import array_digest
from skspin._store.keep import Keep

# Solutions are small beside the activations they stand for: 6 layers of 1,536 neurons and 77
# classes take 6 MB.
_KEPT: Keep[LayerProbe] = Keep(256 * 2**20)  # bytes


def recall_or_fit_layer_probe(
    block: np.ndarray, targets: Targets, validation: np.ndarray, settings: ProbeSettings
) -> LayerProbe:
    """Do as `fit_layer_probe`, unless this process has solved the very same probe before."""
    key = _content_of(block, targets, validation, settings)
    probe = _KEPT.get(key)
    if probe is None:
        probe = fit_layer_probe(block, targets, validation, settings)
        probe.coef.flags.writeable = False  # it is handed out again and again
        _KEPT.put(key, probe, probe.coef.nbytes)
    return probe


def forget_probes() -> None:
    """Release all kept probes."""
    _KEPT.clear()


def _content_of(
    block: np.ndarray, targets: Targets, validation: np.ndarray, settings: ProbeSettings
) -> bytes:
    arrays = (block, targets.signs, targets.weights, targets.row_weights, validation)
    # Two targets of the same signs are scored alike only if classes exclude each other in both.
    parts = [array_digest(array) for array in arrays] + [
        repr((settings, targets.exclusive)).encode()
    ]
    return xxhash.xxh3_128_digest(b"".join(parts))
