"""Whether a model looks ahead: found out by trying, not by a list of names."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from skspin._layout import Segment
from skspin._model.forward import token_forward
from skspin._model.positions import most_tokens
from skspin._model.recipe import Recipe
from skspin._model.registry import Backbone

_N_TOKENS = 8
_found: WeakKeyDictionary = WeakKeyDictionary()  # by model: which weights, and the answer


def is_causal(backbone: Backbone) -> bool:
    """Tell whether a token's activations stay what they are when another text follows."""
    known, answer = _found.get(backbone.model, ("", False))
    if known != backbone.fingerprint:
        answer = _try(backbone)
        _found[backbone.model] = backbone.fingerprint, answer
    return answer


def _try(backbone: Backbone) -> bool:
    half = most_tokens(backbone.model, _N_TOKENS) // 2
    ids = torch.arange(1, 1 + 2 * half, device=backbone.device).repeat(2, 1)  # (2, n_tokens)
    ids[1, half:] = ids[1, :half]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shorter = getattr(torch, backbone.dtype).itemsize < 4
    tolerance = 1e-2 if shorter else 1e-4
    for stack in backbone.anatomy.stacks.values():
        widths = [stack.width(layer, "hidden") for layer in range(len(stack.blocks) + 1)]
        segments = [Segment(stack.name, i, "hidden", "none", n) for i, n in enumerate(widths)]
        states = token_forward(backbone.model, backbone.anatomy, inputs, segments)[:, :half]
        for one, other in zip(*(text.split(widths, 1) for text in states), strict=True):
            if ((one - other).norm(dim=1) > tolerance * one.norm(dim=1)).any():
                return False
    return True


def check_prefixes(backbone: Backbone, recipe: Recipe) -> None:
    """Refuse a model or a prompt of which one pass does not give what every prefix would."""
    if not is_causal(backbone):
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
