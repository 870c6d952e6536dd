"""Read a model's configuration, tokenizer and weights; say what to do where that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from skspin._extraction.quiet import quiet
from skspin._extraction.source import Place, Source

# A pooler is what AutoModel puts on top of the last layer; no activation comes through it.
_UNUSED = ("pooler",)
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.bpe*",
    "*codes*",
)


def load_skeleton(source: Source) -> Any:
    """Build a model without weights from its configuration, on torch's meta device."""
    place = _model_place(source)
    with quiet():
        config = _load(
            place,
            "configuration",
            transformers.AutoConfig.from_pretrained,
            trust_remote_code=source.trust_remote_code,
        )
        with torch.device("meta"):
            return transformers.AutoModel.from_config(
                config, trust_remote_code=source.trust_remote_code
            )


def load_model(source: Source, device: str, dtype: str) -> Any:
    """Load a model's weights.

    Parameters
    ----------
    source : Source
        A hub id or a folder.
    device : str
        Where to; ``device_map`` in the source's ``model_kwargs`` goes before it.
    dtype : str
        Format of the weights.

    Returns
    -------
    PreTrainedModel
        In evaluation mode, its parameters frozen.
    """
    options = {"use_safetensors": True, **source.options}
    if "quantization_config" in options:
        # Quantised weights are made where they are to be, and can't be moved afterwards.
        options.setdefault("device_map", {"": device})
    place = _model_place(source)
    with quiet():
        model, report = _load(
            place,
            "weights",
            transformers.AutoModel.from_pretrained,
            trust_remote_code=source.trust_remote_code,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **options,
        )
    missing = [k for k in report["missing_keys"] if not any(name in k for name in _UNUSED)]
    if missing:
        raise ValueError(
            f"The weights of {source.model!r} lack {len(missing)} of the model's parameters, e.g. "
            f"{min(missing)!r}. These would be random numbers. Give a complete checkpoint."
        )
    model.eval().requires_grad_(False)
    if "device_map" not in options and model.device != torch.device(device):
        model.to(device)
    return model


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer of a model, or take the one that the source holds."""
    place = source.tokenizer_place
    if place is None:
        return source.tokenizer
    with quiet():
        tokenizer = _load(
            place,
            "tokenizer",
            transformers.AutoTokenizer.from_pretrained,
            trust_remote_code=source.trust_remote_code,
        )
    # Without any file to read, transformers may make up an empty tokenizer.
    if place.folder is not None and not _holds(place.folder, _TOKENIZER_FILES):
        raise ValueError(_no_tokenizer(place))
    return tokenizer


def _model_place(source: Source) -> Place:
    """Find where a model is; refuse a folder without one, where transformers would say less."""
    place = source.place
    if place is None:
        raise TypeError("A model in memory is not loaded.")
    if not place.is_folder or _holds(place.folder, ["config.json"]):
        return place
    if _holds(place.folder, ["adapter_config.json"]):
        raise ValueError(
            f"The folder {place.name!r} holds an adapter, not a model. Load it with peft, and pass "
            "the model itself as model=."
        )
    raise ValueError(
        f"The folder {place.name!r} has no config.json. Give the folder that "
        "model.save_pretrained wrote."
    )


def _load(place: Place, part: str, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """Load one part of a model: from this machine if it is there, from the hub if not."""
    where = {
        "revision": place.commit,
        "cache_dir": place.cache_dir,
        "subfolder": place.subfolder,
        "token": place.token,
    }
    problem: Exception
    # The commit is known, so what is here already is right, and asking the hub is in vain.
    for local in (True,) if place.is_folder or place.local_files_only else (True, False):
        try:
            return from_pretrained(place.name, **{**options, **where, "local_files_only": local})
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers raises whatever its libraries raise.
            problem = error
    raise ValueError(_advice(place, part, options, problem)) from problem


def _advice(place: Place, part: str, options: dict[str, Any], problem: Exception) -> str:
    said = f"The {part} of {place.name!r} can't be loaded: {type(problem).__name__}: {problem}"
    folder = place.folder
    if part == "tokenizer" and (folder is None or not _holds(folder, _TOKENIZER_FILES)):
        return _no_tokenizer(place)
    safe = options.get("use_safetensors", False) and not options.get("gguf_file")
    if part == "weights" and safe and (folder is None or not _holds(folder, ["*.safetensors*"])):
        return (
            f"{place.name!r} has no weights in the safetensors format. Weights that are pickled "
            "(pytorch_model.bin) can run any code when they are loaded, so they are refused. If "
            "you trust them, pass model_kwargs={'use_safetensors': False}. "
            f"({type(problem).__name__}: {problem})"
        )
    return said


def _no_tokenizer(place: Place) -> str:
    return (
        f"{place.name!r} has no tokenizer. Pass tokenizer=: a hub id, a folder, or a tokenizer "
        "that you loaded."
    )


def _holds(folder: Path | None, patterns: Any) -> bool:
    return folder is not None and any(any(folder.glob(pattern)) for pattern in patterns)
