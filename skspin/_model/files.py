"""What names a frozen model, and where its files are: on this machine or on the hub."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_SECONDS = 5.0  # The cached snapshot is used if the hub does not answer in time.

# Options of `from_pretrained` that say where files are, and so concern every file of a model.
WHERE_OPTIONS = {"cache_dir", "gguf_file", "local_files_only", "subfolder", "token"}
# Options that decide where weights go and how fast they are used, not which numbers come out.
NEUTRAL_OPTIONS = WHERE_OPTIONS | {
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
CONFIGURATION = ("config.json", "*.py")
# Configuration, code, and what tokenizers of all kinds are saved as.
SETTINGS = {
    *(".bpe", ".codes", ".jinja", ".json", ".model", ".py"),
    *(".spm", ".tiktoken", ".tokenizer", ".txt", ".vocab"),
}


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
        """Expand paths, unwrap a SentenceTransformer, and refuse what names no model."""
        for name in ("model", "tokenizer"):
            if isinstance(value := getattr(self, name), str | os.PathLike):
                object.__setattr__(self, name, os.path.expanduser(os.fspath(value)))
        # A SentenceTransformer holds a language model, a tokenizer and a longest text.
        is_sequence = not isinstance(self.model, str) and hasattr(self.model, "__getitem__")
        module = self.model[0] if is_sequence and hasattr(self.model, "tokenizer") else self.model
        if hasattr(module, "auto_model"):
            object.__setattr__(self, "longest", getattr(module, "max_seq_length", None))
            if self.tokenizer is None:
                object.__setattr__(self, "tokenizer", module.tokenizer)
            object.__setattr__(self, "model", module.auto_model)
        if not self.in_memory and not isinstance(self.model, str):
            is_module = hasattr(self.model, "forward") and not isinstance(self.model, type)
            advice = " A module of a model is not enough: pass the whole model."
            raise TypeError(
                f"model is a {type(self.model).__name__}, but must be a hub id, the path of a "
                f"folder or GGUF file, or a loaded transformers model.{advice if is_module else ''}"
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
        for name, value in self.options.items():
            if name in _PARAMETERS:
                raise ValueError(
                    f"model_kwargs has {name!r}. Use the parameter {name.removeprefix('torch_')}= "
                    "instead."
                )
            if name in _REFUSED:
                raise ValueError(
                    f"model_kwargs has {name!r}, which changes what from_pretrained loads or "
                    "returns. Leave it out, or load the model yourself and pass it as model=."
                )
            if name == "gguf_file" and not self.in_memory and os.path.isfile(self.model):
                raise ValueError(
                    f"model={self.model!r} is a file, and model_kwargs names another, gguf_file="
                    f"{value!r}. Leave out gguf_file."
                )
            if name == "config" and not hasattr(value, "model_type"):
                raise ValueError(
                    f"model_kwargs has config={value!r}, but it must be a configuration, e.g. "
                    "AutoConfig.from_pretrained(...). Single values go into model_kwargs "
                    "themselves."
                )

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
        return {name: value for name, value in self.options.items() if name in WHERE_OPTIONS}


# Where files are


@dataclass(frozen=True)
class Files:
    """A folder or GGUF file on this machine, or a repository of the hub at one commit."""

    name: str  # path, or hub id
    revision: str | None = None
    subfolder: str = ""
    cache_dir: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    gguf_file: str | None = None  # of a hub repository; on this machine, `name` is its path

    @property
    def is_local(self) -> bool:
        """Whether ``name`` is a path on this machine, not a hub id."""
        return os.path.exists(self.name)

    @property
    def is_gguf(self) -> bool:
        """Whether configuration, tokenizer and weights are all in one GGUF file."""
        return self.gguf_file is not None or os.path.isfile(self.name)

    @property
    def root(self) -> str:
        """Path on this machine, `subfolder` not included; of a hub repository, its snapshot."""
        if self.is_local:
            return self.name
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            with suppress(FileNotFoundError, ValueError):  # A commit that is here never changes.
                return self.snapshot(self.revision, (), local_files_only=True)
        return _ask_hub(self)[0]

    @property
    def has_hub(self) -> bool:
        """Whether what is missing on this machine can be fetched."""
        return not self.is_local and _ask_hub(self)[1]

    @property
    def commit(self) -> str | None:
        """The hub's commit when this process first asked for it; None for a local path."""
        return None if self.is_local else os.path.basename(self.root)

    def holds(self, patterns: Iterable[str]) -> bool:
        """Whether this machine has a file that matches one of the patterns."""
        return any(any(Path(self.root, self.subfolder).glob(pattern)) for pattern in patterns)

    def snapshot(self, revision: str | None, patterns: Iterable[str], **options: Any) -> str:
        """Fetch files that match the patterns from the hub; return the folder they are in."""
        from huggingface_hub import snapshot_download

        inside = f"{self.subfolder}/" if self.subfolder else ""
        with silence():
            return snapshot_download(
                self.name,
                revision=revision,
                cache_dir=self.cache_dir,
                token=self.token,
                etag_timeout=_HUB_SECONDS,
                # Code may lie above the subfolder.
                allow_patterns=[p if p == "*.py" else f"{inside}{p}" for p in patterns],
                # A pattern's * matches / too, but other folders hold other models.
                ignore_patterns=None if self.is_gguf else [f"{inside}*/*"],
                **options,
            )


