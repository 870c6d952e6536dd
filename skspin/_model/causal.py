"""What one pass through a model must be, so that it gives what every prefix of a text would."""

from __future__ import annotations

from skspin._model.recipe import Recipe
from skspin._model.registry import Backbone


def check_prefixes(backbone: Backbone, recipe: Recipe) -> None:
    """Refuse a model or a prompt of which one pass does not give what every prefix would."""
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
