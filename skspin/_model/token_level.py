"""Activations of chosen neurons at every token, for explanations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from skspin._layout import Segment
from skspin._model.budget import TokenBudget
from skspin._model.forward import token_forward
from skspin._model.positions import most_tokens
from skspin._model.registry import Backbone
from skspin._model.tokens import TextEncoder
from skspin._text_tokens import TextTokens

_MOST_VALUES = 2**24  # in a batch: 64 MiB of float32


def token_activations(
    backbone: Backbone,
    texts: Sequence[str],
    segments: Sequence[Segment],
    *,
    prompt: str | None = None,
    max_length: int = 512,
) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
    """Run texts through a model and read activations at their tokens.

    Parameters
    ----------
    backbone : Backbone
        A model that is ready to run.
    texts : sequence of str
        Equal texts go through the model once.
    segments : sequence of Segment
        Whose neurons to read; their pooling does not matter.
    prompt, max_length
        As in `skspin._model.batches.extract`.

    Yields
    ------
    text : str
        Each distinct text once, in whatever order the batches run.
    tokens : TextTokens
        Where its tokens are.
    activations : ndarray of shape (n_tokens, n_columns), float32
        In a decoder that the text is shifted into, those at the position that is to produce the
        token.
    """
    encoder = TextEncoder(backbone.tokenizer, prompt, most_tokens(backbone.model, max_length))
    by_length: dict[int, list[tuple[str, TextTokens]]] = defaultdict(list)
    for text in dict.fromkeys(texts):
        tokens = encoder.locate(text)
        by_length[len(tokens.ids)].append((text, tokens))
    n_columns = sum(segment.n_columns for segment in segments)
    budget = min(TokenBudget(backbone).tokens, _MOST_VALUES // n_columns)
    # Texts of one length only: there is no padding to take out again.
    for length, alike in by_length.items():
        size = max(1, budget // length)
        for start in range(0, len(alike), size):
            batch = alike[start : start + size]
            values = _read(backbone, np.stack([tokens.ids for _, tokens in batch]), segments)
            for (text, tokens), activations in zip(batch, values, strict=True):
                yield text, tokens, activations


def _read(backbone: Backbone, ids: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """Read activations (n_texts, n_tokens, n_columns) of texts of one length."""
    inputs = {"input_ids": torch.from_numpy(ids).to(backbone.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return token_forward(backbone.model, backbone.anatomy, inputs, segments).cpu().numpy()
