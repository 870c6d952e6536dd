"""Activations of chosen neurons at every token, for explanations and for scores of prefixes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from skspin._layout import Layout
from skspin._model.batches import TokenBudget
from skspin._model.forward import token_forward
from skspin._model.recipe import Recipe
from skspin._model.registry import Backbone
from skspin._model.tokens import TextEncoder, Window
from skspin._texts import TextTokens

_MOST_VALUES = 2**24  # in a batch: 64 MiB of float32


def token_activations(
    backbone: Backbone, recipe: Recipe, texts: Sequence[str], layout: Layout
) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
    """Read activations (n_tokens, n_columns) at the pooled tokens of each text, in any order.

    In the decoder of an encoder-decoder model, which gets the text shifted right, a token's
    activations are those at the position that predicts it.
    """
    encoder = TextEncoder(backbone, recipe)
    found = {text: encoder.locate(text) for text in texts}
    # Windows of one length go together: there is no padding to take out again.
    by_length: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for text, (windows, _) in found.items():
        for number, window in enumerate(windows):
            by_length[len(window)].append((text, number))
    read: dict[str, dict[int, np.ndarray]] = defaultdict(dict)  # of unfinished texts
    budget = min(TokenBudget(backbone).tokens, _MOST_VALUES // layout.n_columns)
    for length, alike in by_length.items():
        size = max(1, budget // length)
        for start in range(0, len(alike), size):
            batch = alike[start : start + size]
            windows = [found[text][0][number] for text, number in batch]
            activations = _read(backbone, windows, layout)
            for (text, number), window, values in zip(batch, windows, activations, strict=True):
                read[text][number] = values if window.pooled is None else values[window.pooled]
                if len(read[text]) == len(found[text][0]):
                    parts = [part for _, part in sorted(read.pop(text).items())]
                    yield text, found[text][1], np.concatenate(parts)


def prefix_activations(
    backbone: Backbone, recipe: Recipe, texts: Sequence[str], layout: Layout
) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
    """Read what `token_activations` does, or raise if it would depend on the tokens that follow."""
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


# Conditions under which one pass gives the activations of every prefix of a text


def check_prefixes(backbone: Backbone, recipe: Recipe) -> None:
    """Refuse a model or a prompt with which one pass does not give those of every prefix."""
    if not backbone.anatomy.is_causal:
        raise ValueError(
            f"model={recipe.model_name!r} looks ahead: what it makes of a token changes with the "
            "text that follows, so one pass does not give the scores of prefixes. Use a causal "
            "decoder, such as SmolLM2, or apply the pipeline to each prefix."
        )
    if recipe.prompt is not None and recipe.prompt.count("{text}") > 1:
        raise ValueError(
            f"prompt={recipe.prompt!r} repeats the text, so a prefix's tokens are not the first "
            "ones of the whole text's. Write {text} once."
        )


def check_end(recipe: Recipe, is_pooled: bool) -> None:
    """Refuse tokens that are pooled although they come after every prefix."""
    if is_pooled:
        raise ValueError(
            "The prompt, the chat template or the tokenizer adds tokens after the text, and "
            f"pool_over={recipe.pool_over!r} pools them. They would come after every prefix, each "
            "time with other activations, which one pass does not give. Fit with pool_over='text' "
            "(or the role of a conversation), or a prompt that ends with {text}."
        )


def check_cut(is_cut: bool, truncation_side: str) -> None:
    """Refuse a text that loses its first tokens."""
    if is_cut and truncation_side == "left":
        raise ValueError(
            "A text has more than max_length tokens, and the tokenizer's truncation_side='left' "
            "drops the first ones, so a longer prefix begins elsewhere. Use a larger max_length, "
            "long_texts='windows', or truncation_side='right'."
        )
