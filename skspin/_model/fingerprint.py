"""A short text that identifies a model's numbers: same fingerprint, same activations."""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import file_digest
from itertools import chain, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from skspin._model.files import NEUTRAL_OPTIONS, SETTINGS, Files, Source
from skspin._store import Store

if TYPE_CHECKING:
    from torch import Tensor

_SAFE_WEIGHTS = {".safetensors"}
_PICKLED_WEIGHTS = {".bin", ".pt", ".pth"}
_YOUNG_NS = 2_000_000_000  # ns: a file written more lately may change and keep its times
_N_SAMPLED = 16  # values of a tensor that are compared
# Settings that say how or where a model runs, or who saved it, but change no number.
_NEUTRAL_SETTINGS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# Attributes that, besides its parameters, decide what an adapter's layer does.
_ADAPTER_SWITCHES = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")

# Path, inode, bytes and times of a file -> digest of its content.
_known_files: dict[str, str] = {}
# Model -> what is cheap to compare, and the digest of all of it.
_known_models: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


def fingerprint(source: Source, store: Store | None = None) -> str:
    """Identify the numbers of a model and its tokenizer; a store keeps the digests of files."""
    # "hub:<id>@<commit>", "folder:<digest>", "gguf:<digest>" or "memory:<digest>", followed by
    # "+<digest>" if there are options or another tokenizer. Local files count by their content, not
    # by their path.
    pickled = source.options.get("use_safetensors") is False
    if source.files is None:
        model = f"memory:{_digest_model(source.model)}"
    else:
        model = _files_fingerprint(source.files, pickled, store)
    extras: dict[str, Any] = {
        name: _as_json(value)
        for name, value in source.options.items()
        if name not in NEUTRAL_OPTIONS
    }
    if source.trust_remote_code:
        extras["trust_remote_code"] = True
    if source.tokenizer_files is None:
        extras["tokenizer"] = _digest_tokenizer(source.tokenizer)
    elif source.tokenizer is not None:
        extras["tokenizer"] = _files_fingerprint(source.tokenizer_files, pickled, store)
    return f"{model}+{_digest([json.dumps(extras, sort_keys=True)])}" if extras else model


def _files_fingerprint(files: Files, pickled: bool, store: Store | None) -> str:
    if os.path.isfile(files.name):
        return f"gguf:{_digest_file(Path(files.name), store)}"
    if files.is_local:
        suffixes = SETTINGS | (_PICKLED_WEIGHTS if pickled else _SAFE_WEIGHTS)
        folder = Path(files.name, files.subfolder)
        paths = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
        return f"folder:{_digest(f'{p.name}:{_digest_file(p, store)}' for p in paths)}"
    name = "/".join(filter(None, (files.name, files.subfolder, files.gguf_file)))
    return f"hub:{name}@{files.commit}"


def _neutral(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _NEUTRAL_SETTINGS}


def _as_json(value: Any) -> Any:
    value = _neutral(value.to_dict()) if hasattr(value, "to_dict") else value
    if isinstance(value, dict):  # a configuration and its dict count as the same
        return {str(name): _as_json(one) for name, one in value.items()}
    return value if isinstance(value, str) else repr(value)


def _digest_file(path: Path, store: Store | None) -> str:
    """Digest a file's content, or look its digest up if the file did not change since."""
    stat = os.stat(path)
    # ctime, unlike mtime, can't be set back.
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    key = json.dumps(["file", os.path.abspath(path), stat.st_ino, stat.st_size, *times])
    stored = None if store is None else store.get_metadata(key)
    digest = stored or _known_files.get(key)
    if digest is None:
        with open(path, "rb") as file:
            digest = file_digest(file, xxhash.xxh3_128).hexdigest()
    # A second write to so young a file could leave the same times, so its digest is not kept.
    if time.time_ns() - max(times) > _YOUNG_NS:
        _known_files[key] = digest
        if store is not None and stored is None:
            store.put_metadata(key, digest)
    return digest


def _digest_tokenizer(tokenizer: Any) -> str:
    """Digest what decides which tokens a text or a conversation becomes."""
    # Neither the side of the padding, nor the length and padding that an earlier call left in a
    # tokenizer, change an activation.
    names = ["bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id"]
    names += ["split_special_tokens", "truncation_side", "chat_template", "model_input_names"]
    settings = {name: getattr(tokenizer, name, None) for name in names}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
        rules["options"] = repr(sorted(getattr(tokenizer, "init_kwargs", {}).items()))
        rules["special"] = repr(sorted(getattr(tokenizer, "special_tokens_map", {}).items()))
    else:
        rules = {"backend": _digest_backend(backend.to_str())}
    return _digest([json.dumps([settings, rules], sort_keys=True)])


@lru_cache(maxsize=4)  # tokenizers seldom change between calls
def _digest_backend(definition: str) -> str:
    rules = json.loads(definition) | {"truncation": None, "padding": None}
    return _digest([json.dumps(rules, sort_keys=True)])


def _digest(texts: Iterable[str]) -> str:
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


# A model in memory


def _digest_model(model: Any) -> str:
    """Digest a model's parameters, buffers, configuration and adapters, whatever its device."""
    # The digest is kept as long as the model lives, and computed again if a tensor was replaced or
    # written to: its address, its version counter or one of 16 of its values then differ. A few
    # values written through `.data`, which the counter does not see, can go unnoticed.
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = dict(chain.from_iterable(starmap(_plain_tensors, named)))
    seen = (_settings(model), [_sample(tensor) for tensor in tensors.values()])
    known = _known_models.get(model)
    if known is None or known[0] != seen:
        digest = xxhash.xxh3_128(seen[0].encode())
        for name, tensor in tensors.items():
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        known = _known_models[model] = (seen, digest.hexdigest())
    return known[1]


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if tensor.is_meta:
        raise ValueError(
            f"The model's weight {name!r} is not in memory (offloaded, or never loaded), so this "
            "model can't be told from others. Pass its hub id or folder instead, with "
            "model_kwargs={'device_map': ...}."
        )
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor.detach()
        return
    for part in tensor.__tensor_flatten__()[0]:  # a quantised tensor is several plain ones
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def _sample(tensor: Tensor) -> tuple[int, int | None, bytes]:
    import torch

    version = None if tensor.is_inference() else tensor._version
    values = torch.atleast_1d(tensor)
    if tensor.numel() > _N_SAMPLED:
        spread = np.linspace(0, tensor.numel() - 1, _N_SAMPLED).astype(np.intp)
        values = values[tuple(torch.from_numpy(i) for i in np.unravel_index(spread, values.shape))]
    return tensor.data_ptr(), version, _bytes(values).tobytes()


def _bytes(tensor: Tensor) -> Any:
    import torch

    # NumPy has no bfloat16, but bytes are bytes.
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _settings(model: Any) -> str:
    adapters = getattr(model, "peft_config", None) or {}
    settings = {
        "class": type(model).__qualname__,
        "config": _neutral(model.config.to_dict()),
        "adapters": {name: adapter.to_dict() for name, adapter in adapters.items()},
        "switches": [
            [getattr(module, switch, None) for switch in _ADAPTER_SWITCHES]
            for module in (model.modules() if adapters else ())
            if hasattr(module, "active_adapters")
        ],
    }
    return json.dumps(settings, sort_keys=True, default=repr)
