"""A folder on this machine for a model's files, whether they are here or on the hub."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_SECONDS = 5.0  # The cached snapshot is used if the hub does not answer in time.
CONFIGURATION = ("config.json", "*.py")


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
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    problem: Exception | None = None
    try:
        if not (constants.HF_HUB_OFFLINE or files.local_files_only):
            try:
                # snapshot_download has no time limit for its first request (`etag_timeout` is for
                # files), so it is called only if the hub answers this request.
                hub = HfApi(token=files.token)
                hub.model_info(files.name, revision=files.revision, timeout=_HUB_SECONDS)
                return files.snapshot(files.revision, CONFIGURATION), True
            except Exception as error:  # Whatever went wrong, a cached snapshot serves as well.
                problem = error
        return files.snapshot(files.revision, (), local_files_only=True), False
    except HFValidationError as error:
        raise ValueError(
            f"{files.name!r} is neither a folder nor a hub id, nor a GGUF file. Give model= (and "
            "tokenizer=) the path of a folder or file that exists, or an id such as "
            "'distilbert/distilbert-base-uncased'."
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
        f"machine, nor a GGUF file, and {why}. Check the spelling, give a local path, or fetch it "
        f"once where there is a network: `hf download {files.name}`. "
        "skspin.datasets.demo_model() is a model that needs no network."
    )


@contextmanager
def silence() -> Iterator[None]:
    """Silence bars and advice of transformers and the hub, and restore what was set before."""
    # Their advice is for those who choose a model's class and files. Errors are raised as ever.
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils import logging as hub

    # If transformers is not imported, there is nothing to silence.
    transformers: Any = sys.modules.get("transformers.utils.logging")
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
