"""Where a frozen model's files are, and loading them: configuration, tokenizer, weights."""

from __future__ import annotations

import copy
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# Options of `from_pretrained` that say where files are, and so concern every file of a model.
_WHERE_OPTIONS = {"cache_dir", "local_files_only", "subfolder", "token"}
# Options that decide where weights go and how fast they are used, not which numbers come out.
NEUTRAL_OPTIONS = _WHERE_OPTIONS | {
    *("attn_implementation", "device_map", "force_download", "low_cpu_mem_usage", "max_memory"),
    *("offload_buffers", "offload_folder", "offload_state_dict", "proxies", "tp_plan"),
    "use_safetensors",
}
# Options that have a parameter, and options that from_pretrained is not to be given here.
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
# Options that no configuration takes, though it has an attribute of that name.
_OF_WEIGHTS = {"ignore_mismatched_sizes", "quantization_config", "variant"}
# A pooler is what AutoModel puts on top of the last layer; no activation comes through it.
_UNUSED = ("pooler",)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_SECONDS = 5.0  # The cached snapshot is used if the hub does not answer in time.


@dataclass(frozen=True)
class _Kind:
    """Files of one kind: which show that they are here, and which to fetch from the hub if not."""

    name: str
    shown_by: tuple[str, ...]
    fetched: tuple[str, ...]


_CONFIGURATION = _Kind("configuration", ("config.json",), ("config.json", "*.py"))
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
class Files:
    """A folder on this machine, or a repository of the hub at one commit."""

    name: str  # path of the folder, or hub id
    revision: str | None = None
    subfolder: str = ""
    cache_dir: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder on this machine."""
        return os.path.isdir(self.name)

    @property
    def root(self) -> str:
        """Folder on this machine, `subfolder` not included; of a hub repository, its snapshot."""
        if self.is_folder:
            return self.name
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            with suppress(FileNotFoundError, ValueError):  # A commit that is here never changes.
                return self.snapshot(self.revision, (), local_files_only=True)
        return _ask_hub(self)[0]

    @property
    def has_hub(self) -> bool:
        """Whether what is missing on this machine can be fetched."""
        return not self.is_folder and _ask_hub(self)[1]

    @property
    def commit(self) -> str | None:
        """The hub's commit when this process first asked for it; None for a folder."""
        return None if self.is_folder else os.path.basename(self.root)

    def holds(self, patterns: Iterable[str]) -> bool:
        """Whether this machine has a file that matches one of the patterns."""
        return any(any(Path(self.root, self.subfolder).glob(pattern)) for pattern in patterns)

    def snapshot(self, revision: str | None, patterns: Iterable[str], **options: Any) -> str:
        """Fetch files that match the patterns from the hub; return the folder they are in."""
        from huggingface_hub import snapshot_download

        inside = f"{self.subfolder}/" if self.subfolder else ""
        with _silence():
            return snapshot_download(
                self.name,
                revision=revision,
                cache_dir=self.cache_dir,
                token=self.token,
                etag_timeout=_HUB_SECONDS,
                # Code may lie above the subfolder.
                allow_patterns=[p if p == "*.py" else f"{inside}{p}" for p in patterns],
                # A pattern's * stands for / too, but other folders hold other models.
                ignore_patterns=[f"{inside}*/*"],
                **options,
            )


@dataclass(frozen=True)
class Source:
    """Everything that names a frozen model and its tokenizer; equal sources name the same one."""

    model: Any  # hub id, folder, or a model in memory, which is equal to itself alone
    tokenizer: Any = None  # hub id, folder, or a tokenizer in memory; None for the model's own
    revision: str | None = None  # branch, tag or commit of a hub model; None for its main branch
    trust_remote_code: bool = False
    # What says where files are holds for configuration and tokenizer too.
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
                "folder, or a loaded transformers model."
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
        # Asking for its class would import torch.
        return hasattr(self.model, "config") and hasattr(self.model, "get_input_embeddings")

    @property
    def files(self) -> Files | None:
        """Where configuration and weights are; None for a model in memory."""
        if self.in_memory:
            return None
        return Files(self.model, self.revision, **self._where_options())

    @property
    def tokenizer_files(self) -> Files | None:
        """Where the tokenizer is; None for a tokenizer in memory."""
        if self.tokenizer is None:
            return self.files
        if not isinstance(self.tokenizer, str):
            return None
        return Files(self.tokenizer, **(self._where_options() | {"subfolder": ""}))

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

    with _silence():
        config, _ = _configure(source)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(
                config, trust_remote_code=source.trust_remote_code
            )


def load_model(source: Source, device: str, dtype: str) -> Any:
    """Load a model's weights in eval mode, frozen; ``device_map`` goes before ``device``."""
    import torch
    import transformers

    with _silence():
        config, options = _configure(source)
        options = {"use_safetensors": True, **options}
        if "quantization_config" in options:
            # Quantised weights are made where they are to be, and can't be moved afterwards.
            options.setdefault("device_map", {"": device})
        model, report = _load(
            _model_files(source),
            _weights(options["use_safetensors"] is False, options.get("variant")),
            transformers.AutoModel.from_pretrained,
            config=config,
            trust_remote_code=source.trust_remote_code,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **options | {"ignore_mismatched_sizes": True},  # refused here, with the sizes
        )
    # Of a mismatched one, transformers 5 gives the name and both shapes, transformers 4 the name.
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    keys = [*report["missing_keys"], *mismatched]
    random = [key for key in keys if not any(name in key for name in _UNUSED)]
    if random:
        raise ValueError(
            f"The weights of {source.model!r} lack {len(random)} of the model's parameters, or "
            f"have them in another shape, e.g. {min(random)!r}. These would be random numbers. "
            "Give a complete checkpoint, and a configuration (or model_kwargs) that fits it."
        )
    model.eval().requires_grad_(False)
    if "device_map" not in options and model.device != torch.device(device):
        model.to(device)
    return model


