"""A frozen model that is ready to run: loaded once per process and device, shared by all."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer

from skspin._model.anatomy import Anatomy, find_anatomy, most_tokens
from skspin._model.files import (
    CONFIGURATION,
    NEUTRAL_OPTIONS,
    SETTINGS,
    WHERE_OPTIONS,
    Files,
    Source,
    silence,
)
from skspin._model.fingerprint import fingerprint
from skspin._model.recipe import resolve_device, resolve_dtype, usable_device
from skspin._model.trial import try_anatomy
from skspin._system import after_fork

# Options of weights, never given to a configuration, though it may have such an attribute.
_OF_WEIGHTS = {"ignore_mismatched_sizes", "quantization_config", "variant"}


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model that is ready to run, with what belongs to it."""

    model: Any  # loaded here: in eval mode, frozen; passed in: as it is
    tokenizer: Any
    bare_tokenizer: Any  # a copy of its Rust part, which reads texts; None if it has no such part
    anatomy: Anatomy
    device: torch.device  # where its inputs go
    dtype: str  # format of its activations, e.g. "float32"
    fingerprint: str

    @cached_property
    def n_positions(self) -> int:
        """The most tokens that the model has positions for."""
        return most_tokens(self.model, sys.maxsize)


_lock = threading.RLock()
_loaded: dict[tuple[Source, str, str], Backbone] = {}


@after_fork
def _recover_from_fork() -> None:
    """Let a forked process, which has none of its parent's threads, run models."""
    # GNU's OpenMP would wait for those threads forever; with one thread, torch does without it, as
    # in the workers of its DataLoader. And no thread is left to release a lock that was held.
    global _lock
    _lock = threading.RLock()
    torch.set_num_threads(1)


def load_backbone(
    source: Source, device: Any = None, dtype: Any = "auto", name: str | None = None
) -> Backbone:
    """Load a model, or find the copy that this process has on that device already.

    ``name`` is the model's fingerprint, for callers who have just taken it.
    """
    device, dtype = resolve_placement(source, device, dtype)
    with _lock:
        name = name or fingerprint(source)
        if source.in_memory:
            return _assemble(source, source.model, dtype, name)
        # One model for a branch and its commit, and for all copies of a tokenizer in memory.
        tokenizer = source.tokenizer if source.tokenizer_files is not None else name
        kwargs = copy.deepcopy(source.model_kwargs)  # the user may change them in place
        named = replace(source, tokenizer=tokenizer, revision=source.commit, model_kwargs=kwargs)
        key = (named, device, dtype)
        if key not in _loaded or _loaded[key].fingerprint != name:
            _loaded.pop(key, None)  # The folder's weights changed: free the old ones first.
            _loaded[key] = _assemble(source, load_model(source, device, dtype), dtype, name)
        return _loaded[key]


def forget_models() -> None:
    """Release the loaded models; one that is in use is freed after its use."""
    with _lock:
        _loaded.clear()


def read_anatomy(source: Source) -> Anatomy:
    """Find a model's blocks and widths from its configuration; the modules hold no weights."""
    with _lock:
        if source.in_memory:
            return find_anatomy(source.model)
        options = {"trust_remote_code": source.trust_remote_code}
        with silence():
            config, _ = _configure(source)
            with torch.device("meta"):
                return find_anatomy(transformers.AutoModel.from_config(config, **options))


def resolve_placement(source: Source, device: Any = None, dtype: Any = "auto") -> tuple[str, str]:
    """Name the device and format that a model runs in; one in memory stays as it is."""
    if not source.in_memory:
        device = usable_device(device)
        return device, resolve_dtype(dtype, device)
    own_device = str(_input_device(source.model))
    own_dtype = str(source.model.dtype).removeprefix("torch.")
    if device is not None and resolve_device(device) != own_device:
        raise ValueError(
            f"device={str(device)!r}, but the model passed in is on {own_device!r} and stays "
            "there. Leave device=None, or move the model yourself with model.to(...)."
        )
    if str(dtype) != "auto" and str(dtype).removeprefix("torch.") != own_dtype:
        raise ValueError(
            f"dtype={str(dtype)!r}, but the model passed in is {own_dtype!r} and stays so. Leave "
            "dtype='auto', or convert the model yourself with model.to(...)."
        )
    return own_device, own_dtype


