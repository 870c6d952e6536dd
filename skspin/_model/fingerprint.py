"""A short text that says which numbers a model gives: same fingerprint, same activations."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import xxhash

from skspin._model.source import Place, Source

# Options of `from_pretrained` that decide where and how fast, not which numbers.
_NEUTRAL_OPTIONS = {
    "attn_implementation",
    "cache_dir",
    "device_map",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "subfolder",
    "token",
    "tp_plan",
    "use_safetensors",
}
# Configuration, code, and what tokenizers of all kinds are saved as.
_SETTINGS = {
    ".bpe",
    ".codes",
    ".json",
    ".model",
    ".py",
    ".spm",
    ".tiktoken",
    ".tokenizer",
    ".txt",
    ".vocab",
}
_SAFE_WEIGHTS = {".safetensors", ".gguf"}
_PICKLED_WEIGHTS = {".bin", ".pt", ".pth"}
_CHUNK_BYTES = 1 << 24
_YOUNG_NS = 2_000_000_000

# Path, inode, bytes and times of a file -> digest of its content.
_known_files: dict[str, str] = {}


class Cards(Protocol):
    """Where digests of files are remembered beyond this process, e.g. a store."""

    def get_card(self, name: str) -> Any:
        """Return the document of this name, or None."""

    def put_card(self, name: str, document: Any) -> None:
        """Keep a document under a name."""


def fingerprint(source: Source, cards: Cards | None = None) -> str:
    """Say which numbers a model and its tokenizer give.

    Parameters
    ----------
    source : Source
        What names the model.
    cards : Cards or None, default=None
        Remembers the digests of files, so that one that did not change (by path, inode, size and
        times) is not read again in another process either; None for this process alone.

    Returns
    -------
    str
        ``"hub:<id>@<commit>"``, ``"folder:<digest>"`` or ``"memory:<digest>"``, and behind it
        ``"+<digest>"`` where a tokenizer or options of the user's own belong to it. The path of a
        folder is not part of it; its content is.

    Notes
    -----
    For a hub id and for a folder, neither torch nor transformers is imported.
    """
    pickled = source.options.get("use_safetensors") is False
    if source.place is None:
        from skspin._model.parameters import digest_model

        model = f"memory:{digest_model(source.model)}"
    else:
        model = _place_fingerprint(source.place, pickled, cards)
    extras = {
        name: _as_json(value)
        for name, value in source.options.items()
        if name not in _NEUTRAL_OPTIONS
    }
    if source.trust_remote_code:
        extras["trust_remote_code"] = True
    if source.tokenizer_place is None:
        extras["tokenizer"] = digest_tokenizer(source.tokenizer)
    elif source.tokenizer is not None:
        extras["tokenizer"] = _place_fingerprint(source.tokenizer_place, pickled, cards)
    return f"{model}+{_digest([json.dumps(extras, sort_keys=True)])}" if extras else model


def _place_fingerprint(place: Place, pickled: bool, cards: Cards | None) -> str:
    if place.is_folder:
        return f"folder:{digest_folder(Path(place.name, place.subfolder), pickled, cards)}"
    within = f"/{place.subfolder}" if place.subfolder else ""
    return f"hub:{place.name}{within}@{place.commit}"


def _as_json(value: Any) -> Any:
    value = value.to_dict() if hasattr(value, "to_dict") else value
    if isinstance(value, dict):  # a configuration and what it writes of itself are the same
        return {str(name): _as_json(one) for name, one in value.items()}
    return value if isinstance(value, str) else repr(value)


def digest_folder(folder: Path, pickled: bool, cards: Cards | None) -> str:
    """Digest the configuration, tokenizer and weight files of a folder.

    Parameters
    ----------
    folder : Path
        Where the files are.
    pickled : bool
        Whether weights are read from pickles; safetensors do not count then.
    cards : Cards or None
        See `fingerprint`.
    """
    suffixes = _SETTINGS | (_PICKLED_WEIGHTS if pickled else _SAFE_WEIGHTS)
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    return _digest(f"{path.name}:{digest_file(path, cards)}" for path in files)


def digest_file(path: Path, cards: Cards | None) -> str:
    """Digest a file's content, or remember its digest if the file did not change since."""
    real = os.path.realpath(path)
    stat = os.stat(real)
    # The time of change, unlike that of modification, can not be set back.
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    key = json.dumps(["file", real, stat.st_ino, stat.st_size, *times])
    card = None if cards is None else cards.get_card(key)
    digest = card or _known_files.get(key) or _read_digest(real)
    # A second write to a file this young could leave the same times: look again next time.
    if time.time_ns() - max(times) > _YOUNG_NS:
        _known_files[key] = digest
        if cards is not None and card is None:
            cards.put_card(key, digest)
    return digest


def _read_digest(path: str) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_tokenizer(tokenizer: Any) -> str:
    """Digest what decides which token ids a text becomes.

    The side of the padding is not part of it, nor are the length and padding that an earlier call
    left in a tokenizer: none of them changes an activation.
    """
    tokens = ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id", "truncation_side")
    settings = {name: getattr(tokenizer, name, None) for name in tokens}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
        rules["options"] = repr(sorted(getattr(tokenizer, "init_kwargs", {}).items()))
        rules["special"] = repr(sorted(getattr(tokenizer, "special_tokens_map", {}).items()))
    else:
        rules = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return _digest([json.dumps([settings, rules], sort_keys=True)])


def _digest(texts: Iterable[str]) -> str:
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
