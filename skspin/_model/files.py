"""What names a frozen model, and loading it: configuration, tokenizer, weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skspin._model.hub import CONFIGURATION, Files, silence

# Options of `from_pretrained` that say where files are, and so concern every file of a model.
_WHERE_OPTIONS = {"cache_dir", "gguf_file", "local_files_only", "subfolder", "token"}
# Options that decide where weights go and how fast they are used, not which numbers come out.
NEUTRAL_OPTIONS = _WHERE_OPTIONS | {
    *("attn_implementation", "device_map", "force_download", "low_cpu_mem_usage", "max_memory"),
    *("offload_buffers", "offload_folder", "offload_state_dict", "proxies", "tp_plan"),
    "use_safetensors",
}
# Options that are parameters of LLMActivationTransformer, and options that can't be used here.
_PARAMETERS = {"device", "dtype", "revision", "tokenizer", "torch_dtype", "trust_remote_code"}
_REFUSED = {
    *("output_loading_info", "pretrained_model_name_or_path", "return_unused_kwargs"),
    "state_dict",
}
# Configuration, code, and what tokenizers of all kinds are saved as.
SETTINGS = {
    *(".bpe", ".codes", ".jinja", ".json", ".model", ".py"),
    *(".spm", ".tiktoken", ".tokenizer", ".txt", ".vocab"),
}
# Options of weights, never given to a configuration, though it may have such an attribute.
_OF_WEIGHTS = {"ignore_mismatched_sizes", "quantization_config", "variant"}
# A pooler is what AutoModel puts on top of the last layer; no activation comes through it.
_UNUSED = ("pooler",)


@dataclass(frozen=True)
class _Kind:
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


def _weights(pickled: bool, variant: str | None) -> _Kind:
    """Name the files of weights; only these, as a repository may hold several formats."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    v = f".{variant}" if variant else ""
    shards = (f"{stem}{v}-*-of-?????.{suffix}", f"{stem}-*-of-?????{v}.{suffix}")
    index = f"{stem}.{suffix}.index{v}.json"
    return _Kind("weights", (f"*.{suffix}",), (f"{stem}{v}.{suffix}", *shards, index))


@dataclass(frozen=True)
class Source:
    """Everything that names a frozen model and its tokenizer; equal sources name the same one."""

    model: Any  # hub id, folder, GGUF file, or a model in memory, which equals itself alone
    tokenizer: Any = None  # the same, or a tokenizer in memory; None for the model's own
    revision: str | None = None  # branch, tag or commit of a hub model; None for its main branch
    trust_remote_code: bool = False
    # Options that say where files are apply to configuration and tokenizer, too.
    model_kwargs: Mapping[str, Any] | None = field(default=None, hash=False, repr=False)
    longest: int | None = field(default=None, init=False)  # a SentenceTransformer's max_seq_length

    def __post_init__(self) -> None:
        """Refuse what names no model."""
        for name in ("model", "tokenizer"):
            if isinstance(value := getattr(self, name), str | os.PathLike):
                object.__setattr__(self, name, os.path.expanduser(os.fspath(value)))
        self._unwrap()
        if not self.in_memory and not isinstance(self.model, str):
            is_module = hasattr(self.model, "forward") and not isinstance(self.model, type)
            raise TypeError(
                f"model is a {type(self.model).__name__}, but must be a hub id, the path of a "
                "folder or GGUF file, or a loaded transformers model."
                + " A module of a model is not enough: pass the whole model."
                * is_module
            )
        if self.in_memory and self.tokenizer is None:
            raise ValueError(
                f"model is a {type(self.model).__name__} in memory, which does not say what its "
                "tokenizer is. Pass tokenizer=, e.g. AutoTokenizer.from_pretrained(...)."
            )
        if not all(isinstance(name, str) for name in self.options):
            raise ValueError(
                f"model_kwargs={self.model_kwargs!r} has names that are no str. Give names of "
                "arguments of from_pretrained, e.g. {'attn_implementation': 'eager'}."
            )
        for name in _PARAMETERS & set(self.options):
            parameter = name.removeprefix("torch_")
            raise ValueError(f"model_kwargs has {name!r}. Use the parameter {parameter}= instead.")
        for name in _REFUSED & set(self.options):
            raise ValueError(
                f"model_kwargs has {name!r}, which changes what from_pretrained loads or returns. "
                "Leave it out, or load the model yourself and pass it as model=."
            )
        if "gguf_file" in self.options and isinstance(self.model, str):
            if os.path.isfile(self.model):
                raise ValueError(
                    f"model={self.model!r} is a file, and model_kwargs names another, gguf_file="
                    f"{self.options['gguf_file']!r}. Leave out gguf_file."
                )
        config = self.options.get("config")
        if "config" in self.options and not hasattr(config, "model_type"):
            raise ValueError(
                f"model_kwargs has config={config!r}, but it must be a configuration, e.g. "
                "AutoConfig.from_pretrained(...). Single values go into model_kwargs themselves."
            )

    def _unwrap(self) -> None:
        """Take from a SentenceTransformer its language model, tokenizer and longest text."""
        is_sequence = not isinstance(self.model, str) and hasattr(self.model, "__getitem__")
        module = self.model[0] if is_sequence and hasattr(self.model, "tokenizer") else self.model
        if not hasattr(module, "auto_model"):
            return
        object.__setattr__(self, "longest", getattr(module, "max_seq_length", None))
        if self.tokenizer is None:
            object.__setattr__(self, "tokenizer", module.tokenizer)
        object.__setattr__(self, "model", module.auto_model)

    @property
    def options(self) -> dict[str, Any]:
        """`model_kwargs` as a dict."""
        return dict(self.model_kwargs or {})

    @property
    def in_memory(self) -> bool:
        """Whether the model is an object, not a name."""
        # A check of its class would import torch.
        return hasattr(self.model, "config") and hasattr(self.model, "get_input_embeddings")

    @property
    def files(self) -> Files | None:
        """Where configuration and weights are; None for a model in memory."""
        if self.in_memory:
            return None
        where = self._where_options()
        if "gguf_file" in where and os.path.isdir(self.model):
            return Files(os.path.join(self.model, where.get("subfolder", ""), where["gguf_file"]))
        return Files(self.model, self.revision, **where)

    @property
    def tokenizer_files(self) -> Files | None:
        """Where the tokenizer is; None for a tokenizer in memory."""
        if self.tokenizer is None:
            return self.files
        if not isinstance(self.tokenizer, str):
            return None
        inside = {"subfolder": "", "gguf_file": None}
        return Files(self.tokenizer, **(self._where_options() | inside))

    @property
    def commit(self) -> str | None:
        """The hub model's commit; None for a folder and for a model in memory."""
        return None if self.files is None else self.files.commit

    def _where_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name in _WHERE_OPTIONS}


