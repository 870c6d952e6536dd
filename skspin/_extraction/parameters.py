"""The digest of a model in memory: its parameters, buffers and configuration."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor

_SAMPLES = 16
# model -> (what is cheap to see of its tensors, digest of all of them)
_known_models: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def digest_model(model: Any) -> str:
    """Digest a model's parameters, buffers and configuration.

    Parameters
    ----------
    model : PreTrainedModel
        On any device.

    Returns
    -------
    str
        32 hexadecimal digits.

    Notes
    -----
    The digest is remembered with the model. It is taken anew when a tensor was replaced or
    written to, which is seen by the tensor's place, its version counter, and 16 of its values
    (``parameter.data`` is written past the counter). Writing a few single values through
    ``.data`` is the one change that may go unseen.
    """
    tensors = dict(_tensors(model))
    seen = (_settings(model), tuple(_glance(tensor) for tensor in tensors.values()))
    known = _known_models.get(model)
    if known is None or known[0] != seen:
        digest = xxhash.xxh3_128(seen[0].encode())
        for name, tensor in tensors.items():
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        known = (seen, digest.hexdigest())
        _known_models[model] = known
    return known[1]


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield from _plain_tensors(name, tensor)


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if tensor.is_meta:
        raise ValueError(
            f"The model's weight {name!r} is not in memory (offloaded or never loaded), so the "
            "model can not be told from others. Pass its hub id or folder instead, with "
            "model_kwargs={'device_map': ...}."
        )
    if hasattr(tensor, "__tensor_flatten__"):  # A quantised tensor is several plain ones.
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.detach()


def _glance(tensor: Tensor) -> tuple:
    version = None if tensor.is_inference() else tensor._version
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()[:0]
    step = max(1, flat.numel() // _SAMPLES)
    return tensor.data_ptr(), version, _bytes(flat[::step][:_SAMPLES]).tobytes()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def _settings(model: Any) -> str:
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    adapters = {
        name: adapter.to_dict()
        for name, adapter in (getattr(model, "peft_config", None) or {}).items()
    }
    active = getattr(model, "active_adapters", None) if adapters else None
    settings = [type(model).__qualname__, config, adapters, active]
    return json.dumps(settings, sort_keys=True, default=repr)
