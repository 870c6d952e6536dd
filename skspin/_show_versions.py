"""What a bug report has to say about the machine."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from skspin._model import resolve_device, resolve_dtype
from skspin._version import __version__

# Their versions are read without importing them.
_PACKAGES = """
scikit-learn torch transformers tokenizers safetensors huggingface-hub peft bitsandbytes numpy scipy
joblib distributed xxhash matplotlib
"""


def show_versions() -> None:
    """Print the versions and the devices that skspin finds, to be put into a bug report.

    Read more in :doc:`/install`.

    See Also
    --------
    sklearn.show_versions : The same for scikit-learn.

    Examples
    --------
    >>> import skspin
    >>> skspin.show_versions()  # doctest: +ELLIPSIS
    system
    ...
    packages
                 skspin: ...
    """
    import torch

    system = {
        "python": sys.version.replace("\n", " "),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "not set"),
    }
    packages = {"skspin": __version__} | dict.fromkeys(_PACKAGES.split(), "not installed")
    for name in _PACKAGES.split():
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    chosen = resolve_device(None)
    gpus = range(torch.cuda.device_count())
    devices = {f"cuda:{index}": torch.cuda.get_device_name(index) for index in gpus} | {
        "torch threads": str(torch.get_num_threads()),
        "device=None": chosen,
        'dtype="auto"': resolve_dtype("auto", chosen),
    }
    sections = {"system": system, "packages": packages, "devices": devices}
    for title, rows in sections.items():
        width = 4 + max(map(len, rows))
        lines = [f"{name:>{width}}: {value}" for name, value in rows.items()]
        print(title, *lines, "", sep="\n")  # noqa: T201
