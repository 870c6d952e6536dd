"""Activations of chosen neurons at every token, for explanations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from skspin._layout import Layout
from skspin._model.batches import TokenBudget
from skspin._model.forward import token_forward
from skspin._model.positions import most_tokens
from skspin._model.recipe import Recipe
from skspin._model.registry import Backbone
from skspin._model.tokens import TextEncoder, TokenInputs
from skspin._texts import TextTokens

_MOST_VALUES = 2**24  # in a batch: 64 MiB of float32


def token_activations(
    backbone: Backbone, recipe: Recipe, texts: Sequence[str], layout: Layout
) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
    """Read activations (n_tokens, n_columns) of each text, in whatever order the batches run.

    In a decoder that the text is shifted into, a token's activations are those at the position that
    is to produce it.
    """
    encoder = TextEncoder(
        backbone.tokenizer, recipe.prompt, most_tokens(backbone.model, recipe.max_length)
    )
    by_length: dict[int, list[tuple[str, TextTokens, TokenInputs]]] = defaultdict(list)
    found = {text: encoder.locate(text) for text in texts}
    for text, (inputs, tokens) in found.items():
        by_length[len(tokens.tokens)].append((text, tokens, inputs))
    budget = min(TokenBudget(backbone).tokens, _MOST_VALUES // layout.n_columns)
    # Texts of one length only: there is no padding to take out again.
    for length, alike in by_length.items():
        size = max(1, budget // length)
        for start in range(0, len(alike), size):
            batch = alike[start : start + size]
            values = _read(backbone, [inputs for *_, inputs in batch], layout)
            for (text, tokens, _), activations in zip(batch, values, strict=True):
                yield text, tokens, activations


def _read(backbone: Backbone, batch: list[TokenInputs], layout: Layout) -> np.ndarray:
    """Read activations (n_texts, n_tokens, n_columns) of texts of one length."""
    inputs = {
        name: torch.from_numpy(np.stack([row[name] for row in batch])).long().to(backbone.device)
        for name in batch[0]
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    values = token_forward(backbone.model, backbone.anatomy, inputs, layout.segments)
    return values.cpu().numpy()
