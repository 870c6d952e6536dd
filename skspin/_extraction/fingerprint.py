"""A short text that says which numbers a model gives: same fingerprint, same activations."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

import xxhash

from skspin._extraction.source import Source, find_commit

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
    "token",
    "tp_plan",
    "use_safetensors",
}
_CONFIG_SUFFIXES = {".json", ".txt", ".model", ".spm", ".tiktoken", ".py"}
_PICKLED_SUFFIXES = {".bin", ".pt", ".pth"}
_CHUNK_BYTES = 1 << 24
_RACY_NS = 2_000_000_000

# (path, inode, bytes, modified, changed) -> digest of the file.
_known_files: dict[tuple, str] = {}


def fingerprint(source: Source) -> str:
    """Say which numbers a model and its tokenizer give.

    Parameters
    ----------
    source : Source
        What names the model.

    Returns
    -------
    str
        ``"hub:<id>@<commit>"``, ``"folder:<digest>"`` or ``"memory:<digest>"``, followed by
        ``"+<digest>"`` where a tokenizer or options of the user's own are part of it. Names and
        paths of folders are not part of it; their content is.

    Notes
    -----
    For a hub id or a folder neither torch nor transformers is imported, and a file that did not
    change (by path, inode, size and times) is read once per process.
    """
    if source.in_memory:
        from skspin._extraction.parameters import digest_model

        base = f"memory:{digest_model(source.model)}"
    else:
        base = _name_fingerprint(source.model, source)
    extras = _extras(source)
    return f"{base}+{_digest_texts([json.dumps(extras, sort_keys=True)])}" if extras else base


def _name_fingerprint(name: str, source: Source) -> str:
    if os.path.isdir(name):
        pickled = source.options.get("use_safetensors") is False
        return f"folder:{digest_folder(Path(name) / source.options.get('subfolder', ''), pickled)}"
    revision = source.revision if name == source.model else None
    options = source.file_options
    commit = find_commit(
        name,
        revision,
        cache_dir=options.get("cache_dir"),
        token=options.get("token"),
        local_files_only=options.get("local_files_only", False),
    )
    return f"hub:{name}@{commit}"


def _extras(source: Source) -> dict[str, Any]:
    extras = {
        name: _as_json(value)
        for name, value in source.options.items()
        if name not in _NEUTRAL_OPTIONS
    }
    if source.trust_remote_code:
        extras["trust_remote_code"] = True
    if isinstance(source.tokenizer, str):
        extras["tokenizer"] = _name_fingerprint(source.tokenizer, source)
    elif source.tokenizer is not None:
        extras["tokenizer"] = digest_tokenizer(source.tokenizer)
    return extras


def _as_json(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else repr(value)


def digest_folder(folder: Path, pickled: bool = False) -> str:
    """Digest the configuration, tokenizer and weight files of a folder.

    Parameters
    ----------
    folder : Path
        Where the model is.
    pickled : bool, default=False
        Weights are read from pickles, so these count, and safetensors do not.
    """
    weights = _PICKLED_SUFFIXES if pickled else {".safetensors"}
    suffixes = _CONFIG_SUFFIXES | weights
    files = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
    return _digest_texts(f"{path.name}:{digest_file(path)}" for path in files)


def digest_file(path: Path, known: MutableMapping[tuple, str] = _known_files) -> str:
    """Digest a file's content, or remember the digest if the file did not change since."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in known:
        digest = xxhash.xxh3_128()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < _RACY_NS:
            # A clock's tick may hide a second write to a file this young: look again next time.
            return digest.hexdigest()
        known[key] = digest.hexdigest()
    return known[key]


def digest_tokenizer(tokenizer: Any) -> str:
    """Digest what decides which token ids a text becomes.

    The side and the token of the padding are not part of it: padding never counts.
    """
    settings = {
        name: getattr(tokenizer, name, None)
        for name in ("bos_token_id", "cls_token_id", "eos_token_id", "truncation_side")
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Left over from the last call, whatever it was.
        rules["truncation"] = rules["padding"] = None
    else:
        rules = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
        rules["settings"] = repr(sorted(getattr(tokenizer, "init_kwargs", {}).items()))
    return _digest_texts([json.dumps([settings, rules], sort_keys=True)])


def _digest_texts(texts: Iterable[str]) -> str:
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
