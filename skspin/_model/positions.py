"""How many tokens a model has positions for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from skspin._model.anatomy import bare_model, halves_of
from skspin._model.architectures import architecture_of

# Names that configurations have for the number of positions; {} stands for the stack.
_NAMES = ("max_position_embeddings", "max_{}_position_embeddings", "max_seq_len")
_UNSCALED = re.compile(r"'original_max_position_embeddings': (\d+)")
# A table of positions, such as "wpe", "embed_positions" or "position_embeddings".
_TABLE = re.compile(r"(^|[._])(wpe|pos|positions?|positional)(_(emb\w*|encod\w*))?$")


def most_tokens(model: Any, max_length: int, stacks: Sequence[str | None] | None = None) -> int:
    """Lower ``max_length`` to the number of positions of the named stacks; None means all of them.

    The configuration's number is not always a technical bound: with relative positions, it is the
    length up to which the model was trained.
    """
    model = bare_model(model)
    bounds: list[Any] = [max_length]
    for name, half in halves_of(model).items():
        if stacks is None or name in stacks:
            config = getattr(half, "config", model.config).get_text_config()
            bounds += [getattr(config, key.format(name), None) for key in _NAMES]
            architecture = architecture_of(config)
            step = _step(config) if architecture.rounds_up else 1
            bounds += [size - architecture.n_ahead for size in _table_sizes(half, step)]
    # XLNet says -1, which means no bound.
    return min(bound for bound in bounds if isinstance(bound, int) and bound > 0)


def _step(config: Any) -> int:
    """Return the number to a multiple of which a pass rounds its tokens up."""
    step = getattr(config, "block_size", getattr(config, "attention_window", 1))
    return max(step) if isinstance(step, list) else step


def _table_sizes(stack: Any, step: int) -> Iterator[int]:
    for path, module in stack.named_modules():
        table = getattr(module, "weight", None)  # sinusoidal positions without a bound have none
        if table is None or not hasattr(module, "padding_idx") or not _TABLE.search(path):
            continue
        size = getattr(module, "num_embeddings", len(table))
        if module.padding_idx is None:
            size -= getattr(module, "offset", 0)  # BART counts positions from 2 up
            yield size - size % step
        else:  # RoBERTa and its kin count positions from the one after that of padding
            yield size - max(module.padding_idx + 1, getattr(module, "offset", 0))


def longest_unscaled(model: Any) -> float:
    """Return the length in tokens beyond which one text scales the positions of its whole batch."""
    return min(
        (
            int(bound)
            for module in model.modules()
            if "longrope" in str(getattr(module, "rope_type", ""))
            for bound in _UNSCALED.findall(str(module.config.to_dict()))
        ),
        default=inf,
    )
