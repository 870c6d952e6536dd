"""What names a frozen model: where it comes from, and which commit that is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# Options of `from_pretrained` that say where files are, and so concern every file of a model.
_FILE_OPTIONS = ("cache_dir", "local_files_only", "proxies", "subfolder", "token")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_SECONDS = 5.0  # Long enough for a slow answer; a hub that is silent for longer is not there.


@dataclass(frozen=True)
class Source:
    """Everything that names a frozen model and its tokenizer.

    Two sources that are equal name the same model; a model in memory is equal to itself alone.

    Parameters
    ----------
    model : str or PreTrainedModel
        Hub id, local folder, or a model in memory (a PEFT-wrapped one too).
    tokenizer : str, tokenizer or None, default=None
        Hub id, local folder or a tokenizer in memory; None for the model's own.
    revision : str or None, default=None
        Branch, tag or commit of a hub model; None for its main branch.
    trust_remote_code : bool, default=False
        Run Python code that comes with the model.
    model_kwargs : mapping or None, default=None
        Passed to ``AutoModel.from_pretrained``. Options that say where files are (``token``,
        ``cache_dir``, ``subfolder`` and the like) are used for configuration and tokenizer too.
    """

    model: Any
    tokenizer: Any = None
    revision: str | None = None
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        """Refuse what can not name a model."""
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        if not self.in_memory and not isinstance(self.model, str):
            raise TypeError(
                f"model is a {type(self.model).__name__}, but must be a hub id, a folder, or a "
                "loaded transformers model."
            )
        if self.in_memory and (self.tokenizer is None):
            raise ValueError(
                f"model is a {type(self.model).__name__} in memory, which has no tokenizer of its "
                "own. Pass tokenizer=, e.g. AutoTokenizer.from_pretrained(...)."
            )
        for name in ("dtype", "torch_dtype"):
            if name in self.options:
                raise ValueError(f"model_kwargs has {name!r}. Use the parameter dtype= instead.")

    @property
    def options(self) -> dict[str, Any]:
        """`model_kwargs` as a dict."""
        return dict(self.model_kwargs or {})

    @property
    def file_options(self) -> dict[str, Any]:
        """The part of `model_kwargs` that says where files are."""
        return {name: value for name, value in self.options.items() if name in _FILE_OPTIONS}

    @property
    def in_memory(self) -> bool:
        """Whether the model is an object, not a name."""
        # A model has a configuration and a forward pass; asking for its class would import torch.
        return hasattr(self.model, "config") and hasattr(self.model, "forward")

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder on this machine."""
        return not self.in_memory and os.path.isdir(self.model)

    @property
    def commit(self) -> str | None:
        """The hub model's commit; None for a folder and for a model in memory.

        Asked from the hub once per process; when the hub can not be reached, or
        ``HF_HUB_OFFLINE`` is set, read from the hub's cache on this machine.
        """
        if self.in_memory or self.is_folder:
            return None
        options = self.file_options
        return find_commit(
            self.model,
            self.revision,
            cache_dir=options.get("cache_dir"),
            token=options.get("token"),
            local_files_only=options.get("local_files_only", False),
        )


@cache
def find_commit(
    repository: str,
    revision: str | None = None,
    *,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> str:
    """Find which commit a branch or tag of a hub model is.

    Parameters
    ----------
    repository : str
        Hub id.
    revision : str or None, default=None
        Branch, tag or commit; None for the main branch.
    cache_dir : str or None, default=None
        The hub's cache on this machine; None for its usual place.
    token : str, bool or None, default=None
        Access token of a private model.
    local_files_only : bool, default=False
        Do not ask the hub.

    Returns
    -------
    str
        40 hexadecimal digits.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    problem: Exception | None = None
    if not (constants.HF_HUB_OFFLINE or local_files_only):
        try:
            info = HfApi(token=token).model_info(
                repository, revision=revision, timeout=_HUB_SECONDS
            )
            return str(info.sha)
        except Exception as error:  # Whatever went wrong, a copy in the cache serves as well.
            problem = error
    cached = try_to_load_from_cache(
        repository, "config.json", cache_dir=cache_dir, revision=revision
    )
    if isinstance(cached, str):
        # .../models--org--name/snapshots/<commit>/config.json
        return os.path.basename(os.path.dirname(cached))
    raise ValueError(
        _not_found(repository, revision, constants.HF_HUB_OFFLINE, problem)
    ) from problem


def _not_found(
    repository: str, revision: str | None, offline: bool, problem: Exception | None
) -> str:
    at = "" if revision is None else f" at revision={revision!r}"
    if problem is None:
        why = "HF_HUB_OFFLINE is set" if offline else "local_files_only is set"
    else:
        why = f"the hub gave {type(problem).__name__}"
    return (
        f"model={repository!r}{at} is neither a folder nor in the Hugging Face cache of this "
        f"machine, and {why}. Give the path of a local folder, check the id's spelling and "
        "access (model_kwargs={'token': ...}), or fetch it once with a network: "
        f"`hf download {repository}`. skspin.datasets.demo_model() needs no download."
    )
