"""What names a frozen model: a folder, a repository of the hub, or the model itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# Options of `from_pretrained` that say where files are, and so concern every file of a model.
_PLACE_OPTIONS = ("cache_dir", "local_files_only", "subfolder", "token")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_SECONDS = 5.0  # A hub that is silent for longer is not there.


@dataclass(frozen=True)
class Place:
    """Where files are: a folder of this machine, or a repository of the hub at one commit.

    Parameters
    ----------
    name : str
        Path of a folder, or hub id.
    revision : str or None, default=None
        Branch, tag or commit of a hub repository; None for its main branch.
    subfolder : str, default=""
        Folder within it.
    cache_dir : str or None, default=None
        The hub's cache on this machine; None for its usual place.
    token : str, bool or None, default=None
        What opens a private repository.
    local_files_only : bool, default=False
        Never ask the hub.
    """

    name: str
    revision: str | None = None
    subfolder: str = ""
    cache_dir: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return os.path.isdir(self.name)

    @property
    def commit(self) -> str | None:
        """The commit of a hub repository, as it was when this process first asked; else None."""
        if self.is_folder:
            return None
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            if _find_in_cache(self, self.revision) is not None:
                return self.revision  # nothing to ask
        return _ask(self)[0]

    @property
    def has_hub(self) -> bool:
        """Whether what is missing on this machine may be fetched."""
        return not self.is_folder and _ask(self)[1]

    @property
    def root(self) -> str | None:
        """Folder of the files that this machine has, `subfolder` not included; None without any."""
        return self.name if self.is_folder else _find_in_cache(self, self.commit)

    @property
    def folder(self) -> Path | None:
        """Folder of the files that this machine has, `subfolder` included; None without any."""
        return None if self.root is None else Path(self.root, self.subfolder)


@dataclass(frozen=True)
class Source:
    """Everything that names a frozen model and its tokenizer.

    Equal sources name the same model. A model in memory is equal to itself alone.

    Parameters
    ----------
    model : str, path or PreTrainedModel
        Hub id, local folder, or a model in memory (a PEFT-wrapped one too).
    tokenizer : str, path, tokenizer or None, default=None
        Hub id, local folder or a tokenizer in memory; None for the model's own.
    revision : str or None, default=None
        Branch, tag or commit of a hub model; None for its main branch.
    trust_remote_code : bool, default=False
        Run Python code that comes with the model.
    model_kwargs : mapping or None, default=None
        Passed to ``AutoModel.from_pretrained``. What says where files are (``cache_dir``,
        ``local_files_only``, ``subfolder``, ``token``) holds for configuration and tokenizer too.
    """

    model: Any
    tokenizer: Any = None
    revision: str | None = None
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] | None = field(default=None, hash=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what names no model."""
        for name in ("model", "tokenizer"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        if not self.in_memory and not isinstance(self.model, str):
            raise TypeError(
                f"model is a {type(self.model).__name__}, but must be a hub id, the path of a "
                "folder, or a loaded transformers model."
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
        for name in ("dtype", "torch_dtype", "revision", "trust_remote_code"):
            if name in self.options:
                own = name.removeprefix("torch_")
                raise ValueError(f"model_kwargs has {name!r}. Use the parameter {own}= instead.")

    @property
    def options(self) -> dict[str, Any]:
        """`model_kwargs` as a dict."""
        return dict(self.model_kwargs or {})

    @property
    def in_memory(self) -> bool:
        """Whether the model is an object, not a name."""
        # Asking for its class would import torch.
        return hasattr(self.model, "config") and hasattr(self.model, "forward")

    @property
    def place(self) -> Place | None:
        """Where configuration and weights are; None for a model in memory."""
        if self.in_memory:
            return None
        return Place(self.model, self.revision, **self._place_options())

    @property
    def tokenizer_place(self) -> Place | None:
        """Where the tokenizer is; None for a tokenizer in memory."""
        if self.tokenizer is None:
            return self.place
        if not isinstance(self.tokenizer, str):
            return None
        return Place(self.tokenizer, **(self._place_options() | {"subfolder": ""}))

    @property
    def commit(self) -> str | None:
        """The hub model's commit; None for a folder and for a model in memory."""
        return None if self.place is None else self.place.commit

    def _place_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name in _PLACE_OPTIONS}


@cache
def _ask(place: Place) -> tuple[str, bool]:
    """Ask the hub which commit a branch is, or the cache on this machine if there is no hub.

    Once per process, so that all that is loaded in it is of one commit, and a hub that is silent
    is waited for once.

    Returns
    -------
    commit : str
        40 hexadecimal digits.
    has_hub : bool
        False if the hub may not be asked, or gave no answer.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(place.name)
    except HFValidationError as error:
        raise ValueError(
            f"{place.name!r} is neither a folder nor a hub id. Give model= (and tokenizer=) the "
            "path of a folder that exists, or an id such as 'distilbert/distilbert-base-uncased'."
        ) from error
    may_ask = not (constants.HF_HUB_OFFLINE or place.local_files_only)
    problem: Exception | None = None
    if may_ask:
        try:
            hub = HfApi(token=place.token)
            said = hub.model_info(place.name, revision=place.revision, timeout=_HUB_SECONDS)
            return str(said.sha), True
        except Exception as error:  # Whatever went wrong, a copy on this machine serves as well.
            problem = error
    cached = _find_in_cache(place, place.revision)
    if cached is None:
        raise ValueError(_not_found(place, constants.HF_HUB_OFFLINE, problem)) from problem
    return os.path.basename(cached), False


def _find_in_cache(place: Place, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    inside = f"{place.subfolder}/config.json" if place.subfolder else "config.json"
    found = try_to_load_from_cache(place.name, inside, cache_dir=place.cache_dir, revision=revision)
    # .../models--org--name/snapshots/<commit>/config.json
    return found.removesuffix(inside).rstrip(os.sep) if isinstance(found, str) else None


def _not_found(place: Place, offline: bool, problem: Exception | None) -> str:
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
    at = "" if place.revision is None else f" at revision={place.revision!r}"
    return (
        f"{place.name!r}{at} is neither a folder nor a model in the Hugging Face cache of this "
        f"machine, and {why}. Check the spelling, give the path of a local folder, or fetch it "
        f"once where there is a network: `hf download {place.name}`. "
        "skspin.datasets.demo_model() is a model that needs no network."
    )