def _assemble(source: Source, model: Any, dtype: str, name: str) -> Backbone:
    tokenizer, device = load_tokenizer(source), _input_device(model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    splits = bool(getattr(tokenizer, "split_special_tokens", False))
    bare = None if backend is None else _bare_copy(backend.to_str(), splits)
    return Backbone(model, tokenizer, bare, try_anatomy(model, device, name), device, dtype, name)


def _input_device(model: Any) -> torch.device:
    # A model that is spread over devices, or partly offloaded, takes its inputs on the first.
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@lru_cache(maxsize=4)  # a tokenizer in memory is copied in every call, and may have changed
def _bare_copy(definition: str, split_special_tokens: bool) -> Tokenizer:
    """Copy the Rust part of a tokenizer, without truncation and padding."""
    copy = Tokenizer.from_str(definition)
    copy.encode_special_tokens = split_special_tokens  # which the definition does not say
    # Both are settings of the original object, left by its last call, and another thread may change
    # them there at any time.
    copy.no_truncation()
    copy.no_padding()
    return copy


# Loading files


class _Kind(NamedTuple):
    """Files of one kind: patterns to tell whether they are here, and patterns to fetch them."""

    name: str
    shown_by: tuple[str, ...]
    fetched: tuple[str, ...]


_CONFIGURATION = _Kind("configuration", ("config.json",), CONFIGURATION)
_TOKENIZER = _Kind(
    "tokenizer",
    ("tokenizer.json", "vocab*", "merges*", *"*.model *.spm *.tiktoken *.bpe* *.codes".split()),
    tuple(f"*{suffix}" for suffix in SETTINGS),
)


def load_model(source: Source, device: str, dtype: str) -> Any:
    """Load a model's weights, frozen and in eval mode; ``device_map`` overrides ``device``."""
    with silence():
        config, options = _configure(source)
        options = {"use_safetensors": True, **options}
        if "quantization_config" in options:
            # Quantised weights are made on their device, and can't be moved afterwards.
            options.setdefault("device_map", {"": device})
        files: Any = source.files
        if files.is_gguf and hasattr(transformers, "GgufConfig"):
            # Kernels that multiply packed weights give other numbers where they are installed.
            options.setdefault("quantization_config", transformers.GgufConfig(dequantize=True))
        model, report = _load(
            files,
            _weights(options["use_safetensors"] is False, options.get("variant")),
            transformers.AutoModel.from_pretrained,
            config=config,
            trust_remote_code=source.trust_remote_code,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **options | {"ignore_mismatched_sizes": True},  # refused below instead
        )
    # For a mismatch, transformers 5 gives the name and both shapes, transformers 4 only the name.
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    keys = [*report["missing_keys"], *mismatched]
    # A pooler is what AutoModel puts on top of the last layer; no activation comes through it.
    random = [key for key in keys if "pooler" not in key]
    if random:
        advice = " A GGUF file may need the package gguf in version 0.18 or later."
        raise ValueError(
            f"The weights of {source.model!r} lack {len(random)} of the model's parameters, or "
            f"have them in another shape, e.g. {min(random)!r}. These would be random numbers. "
            "Give a complete checkpoint, and a configuration (or model_kwargs) that fits it."
            f"{advice if files.is_gguf else ''}"
        )
    model.eval().requires_grad_(False)
    if "device_map" not in options and model.device != torch.device(device):
        model.to(device)
    return model


def _configure(source: Source) -> tuple[Any, dict[str, Any]]:
    """Read a model's configuration, changed by its options; return it and all other options."""
    files: Any = source.files
    if files.is_local and not files.is_gguf and not files.holds(["config.json"]):
        raise ValueError(_no_model(files))  # of an adapter, transformers would load another model
    options = {k: v for k, v in source.options.items() if k not in WHERE_OPTIONS}
    if "config" in options:
        return copy.deepcopy(options.pop("config")), options
    asked = {k: v for k, v in options.items() if k not in NEUTRAL_OPTIONS | _OF_WEIGHTS}
    config, others = _load(
        files,
        _CONFIGURATION,
        transformers.AutoConfig.from_pretrained,
        trust_remote_code=source.trust_remote_code,
        return_unused_kwargs=True,
        **asked,
    )
    kept = {*others, "code_revision"}  # it applies to the model's code, too
    return config, {k: v for k, v in options.items() if k not in asked or k in kept}


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer of a model, or take the one that the source holds."""
    files = source.tokenizer_files
    if files is None:
        return source.tokenizer
    with silence():
        tokenizer = _load(
            files,
            _TOKENIZER,
            transformers.AutoTokenizer.from_pretrained,
            trust_remote_code=source.trust_remote_code,
        )
    _read_header.cache_clear()  # the tokenizer is loaded last
    # Without a vocabulary to read, transformers may make up an empty one.
    found = files.is_gguf or files.holds(("tokenizer*", *_TOKENIZER.shown_by))
    if not found or not len(tokenizer):
        raise ValueError(_no_tokenizer(files))
    return tokenizer


def _weights(pickled: bool, variant: str | None) -> _Kind:
    """Name the files of weights; only these, as a repository may hold several formats."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    v = f".{variant}" if variant else ""
    shards = (f"{stem}{v}-*-of-?????.{suffix}", f"{stem}-*-of-?????{v}.{suffix}")
    index = f"{stem}.{suffix}.index{v}.json"
    return _Kind("weights", (f"*.{suffix}",), (f"{stem}{v}.{suffix}", *shards, index))


@contextmanager
def _arguments(files: Files, root: str) -> Iterator[dict[str, str]]:
    """Say where files are, as the arguments of from_pretrained."""
    if not files.is_gguf:
        # A folder, not a hub id, keeps transformers from asking the hub for more.
        yield {"pretrained_model_name_or_path": root, "subfolder": files.subfolder}
        return
    path = root if files.is_local else os.path.join(root, files.subfolder, str(files.gguf_file))
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path!r} is no GGUF file. Give the folder that it is in.")
    from transformers import modeling_gguf_pytorch_utils as converter

    gguf: Any = import_module("gguf")
    bar, reader = converter.tqdm, gguf.GGUFReader
    converter.tqdm = partial(bar, disable=True)  # no setting turns this bar off
    # Reading the header takes seconds; configuration, weights and tokenizer all need it.
    gguf.GGUFReader = lambda path: _read_header(path, os.stat(path).st_mtime_ns)
    try:
        # An empty folder keeps transformers from reading other files beside this one.
        with TemporaryDirectory() as empty:
            yield {"pretrained_model_name_or_path": empty, "gguf_file": os.path.abspath(path)}
    finally:
        converter.tqdm, gguf.GGUFReader = bar, reader


