"""The digest of a model in memory: its parameters, buffers and configuration."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

_GLANCES = 16
# What changes how or where a model runs, or who saved it, and no number.
_NEUTRAL_SETTINGS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# What an adapter's layer does is decided by these, and by no parameter.
_ADAPTER_SWITCHES = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
# Model -> what is cheap to see of it, and the digest of all of it.
_known_models: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def digest_model(model: Any) -> str:
    """Digest a model's parameters, buffers, configuration and adapters.

    Parameters
    ----------
    model : PreTrainedModel
        On any device; a PEFT-wrapped one too.

    Returns
    -------
    str
        32 hexadecimal digits.

    Notes
    -----
    The digest is remembered for as long as the model lives, and taken anew when a tensor was
    replaced or written to. That is seen by the tensor's place, by its version counter, and by 16 of
    its values, because ``parameter.data`` is written past the counter. A few single values written
    through ``.data`` are the one change that can go unseen.
    """
    tensors = dict(_tensors(model))
    seen = (_settings(model), [_glance(tensor) for tensor in tensors.values()])
    known = _known_models.get(model)
    if known is None or known[0] != seen:
        digest = xxhash.xxh3_128(seen[0].encode())
        for name, tensor in tensors.items():
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        known = _known_models[model] = (seen, digest.hexdigest())
    return known[1]


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield from _plain_tensors(name, tensor)


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if tensor.is_meta:
        raise ValueError(
            f"The model's weight {name!r} is not in memory (offloaded, or never loaded), so this "
            "model can't be told from others. Pass its hub id or folder instead, with "
            "model_kwargs={'device_map': ...}."
        )
    if hasattr(tensor, "__tensor_flatten__"):
        # A quantised tensor is several plain ones.
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.detach()


def _glance(tensor: Tensor) -> tuple[int, int | None, bytes]:
    version = None if tensor.is_inference() else tensor._version
    sample = torch.atleast_1d(tensor)
    if tensor.numel() > _GLANCES:
        spread = np.linspace(0, tensor.numel() - 1, _GLANCES).astype(np.intp)
        sample = sample[tuple(torch.from_numpy(i) for i in np.unravel_index(spread, sample.shape))]
    return tensor.data_ptr(), version, _bytes(sample).tobytes()


def _bytes(tensor: Tensor) -> Any:
    # NumPy has no bfloat16, but bytes are bytes.
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _settings(model: Any) -> str:
    config = model.config.to_dict()
    config = {name: value for name, value in config.items() if name not in _NEUTRAL_SETTINGS}
    adapters = getattr(model, "peft_config", None) or {}
    settings = {
        "class": type(model).__qualname__,
        "config": config,
        "adapters": {name: adapter.to_dict() for name, adapter in adapters.items()},
        "switches": [
            [getattr(module, switch, None) for switch in _ADAPTER_SWITCHES]
            for module in (model.modules() if adapters else ())
            if hasattr(module, "active_adapters")
        ],
    }
    return json.dumps(settings, sort_keys=True, default=repr)
