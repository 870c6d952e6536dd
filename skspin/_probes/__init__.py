"""Activations and labels in, salient neurons out.

`encode_targets` turns labels into binary problems, `validation_rows` sets rows aside, and
`fit_layers` fits a probe to each layer, or finds it in `probe_cache`. `SALIENCES` and
`most_salient` lead from a probe's weights to the neurons worth keeping, by one of the `CRITERIA`.
`solve_probes`, which `fit_layers` calls, solves many sparse logistic regressions at once.
`is_tensor` and `to_host` tell arrays from tensors on a device; `check_labels` refuses what is no
label. Nothing here knows a language model.
"""

from skspin._probes.columns import is_tensor, to_host
from skspin._probes.layer import (
    CRITERIA,
    SALIENCES,
    ProbeSettings,
    fit_layers,
    most_salient,
    probe_cache,
)
from skspin._probes.solver import solve_probes
from skspin._probes.targets import check_labels, encode_targets, validation_rows

__all__ = [
    "CRITERIA",
    "SALIENCES",
    "ProbeSettings",
    "check_labels",
    "encode_targets",
    "fit_layers",
    "is_tensor",
    "most_salient",
    "probe_cache",
    "solve_probes",
    "to_host",
    "validation_rows",
]
