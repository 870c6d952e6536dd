"""Which device, and which number format, when the user leaves the choice open."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(device: Any = None) -> str:
    """Name a device, e.g. "cuda:0"; None is the current CUDA device, else the CPU."""
    if device is None:
        device = "cuda" if _has_cuda() else "cpu"
    name = str(device)
    if name == "cpu":
        return name
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is not a device that torch knows. Use e.g. 'cpu' or 'cuda:0'."
        ) from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={device!r}, but torch sees no CUDA device. Use device=None.")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device={device!r}, but torch sees {torch.cuda.device_count()} CUDA device(s)."
            )
        return f"cuda:{index}"
    return str(chosen)


def usable_device(device: Any = None) -> str:
    """Name a device as `resolve_device` does, and refuse one that can't compute."""
    name = resolve_device(device)
    if name == "meta":
        raise ValueError(f"device={device!r} computes no numbers. Use e.g. 'cpu' or 'cuda:0'.")
    if name != "cpu":
        import torch

        try:
            torch.empty(1, device=name)
        except Exception as error:  # Each backend has its own way to say that it is not there.
            raise ValueError(
                f"device={device!r} can't be used here ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}). Use device=None or 'cpu'."
            ) from error
    return name


def resolve_dtype(dtype: Any, device: str) -> str:
    """Name the format to compute in; "auto" is bfloat16 where the device multiplies it natively."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return "bfloat16" if multiplies_bfloat16(device) else "float32"
    if name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known. Use 'auto' or one of {list(_DTYPES)}.")
    return name


@cache
def _has_cuda() -> bool:
    """Whether torch sees a CUDA device; without importing torch where no driver is installed."""
    if "torch" not in sys.modules:
        try:
            ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        except OSError:
            # ROCm builds of torch use CUDA's names without CUDA's driver.
            if not Path("/dev/kfd").exists():
                return False
    import torch

    return torch.cuda.is_available()


@cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 matrices in its hardware."""
    if device == "cpu":
        return _has_amx()
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_capability(device)[0] >= 8
    return False


def _has_amx() -> bool:
    # avx512_bf16 alone does not count: what it gains differs from CPU to CPU, down to nothing.
    if "torch" not in sys.modules:
        with suppress(OSError):
            return "amx_bf16" in Path("/proc/cpuinfo").read_text().split()
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
