"""The language model as the estimator sees it: named and told apart, loaded for new texts only."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from skspin._layout import Segment
from skspin._model.device import as_devices, resolve_device, resolve_dtype
from skspin._model.files import Source
from skspin._model.fingerprint import fingerprint
from skspin._model.shape import ModelShape
from skspin._store import Store
from skspin._text_tokens import TextTokens


class ModelMismatchError(ValueError):
    """The model's weights or its tokenizer are not those that the estimator was fitted with."""


@dataclass(frozen=True)
class FrozenModel:
    """A model, and how texts are put through it.

    Parameters
    ----------
    source : Source
        Names the model and its tokenizer.
    store : Store
        Keeps what is known of the model, beside its activations.
    device, dtype, prompt, max_length, batch_tokens, n_jobs, verbose
        The parameters of :class:`~skspin.LLMActivationTransformer` of these names.
    """

    source: Source
    store: Store
    device: str | Sequence[str] | None
    dtype: str
    prompt: str | None
    max_length: int
    batch_tokens: int | str
    n_jobs: int | None
    verbose: int

    @cached_property
    def fingerprint(self) -> str:
        """What tells this model and its tokenizer from others; taken once per object."""
        return fingerprint(self.source, self.store)

    @cached_property
    def number_format(self) -> str:
        """The format that ``dtype`` means on the device; several devices must agree on it."""
        if self.source.in_memory and self.dtype == "auto":
            return str(self.source.model.dtype).removeprefix("torch.")
        devices = as_devices(self.device)
        formats = {resolve_dtype(self.dtype, resolve_device(device)) for device in devices}
        if len(formats) != 1:
            raise ValueError(
                f"device={self.device!r} must name devices with one dtype in common, but "
                f"dtype={self.dtype!r} means {sorted(formats)} on them. Set dtype='float32'."
            )
        return formats.pop()

    @property
    def name(self) -> str:
        """What people call the model: a hub id, a folder, or a class."""
        model = self.source.model
        return type(model).__name__ if self.source.in_memory else str(model)

    @property
    def shape(self) -> ModelShape:
        """The model's widths, recalled or read off its configuration."""
        card = self.store.get_metadata(self.fingerprint)
        if card is None:
            from skspin._model.registry import read_anatomy

            card = ModelShape.from_anatomy(read_anatomy(self.source)).to_card()
            self.store.put_metadata(self.fingerprint, card)
        return ModelShape.from_card(card)

    def refuse_unless(self, fitted: str) -> None:
        """Raise a ModelMismatchError if the model is not the one of the fingerprint ``fitted``."""
        if self.fingerprint != fitted:
            raise ModelMismatchError(
                f"model={self.name!r} with its tokenizer has the fingerprint "
                f"{self.fingerprint}, but this transformer was fitted with {fitted}. Give it the "
                "model it was fitted with (pin `revision` for a hub model), or fit again."
            )

    @cached_property
    def context(self) -> str:
        """Digest of everything but text, layer, site and pooling that decides a number."""
        parts = [self.fingerprint, self.prompt, int(self.max_length), self.number_format]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def extract(
        self, texts: Sequence[str], segments: Sequence[Segment], truncation: Truncation
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Put texts through the model; yields positions (k,) and activations (k, n_columns)."""
        from skspin._model.parallel import Work, extract_in_parallel

        truncation.n_texts += len(texts)
        work = Work(
            self.source,
            self.fingerprint,
            self.number_format,
            tuple(segments),
            prompt=self.prompt,
            max_length=self.max_length,
            batch_tokens=self.batch_tokens,
        )
        return extract_in_parallel(
            work,
            texts,
            device=self.device,
            n_jobs=self.n_jobs,
            verbose=self.verbose,
            on_truncated=truncation.add,
        )

    def read_tokens(
        self, texts: Sequence[str], segments: Sequence[Segment]
    ) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
        """Compute activations (n_tokens, n_columns) at each token of each distinct text."""
        from skspin._model.registry import load_backbone
        from skspin._model.token_level import token_activations

        device = as_devices(self.device)[0]
        return token_activations(
            load_backbone(self.source, device, self.number_format),
            texts,
            segments,
            prompt=self.prompt,
            max_length=self.max_length,
        )


@dataclass
class Truncation:
    """How many texts went through a model, and how many of them were cut off."""

    max_length: int
    n_texts: int = field(default=0, init=False)
    n_truncated: int = field(default=0, init=False)

    def add(self, positions: np.ndarray) -> None:
        """Count texts that were cut off, by their positions."""
        self.n_truncated += len(positions)

    def warn(self) -> None:
        """Warn once, however many workers and batches there were."""
        if self.n_truncated:
            warnings.warn(
                f"{self.n_truncated} of {self.n_texts} texts are longer than "
                f"max_length={self.max_length} tokens, or than the model has positions, and were "
                "truncated.",
                UserWarning,
                stacklevel=4,
            )
