"""Read a model's configuration, tokenizer and weights; say what to do where that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from skspin._model.quiet import quiet
from skspin._model.source import Place, Source

# A pooler is what AutoModel puts on top of the last layer; no activation comes through it.
_UNUSED = ("pooler",)


@dataclass(frozen=True)
class _Part:
    """One part of a model: how it is called, and one of which files there must be."""

    name: str
    files: tuple[str, ...]


_CONFIGURATION = _Part("configuration", ("config.json",))
_SAFE_WEIGHTS = _Part("weights", ("*.safetensors", "*.gguf"))
_PICKLED_WEIGHTS = _Part("weights", ("*.bin", "*.pt", "*.pth"))
_TOKENIZER = _Part(
    "tokenizer",
    ("tokenizer.json", "vocab*", "merges*", "*.model", "*.spm", "*.tiktoken", "*.bpe*", "*codes*"),
)


def load_skeleton(source: Source) -> Any:
    """Build a model without weights from its configuration, on torch's meta device."""
    place = _model_place(source)
    with quiet():
        config = _load(
            place,
            _CONFIGURATION,
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
    weights = _SAFE_WEIGHTS if options["use_safetensors"] is not False else _PICKLED_WEIGHTS
    place = _model_place(source)
    with quiet():
        model, report = _load(
            place,
            weights,
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
            _TOKENIZER,
            transformers.AutoTokenizer.from_pretrained,
            trust_remote_code=source.trust_remote_code,
        )
    # Without a vocabulary to read, transformers may make up an empty one.
    if not len(tokenizer) or not (_holds(place, ["tokenizer*"]) or _holds(place, _TOKENIZER.files)):
        raise ValueError(_no_tokenizer(place))
    return tokenizer


def _model_place(source: Source) -> Place:
    """Find where a model is; refuse a folder without one, where transformers would say less."""
    place = source.place
    if place is None:
        raise TypeError("A model in memory is not loaded.")
    if not place.is_folder or _holds(place, _CONFIGURATION.files):
        return place
    if _holds(place, ["adapter_config.json"]):
        raise ValueError(
            f"The folder {place.name!r} holds an adapter, not a model. Load it with peft, and pass "
            "the model itself as model=."
        )
    raise ValueError(
        f"The folder {place.name!r} has no config.json. Give the folder that "
        "model.save_pretrained wrote."
    )


def _load(place: Place, part: _Part, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """Load one part of a model: from this machine if it is there, from the hub if not."""
    options |= {"cache_dir": place.cache_dir, "subfolder": place.subfolder, "token": place.token}
    problem: Exception = FileNotFoundError(f"no {' or '.join(part.files)} on this machine")
    for where in _wheres(place, part):
        try:
            return from_pretrained(**(options | where))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers raises whatever its libraries raise.
            problem = error
    raise ValueError(_advice(place, part, problem)) from problem


def _wheres(place: Place, part: _Part) -> Iterator[dict[str, Any]]:
    """Say where to look, what is on this machine first; the hub is asked only if need be."""
    is_here = _holds(place, part.files)
    # A folder, not a hub id, is all that keeps transformers from asking the hub for more.
    here = {"pretrained_model_name_or_path": place.root}
    if is_here:
        yield here
    if place.has_hub:
        yield {"pretrained_model_name_or_path": place.name, "revision": place.commit}
    if place.root and not is_here:
        yield here


def _advice(place: Place, part: _Part, problem: Exception) -> str:
    said = f"{type(problem).__name__}: {problem}"
    if part is _TOKENIZER and not _holds(place, part.files):
        return _no_tokenizer(place)
    if part is _SAFE_WEIGHTS and not _holds(place, part.files):
        return (
            f"{place.name!r} has no weights in the safetensors format. Weights that are pickled "
            "(pytorch_model.bin) can run any code when they are loaded, so they are refused. If "
            f"you trust them, pass model_kwargs={{'use_safetensors': False}}. ({said})"
        )
    return f"The {part.name} of {place.name!r} can't be loaded: {said}"


def _no_tokenizer(place: Place) -> str:
    return (
        f"{place.name!r} has no tokenizer. Pass tokenizer=: a hub id, a folder, or a tokenizer "
        "that you loaded."
    )


def _holds(place: Place, patterns: Iterable[str]) -> bool:
    """Whether this machine has one of these files of a place."""
    folder = place.folder
    return folder is not None and any(any(folder.glob(pattern)) for pattern in patterns)