@lru_cache(maxsize=1)
def _read_header(path: str, _: int) -> Any:
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(path)


def _load(files: Any, kind: _Kind, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """Load files of one kind: from this machine if they are here, from the hub if not."""
    if files.is_gguf:
        missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"{files.name!r} is in the GGUF format, which transformers reads with the packages "
                f"gguf and accelerate. Run: pip install {' '.join(missing)}"
            )
        kind = _Kind(kind.name, (str(files.gguf_file),), (str(files.gguf_file),))
    fetch = not files.holds(kind.shown_by) and files.has_hub
    while True:
        try:
            root = files.snapshot(files.commit, kind.fetched) if fetch else files.root
            with _arguments(files, root) as where:
                return from_pretrained(**where, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers raises whatever its libraries raise.
            if fetch or not files.has_hub:
                said = f"{type(error).__name__}: {error}"
                raise ValueError(_advice(files, kind, said)) from error
        fetch = True  # what is here does not do


def _advice(files: Files, kind: _Kind, said: str) -> str:
    if not files.holds(kind.shown_by):
        if kind is _TOKENIZER:
            return _no_tokenizer(files)
        if kind.shown_by == ("*.safetensors",):
            return (
                f"{files.name!r} has no weights in the safetensors format. Weights that are "
                "pickled (pytorch_model.bin) can run any code when they are loaded, so they are "
                "refused. If you trust them, pass model_kwargs={'use_safetensors': False}. "
                f"({said})"
            )
    return f"The {kind.name} of {files.name!r} can't be loaded: {said}"


def _no_model(files: Files) -> str:
    if files.holds(["adapter_config.json"]):
        return (
            f"The folder {files.name!r} holds an adapter, not a model. Load it with peft, and pass "
            "the model itself as model=."
        )
    found = sorted(Path(files.name, files.subfolder).glob("*.gguf"))
    or_file = f", or the GGUF file: model={str(found[0])!r}" if found else ""
    return (
        f"The folder {files.name!r} has no config.json. Give the folder that model.save_pretrained "
        f"wrote{or_file}."
    )


def _no_tokenizer(files: Files) -> str:
    return (
        f"{files.name!r} has no tokenizer. Pass tokenizer=: a hub id, a folder, or a tokenizer "
        "that you loaded."
    )
