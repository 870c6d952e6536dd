"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any


def most_tokens(model: Any, max_length: int) -> int:
    """Lower ``max_length`` to the number of positions that a model has, where it has a bound.

    Parameters
    ----------
    model : PreTrainedModel
        Its configuration says how many positions it was made with. For models with relative
        positions that is not a technical bound, but nothing beyond it was trained.
    max_length : int
        Tokens per text that are asked for.
    """
    config = model.config.get_text_config()
    bound = getattr(config, "max_position_embeddings", None)
    if not isinstance(bound, int) or bound < 1:  # XLNet says -1.
        return max_length
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            # RoBERTa and its kin count positions from behind that of the padding.
            return min(max_length, bound - module.padding_idx - 1)
    return min(max_length, bound)