@cache
def _ask_hub(files: Files) -> tuple[str, bool]:
    """Return a repository's snapshot, and whether the hub answered; asked once per process."""
    # Once, so that all that a process loads is of one commit, and it waits once if the hub does not
    # answer. `commit` is the name of the snapshot's folder.
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    problem: Exception | None = None
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif files.local_files_only:
        why = "local_files_only is set"
    else:
        try:
            # snapshot_download has no time limit for its first request (`etag_timeout` is for
            # files), so it is called only if the hub answers this request.
            hub = HfApi(token=files.token)
            hub.model_info(files.name, revision=files.revision, timeout=_HUB_SECONDS)
            return files.snapshot(files.revision, CONFIGURATION), True
        except HfHubHTTPError as error:  # Whatever went wrong, a cached snapshot serves as well.
            why, problem = f"the hub does not give it ({type(error).__name__})", error
        except Exception as error:
            advice = "offline mode, HF_HUB_OFFLINE=1, saves the wait"
            why, problem = f"the hub can't be reached ({type(error).__name__}; {advice})", error
    try:
        return files.snapshot(files.revision, (), local_files_only=True), False
    except HFValidationError as error:
        raise ValueError(
            f"{files.name!r} is neither a folder nor a hub id, nor a GGUF file. Give model= (and "
            "tokenizer=) the path of a folder or file that exists, or an id such as "
            "'distilbert/distilbert-base-uncased'."
        ) from error
    except LocalEntryNotFoundError:
        at = "" if files.revision is None else f" at revision={files.revision!r}"
        raise ValueError(
            f"{files.name!r}{at} is neither a folder nor a model in the Hugging Face cache of this "
            f"machine, nor a GGUF file, and {why}. Check the spelling, give a local path, or fetch "
            f"it once where there is a network: `hf download {files.name}`. "
            "skspin.datasets.demo_model() is a model that needs no network."
        ) from problem


@contextmanager
def silence() -> Iterator[None]:
    """Silence bars and advice of transformers and the hub, and restore what was set before."""
    # Their advice is for those who choose a model's class and files. Errors are raised as ever.
    from huggingface_hub import utils as hub

    # If transformers is not imported, there is nothing to silence.
    transformers: Any = sys.modules.get("transformers.utils.logging")
    with ExitStack() as restored, warnings.catch_warnings(action="ignore"):
        for logger in (hub.logging, transformers):
            if logger is not None:
                restored.callback(logger.set_verbosity, logger.get_verbosity())
                logger.set_verbosity_error()
        if not hub.are_progress_bars_disabled():
            restored.callback(hub.enable_progress_bars)
            hub.disable_progress_bars()
        if transformers is not None and transformers.is_progress_bar_enabled():
            restored.callback(transformers.enable_progress_bar)
            transformers.disable_progress_bar()
        yield
