"""Which numbers a text gets, on which device and in which format, in one frozen object."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from joblib import effective_n_jobs

from skspin._model.files import Source

_DTYPES = ("float32", "bfloat16", "float16")


class ModelMismatchError(ValueError):
    """The model's weights or its tokenizer are not those that the estimator was fitted with.

    Read what to do about it in the user guide, :doc:`/user_guide/troubleshooting`.

    See Also
    --------
    LLMActivationTransformer : Its ``revision`` pins a model of the hub.

    Examples
    --------
    A fitted transformer is given another tokenizer.

    >>> from skspin import LLMActivationTransformer, ModelMismatchError
    >>> from skspin.datasets import demo_model
    >>> from transformers import AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained(demo_model())
    >>> transformer = LLMActivationTransformer(demo_model(), layers=0).fit(["A"])
    >>> tokenizer.add_tokens(["filmic"])
    1
    >>> transformer = transformer.set_params(tokenizer=tokenizer)
    >>> try:
    ...     transformer.transform(["A filmic film."])
    ... except ModelMismatchError as error:
    ...     "fitted with" in str(error)
    True
    """


@dataclass(frozen=True)
class Recipe:
    """A model, what is done with its texts, and where and how it runs.

    The fields from ``prompt`` on are parameters of `LLMActivationTransformer`, but for
    ``conversations``.
    """

    source: Source
    fingerprint: str
    prompt: str | None = None
    max_length: int = 512
    long_texts: str = "truncate"
    overlap: int = 0
    pool_over: str | tuple[str, ...] = "all"
    conversations: bool = False  # whether texts are conversations, written as JSON
    device: str | Sequence[str] | None = None
    dtype: str = "auto"
    batch_tokens: int | str = "auto"
    n_jobs: int | None = None
    verbose: int = 0

    @property
    def devices(self) -> list[Any]:
        """The devices that ``device`` names: one, which may be None, or several."""
        if not isinstance(self.device, list | tuple):
            return [self.device]
        if not self.device or None in self.device:
            raise ValueError(
                f"device={self.device!r} must name at least one device, and each by its name, e.g. "
                "['cuda:0', 'cuda:1']. Leave device=None to have one chosen."
            )
        return list(self.device)

    @property
    def n_workers(self) -> int:
        """Number of workers: one for each device, or joblib's."""
        if len(self.devices) == 1:
            return effective_n_jobs(self.n_jobs)
        if self.n_jobs not in (None, 1):
            raise ValueError(
                f"device={self.device!r} and n_jobs={self.n_jobs} both say how many workers there "
                "are. Leave n_jobs=None to have one for each device, or name one device."
            )
        return len(self.devices)

    @cached_property
    def number_format(self) -> str:
        """The format that ``dtype`` means on the device; several devices must agree on it."""
        if self.source.in_memory and self.dtype == "auto":
            return str(self.source.model.dtype).removeprefix("torch.")
        formats = {resolve_dtype(self.dtype, resolve_device(device)) for device in self.devices}
        if len(formats) != 1:
            raise ValueError(
                f"device={self.device!r} must name devices with one dtype in common, but "
                f"dtype={self.dtype!r} means {sorted(formats)} on them. Set dtype='float32'."
            )
        return formats.pop()

    @property
    def key(self) -> str:
        """Digest of everything but text and column that decides a number."""
        decisive = [
            self.fingerprint,
            self.prompt,
            int(self.max_length),
            self.long_texts,
            int(self.overlap),
            self.pool_over,
            self.conversations,
            self.number_format,
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(decisive).encode())

    @property
    def model_name(self) -> str:
        """What people call the model: a hub id, a folder, or a class."""
        model = self.source.model
        return type(model).__name__ if self.source.in_memory else str(model)

    def check_fingerprint(self, fitted: str) -> None:
        """Raise a `ModelMismatchError` unless the model has the fingerprint ``fitted``."""
        if self.fingerprint != fitted:
            raise ModelMismatchError(
                f"model={self.model_name!r} with its tokenizer has the fingerprint "
                f"{self.fingerprint}, but this transformer was fitted with {fitted}. Give it the "
                "model it was fitted with (pin `revision` for a hub model), or fit again."
            )


class Rows(NamedTuple):
    """Some texts' activations, as they come out of the model."""

    positions: np.ndarray  # (n_rows,), int: among the texts given
    values: np.ndarray  # (n_rows, n_columns), float32
    n_tokens: int
    n_truncated: int


# Device and number format, where the user leaves the choice open


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
    if chosen.type in ("cpu", "meta"):
        return chosen.type
    return f"{chosen.type}:{chosen.index or 0}"  # tensors on Apple's GPU are on "mps:0"


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
