"""Find, load and share a frozen model and its tokenizer."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from skspin._extraction.anatomy import Anatomy, find_anatomy
from skspin._extraction.device import resolve_device, resolve_dtype
from skspin._extraction.fingerprint import fingerprint
from skspin._extraction.source import Source

__all__ = [
    "Backbone",
    "Source",
    "fingerprint",
    "forget_models",
    "load_backbone",
    "read_anatomy",
    "resolve_device",
    "resolve_dtype",
    "resolve_placement",
]


@dataclass
class Measured:
    """What running a model has taught about it, for as long as the model lives.

    Parameters
    ----------
    batch_tokens : int or None
        Tokens in a batch that worked best; None while that is not known.
    limit_tokens : int or None
        Tokens in a batch that fit into memory; None while no batch was too large.
    lock : Lock
        Held while these are changed.
    """

    batch_tokens: int | None = None
    limit_tokens: int | None = None
    lock: Any = field(default_factory=threading.Lock)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen model that is ready to run, and what belongs to it.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode, unless the caller passed it in.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    anatomy : Anatomy
        Where its activations are.
    device : device
        Where its inputs go.
    dtype : str
        Format of its activations, e.g. ``"float32"``.
    fingerprint : str
        Says which numbers it gives.
    measured : Measured
        What running it has taught.
    """

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    device: torch.device
    dtype: str
    fingerprint: str
    measured: Measured = field(default_factory=Measured)


_lock = threading.RLock()
_loaded: dict[tuple[Source, str, str], Backbone] = {}
# A model of the caller's is not ours to keep alive.
_measured: weakref.WeakKeyDictionary[Any, Measured] = weakref.WeakKeyDictionary()


def load_backbone(source: Source, device: Any = None, dtype: Any = "auto") -> Backbone:
    """Load a model, or find the copy that this process has on that device already.

    Parameters
    ----------
    source : Source
        What names the model.
    device, dtype
        See `resolve_placement`.

    Returns
    -------
    Backbone
        Shared by all that ask for an equal source, device and dtype, from any thread. A model in
        memory is used where it is; it is neither copied nor kept alive.
    """
    device, dtype = resolve_placement(source, device, dtype)
    if source.in_memory:
        return _adopt(source, dtype)
    with _lock:
        identity = fingerprint(source)
        known = _loaded.get((source, device, dtype))
        # A folder may hold other weights by now.
        if known is None or known.fingerprint != identity:
            _loaded.pop((source, device, dtype), None)
            known = _loaded[source, device, dtype] = _load(source, device, dtype, identity)
        return known


def forget_models() -> None:
    """Release all loaded models; one that is still in use goes when its user is done."""
    with _lock:
        _loaded.clear()


def resolve_placement(source: Source, device: Any = None, dtype: Any = "auto") -> tuple[str, str]:
    """Say on which device and in which format a model runs.

    Parameters
    ----------
    source : Source
        What names the model.
    device : str, torch.device or None, default=None
        See `resolve_device`. A model in memory stays where it is; another device is refused.
    dtype : str or torch.dtype, default="auto"
        See `resolve_dtype`. A model in memory keeps its own; another one is refused.

    Returns
    -------
    device, dtype : str
    """
    if not source.in_memory:
        device = resolve_device(device)
        return device, resolve_dtype(dtype, device)
    own_device = _input_device(source.model)
    own_dtype = str(source.model.dtype).removeprefix("torch.")
    if device is not None and torch.device(resolve_device(device)) != own_device:
        raise ValueError(
            f"device={device!r}, but the model passed in is on {own_device}. Move it yourself with "
            "model.to(...), or leave device=None."
        )
    if str(dtype) != "auto" and resolve_dtype(dtype, str(own_device)) != own_dtype:
        raise ValueError(
            f"dtype={dtype!r}, but the model passed in is {own_dtype}. Convert it yourself with "
            "model.to(...), or leave dtype='auto'."
        )
    return str(own_device), own_dtype


def read_anatomy(source: Source) -> Anatomy:
    """Find a model's blocks and widths from its configuration alone.

    Parameters
    ----------
    source : Source
        What names the model; a model in memory is looked at as it is.

    Returns
    -------
    Anatomy
        Of a model without weights (on torch's meta device), for reading widths.
    """
    if source.in_memory:
        return find_anatomy(source.model)
    with _lock, _quiet():
        config = _from_pretrained(source, "configuration", transformers.AutoConfig.from_pretrained)
        with torch.device("meta"):
            skeleton = transformers.AutoModel.from_config(
                config, trust_remote_code=source.trust_remote_code
            )
    return find_anatomy(skeleton)


def _adopt(source: Source, dtype: str) -> Backbone:
    model = source.model
    with _lock:
        measured = _measured.setdefault(model, Measured())
    return Backbone(
        model,
        _load_tokenizer(source),
        find_anatomy(model),
        _input_device(model),
        dtype,
        fingerprint(source),
        measured,
    )


def _load(source: Source, device: str, dtype: str, identity: str) -> Backbone:
    options = {"use_safetensors": True} | source.options
    with _quiet():
        tokenizer = _load_tokenizer(source)
        model, info = _from_pretrained(
            source,
            "weights",
            transformers.AutoModel.from_pretrained,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **options,
        )
    # A pooler is what AutoModel adds on top of the last layer; no activation comes through it.
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    if missing:
        raise ValueError(
            f"The weights of model={source.model!r} lack {len(missing)} of the "
            f"parameters, e.g. {sorted(missing)[0]!r}, which would be random numbers. Give a complete checkpoint."
        )
    model.eval().requires_grad_(False)
    if "device_map" not in options and not getattr(model, "is_quantized", False):
        model.to(device)
    return Backbone(model, tokenizer, find_anatomy(model), _input_device(model), dtype, identity)


def _load_tokenizer(source: Source) -> Any:
    if source.tokenizer is not None and not isinstance(source.tokenizer, str):
        return source.tokenizer
    with _quiet():
        return _from_pretrained(source, "tokenizer", transformers.AutoTokenizer.from_pretrained)


def _from_pretrained(source: Source, part: str, load: Callable[..., Any], **options: Any) -> Any:
    """Call a ``from_pretrained`` of transformers; its failure becomes an error that helps."""
    own = part != "tokenizer" or source.tokenizer is None
    name = source.model if own else source.tokenizer
    commit = source.commit if own else None
    try:
        return load(
            name,
            revision=commit,
            trust_remote_code=source.trust_remote_code,
            **(source.file_options | options),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The {part} of model={name!r} can not be loaded: {error}") from error


def _input_device(model: Any) -> torch.device:
    return next(p.device for p in model.parameters() if not p.is_meta)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' bars and advice, and give back what was set before."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if downloads:
            enable_progress_bars()