def load_skeleton(source: Source) -> Any:
    """Build a model without weights from its configuration, on torch's meta device."""
    import torch
    import transformers

    with silence():
        config, _ = _configure(source)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(
                config, trust_remote_code=source.trust_remote_code
            )


def load_model(source: Source, device: str, dtype: str) -> Any:
    """Load a model's weights, frozen and in eval mode; ``device_map`` overrides ``device``."""
    import torch
    import transformers

    files = _model_files(source)
    with silence():
        config, options = _configure(source)
        options = {"use_safetensors": True, **options}
        if "quantization_config" in options:
            # Quantised weights are made on their device, and can't be moved afterwards.
            options.setdefault("device_map", {"": device})
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
    random = [key for key in keys if not any(name in key for name in _UNUSED)]
    if random:
        raise ValueError(
            f"The weights of {source.model!r} lack {len(random)} of the model's parameters, or "
            f"have them in another shape, e.g. {min(random)!r}. These would be random numbers. "
            "Give a complete checkpoint, and a configuration (or model_kwargs) that fits it."
            + " A GGUF file may need the package gguf in version 0.18 or later."
            * files.is_gguf
        )
    model.eval().requires_grad_(False)
    if "device_map" not in options and model.device != torch.device(device):
        model.to(device)
    return model


def _configure(source: Source) -> tuple[Any, dict[str, Any]]:
    """Read a model's configuration, changed by its options; return it and all other options."""
    import transformers

    files = _model_files(source)
    options = {k: v for k, v in source.options.items() if k not in _WHERE_OPTIONS}
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
    import transformers

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


def _model_files(source: Source) -> Files:
    """Return where a model is; refuse a folder without one, with more advice than transformers."""
    files = source.files
    if files is None:
        raise TypeError("A model in memory is not loaded.")
    if not files.is_local or files.is_gguf or files.holds(["config.json"]):
        return files
    if files.holds(["adapter_config.json"]):
        raise ValueError(
            f"The folder {files.name!r} holds an adapter, not a model. Load it with peft, and pass "
            "the model itself as model=."
        )
    found = sorted(Path(files.name, files.subfolder).glob("*.gguf"))
    raise ValueError(
        f"The folder {files.name!r} has no config.json. Give the folder that model.save_pretrained "
        + (f"wrote, or the GGUF file: model={str(found[0])!r}." if found else "wrote.")
    )


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


def _load(files: Files, kind: _Kind, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """Load files of one kind: from this machine if they are here, from the hub if not."""
    import torch

    if files.is_gguf:
        missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"{files.name!r} is in the GGUF format, which transformers reads with the packages "
                f"gguf and accelerate. Run: pip install {' '.join(missing)}"
            )
        kind = _Kind(kind.name, (str(files.gguf_file),), (str(files.gguf_file),))
    problem: Exception | None = None
    for fetch in (False, True):
        if not files.has_hub if fetch else not files.holds(kind.shown_by) and files.has_hub:
            continue
        try:
            root = files.snapshot(files.commit, kind.fetched) if fetch else files.root
            with _arguments(files, root) as where:
                return from_pretrained(**where, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers raises whatever its libraries raise.
            problem = error
    raise ValueError(_advice(files, kind, problem)) from problem


def _advice(files: Files, kind: _Kind, problem: Exception | None) -> str:
    said = f"{type(problem).__name__}: {problem}"
    if kind is _TOKENIZER and not files.holds(kind.shown_by):
        return _no_tokenizer(files)
    if kind.shown_by == ("*.safetensors",) and not files.holds(kind.shown_by):
        return (
            f"{files.name!r} has no weights in the safetensors format. Weights that are pickled "
            "(pytorch_model.bin) can run any code when they are loaded, so they are refused. If "
            f"you trust them, pass model_kwargs={{'use_safetensors': False}}. ({said})"
        )
    return f"The {kind.name} of {files.name!r} can't be loaded: {said}"


def _no_tokenizer(files: Files) -> str:
    return (
        f"{files.name!r} has no tokenizer. Pass tokenizer=: a hub id, a folder, or a tokenizer "
        "that you loaded."
    )
