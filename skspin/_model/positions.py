"""How many tokens a model has positions for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from skspin._model.anatomy import bare_model, halves_of
from skspin._model.architectures import architecture_of

# What configurations call the number of positions, where it is not the one name for all.
_NAMES = ("max_position_embeddings", "max_{}_position_embeddings", "max_seq_len")
_UNSCALED = re.compile(r"'original_max_position_embeddings': (\d+)")
# A table of positions, such as "wpe", "embed_positions" or "position_embeddings".
_TABLE = re.compile(r"(^|[._])(wpe|pos|positions?|positional)(_(emb\w*|encod\w*))?$")


def most_tokens(model: Any, max_length: int, stacks: Sequence[str | None] | None = None) -> int:
    """Lower ``max_length`` to the number of positions of the named stacks; None means all of them.

    What the configuration says is not always a technical bound: with relative positions, nothing
    beyond it was trained.
    """
    model = bare_model(model)
    bounds: list[Any] = [max_length]
    for name, half in halves_of(model).items():
        if stacks is None or name in stacks:
            config = getattr(half, "config", model.config).get_text_config()
            bounds += [getattr(config, key.format(name), None) for key in _NAMES]
            ahead = architecture_of(config).n_ahead
            bounds += [size - ahead for size in _table_sizes(half)]
    # XLNet says -1: as many as one likes.
    return min(bound for bound in bounds if isinstance(bound, int) and bound > 0)


def _table_sizes(stack: Any) -> Iterator[int]:
    for path, module in stack.named_modules():
        table = getattr(module, "weight", None)  # sinusoids that grow have none
        if table is not None and hasattr(module, "padding_idx") and _TABLE.search(path):
            size = getattr(module, "num_embeddings", len(table))
            # RoBERTa and its kin count positions from behind that of the padding, BART from 2 up.
            behind_padding = -1 if module.padding_idx is None else module.padding_idx
            yield size - max(behind_padding + 1, getattr(module, "offset", 0))


def longest_unscaled(model: Any) -> float:
    """Say up to how many tokens a batch may have without scaling the positions of all its texts."""
    return min(
        (
            int(bound)
            for module in model.modules()
            if "longrope" in str(getattr(module, "rope_type", ""))
            for bound in _UNSCALED.findall(str(module.config.to_dict()))
        ),
        default=inf,
    )
