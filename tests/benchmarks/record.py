"""What a benchmark leaves behind: rows, and the machine and versions they were measured with."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "skspin",
    "scikit-learn",
    "torch",
    "transformers",
    "sentence-transformers",
    "onnxruntime",
    "openvino",
    "optimum-onnx",
    "numpy",
    "scipy",
    "celer",
    "skglm",
)


def describe_machine():
    """Describe processor, cores, what else runs on them, and the packages' versions."""
    import torch  # here, because measuring how long an import takes must not begin with this one

    from skspin._model.recipe import multiplies_bfloat16

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 in hardware": multiplies_bfloat16("cpu"),
        "8 bits": eight_bits(),
        "gpus": gpus,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }


def processor():
    """Name the processor; where Python doesn't know it, Linux may."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def eight_bits():
    """Name the instructions for products of 8 bits, where Linux tells what there is."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    names = {"avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "amx_int8": "AMX-INT8"}
    return [name for flag, name in names.items() if flag in flags]


def installed(name):
    """Give a package's version, or None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_record(path, rows, **facts):
    """Write rows, which are dicts, with the machine they were measured on and more facts of it."""
    machine = describe_machine() | facts
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