def _configure(source: Source) -> tuple[Any, dict[str, Any]]:
    """Read a model's configuration, changed by the options that belong to it; give the others."""
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
    kept = {*others, "code_revision"}  # which the model's code is of, too
    return config, {k: v for k, v in options.items() if k not in asked or k in kept}


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer of a model, or take the one that the source holds."""
    import transformers

    files = source.tokenizer_files
    if files is None:
        return source.tokenizer
    with _silence():
        tokenizer = _load(
            files,
            _TOKENIZER,
            transformers.AutoTokenizer.from_pretrained,
            trust_remote_code=source.trust_remote_code,
        )
    # Without a vocabulary to read, transformers may make up an empty one.
    if not len(tokenizer) or not files.holds(("tokenizer*", *_TOKENIZER.shown_by)):
        raise ValueError(_no_tokenizer(files))
    return tokenizer


def _model_files(source: Source) -> Files:
    """Say where a model is; refuse a folder without one, where transformers would say less."""
    files = source.files
    if files is None:
        raise TypeError("A model in memory is not loaded.")
    if not files.is_folder or files.holds(["config.json"]):
        return files
    if files.holds(["adapter_config.json"]):
        raise ValueError(
            f"The folder {files.name!r} holds an adapter, not a model. Load it with peft, and pass "
            "the model itself as model=."
        )
    raise ValueError(
        f"The folder {files.name!r} has no config.json. Give the folder that "
        "model.save_pretrained wrote."
    )


def _load(files: Files, kind: _Kind, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """Load files of one kind: from this machine if they are here, from the hub if not."""
    import torch

    problem: Exception | None = None
    for fetch in (False, True):
        if not files.has_hub if fetch else not files.holds(kind.shown_by) and files.has_hub:
            continue
        try:
            root = files.snapshot(files.commit, kind.fetched) if fetch else files.root
            # A folder, not a hub id, keeps transformers from asking the hub for more.
            return from_pretrained(root, subfolder=files.subfolder, **options)
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


@cache
def _ask_hub(files: Files) -> tuple[str, bool]:
    """Return a repository's snapshot, and whether the hub answered; asked once per process."""
    # Once, so that all that is loaded in a process is of one commit, and a silent hub is waited
    # for once. `commit` then names it by the folder.
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    problem: Exception | None = None
    try:
        if not (constants.HF_HUB_OFFLINE or files.local_files_only):
            try:
                # snapshot_download has no limit of time for its first question (`etag_timeout`
                # is for files), so it is asked only if the hub answers this one.
                hub = HfApi(token=files.token)
                hub.model_info(files.name, revision=files.revision, timeout=_HUB_SECONDS)
                return files.snapshot(files.revision, _CONFIGURATION.fetched), True
            except Exception as error:  # Whatever went wrong, a cached snapshot serves as well.
                problem = error
        return files.snapshot(files.revision, (), local_files_only=True), False
    except HFValidationError as error:
        raise ValueError(
            f"{files.name!r} is neither a folder nor a hub id. Give model= (and tokenizer=) the "
            "path of a folder that exists, or an id such as 'distilbert/distilbert-base-uncased'."
        ) from error
    except LocalEntryNotFoundError:
        raise ValueError(_not_found(files, constants.HF_HUB_OFFLINE, problem)) from problem


def _not_found(files: Files, offline: bool, problem: Exception | None) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if problem is None:
        why = "HF_HUB_OFFLINE is set" if offline else "local_files_only is set"
    elif isinstance(problem, HfHubHTTPError):
        why = f"the hub does not give it ({type(problem).__name__})"
    else:
        why = (
            f"the hub can't be reached ({type(problem).__name__}; offline mode, HF_HUB_OFFLINE=1, "
            "saves the wait)"
        )
    at = "" if files.revision is None else f" at revision={files.revision!r}"
    return (
        f"{files.name!r}{at} is neither a folder nor a model in the Hugging Face cache of this "
        f"machine, and {why}. Check the spelling, give the path of a local folder, or fetch it "
        f"once where there is a network: `hf download {files.name}`. "
        "skspin.datasets.demo_model() is a model that needs no network."
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Silence bars and advice of transformers and the hub, and restore what was set before."""
    # They advise whoever chose a model's class and files. Faults are exceptions, and pass.
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils import logging as hub

    transformers: Any = sys.modules.get("transformers.utils.logging")  # None: not imported
    loggers: list[Any] = [hub, transformers] if transformers else [hub]
    levels = [logger.get_verbosity() for logger in loggers]
    bars = transformers is not None and transformers.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    for logger in loggers:
        logger.set_verbosity_error()
    if bars:
        transformers.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)
        if bars:
            transformers.enable_progress_bar()
        if downloads:
            enable_progress_bars()
