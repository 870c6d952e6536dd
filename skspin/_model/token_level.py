"""Activations of chosen neurons at every token, for explanations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from skspin._layout import Layout
from skspin._model.batches import TokenBudget, encoder_of
from skspin._model.causal import check_cut, check_end, check_prefixes
from skspin._model.forward import token_forward
from skspin._model.recipe import Recipe
from skspin._model.registry import Backbone
from skspin._model.tokens import Window
from skspin._texts import TextTokens

_MOST_VALUES = 2**24  # in a batch: 64 MiB of float32


def token_activations(
    backbone: Backbone, recipe: Recipe, texts: Sequence[str], layout: Layout
) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
    """Read activations (n_tokens, n_columns) at the pooled tokens of each text, in any order.

    In a decoder that the text is shifted into, a token's activations are those at the position that
    is to produce it.
    """
    encoder = encoder_of(backbone, recipe)
    found = {text: encoder.locate(text) for text in texts}
    # Windows of one length go together: there is no padding to take out again.
    by_length: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for text, (windows, _) in found.items():
        for number, window in enumerate(windows):
            by_length[len(window)].append((text, number))
    read: dict[str, dict[int, np.ndarray]] = defaultdict(dict)  # until all windows of a text are
    budget = min(TokenBudget(backbone).tokens, _MOST_VALUES // layout.n_columns)
    for length, alike in by_length.items():
        size = max(1, budget // length)
        for start in range(0, len(alike), size):
            batch = alike[start : start + size]
            windows = [found[text][0][number] for text, number in batch]
            for (text, number), window, values in zip(
                batch, windows, _read(backbone, windows, layout), strict=True
            ):
                read[text][number] = values if window.pooled is None else values[window.pooled]
                if len(read[text]) == len(found[text][0]):
                    parts = read.pop(text)
                    activations = [parts[n] for n in range(len(parts))]
                    yield text, found[text][1], np.concatenate(activations)


def prefix_activations(
    backbone: Backbone, recipe: Recipe, texts: Sequence[str], layout: Layout
) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
    """Read what `token_activations` does, if a token's are those of the prefix that it ends."""
    check_prefixes(backbone, recipe)
    for text, tokens, activations in token_activations(backbone, recipe, texts, layout):
        has_text = (tokens.messages >= 0).any()
        check_end(recipe, bool(has_text and tokens.messages[-1] < 0))
        check_cut(tokens.is_truncated, backbone.tokenizer.truncation_side)
        yield text, tokens, activations


def _read(backbone: Backbone, windows: list[Window], layout: Layout) -> np.ndarray:
    """Read activations (n_windows, n_tokens, n_columns) of windows of one length."""
    inputs = {
        name: torch.from_numpy(np.stack([window.inputs[name] for window in windows])).long()
        for name in windows[0].inputs
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs = {name: values.to(backbone.device) for name, values in inputs.items()}
    values = token_forward(backbone.model, backbone.anatomy, inputs, layout.segments)
    return values.cpu().numpy()
