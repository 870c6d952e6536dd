"""What is where in a model: its stacks, their blocks and sites, and how many positions it has.

Nothing is run to find this out, so it works on a model without weights (torch's meta device), too.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf
from typing import Any

from torch import nn

from skspin._layout import SITES, STACKS
from skspin._model.blocks import Architecture, Tap, architecture_of, find_blocks, find_sites

# Names that configurations have for the number of positions; {} stands for the stack.
_N_POSITIONS = ("max_position_embeddings", "max_{}_position_embeddings", "max_seq_len")
# A table of positions, such as "wpe", "embed_positions" or "position_embeddings".
_TABLE = re.compile(r"(^|[._])(wpe|pos|positions?|positional)(_(emb\w*|encod\w*))?$")
# Names of a linear module behind the last block and its norm.
_LAST_PROJECTIONS = ("project_out", "embedding_projection")
_UNSCALED = re.compile(r"'original_max_position_embeddings': (\d+)")


@dataclass(frozen=True)
class Stack:
    """One half of an encoder-decoder model, or the whole of any other."""

    name: str | None  # one of STACKS; None for a model that is one stack
    blocks: tuple[nn.Module, ...] = field(repr=False)  # one that runs n times is there n times
    taps: dict[tuple[int, str], Tap] = field(repr=False)  # by layer and site
    missing: dict[tuple[int, str], str] = field(repr=False)  # why a layer does not have a site
    architecture: Architecture = field(repr=False)

    def tap(self, layer: int, site: str) -> Tap:
        """Return where ``site`` of ``layer`` is read; a ValueError says why there is none."""
        if (layer, site) in self.taps:
            return self.taps[layer, site]
        name = type(self.blocks[layer - 1]).__name__ if layer else "the embeddings"
        raise ValueError(
            f"layer {layer} ({name}) has no site={site!r}: {self.missing[layer, site]}"
            " Choose another site, or other layers."
        )


@dataclass(frozen=True)
class Anatomy:
    """What is where in a model."""

    model: Any = field(repr=False)  # without what activations of text do not need; see `bare_model`
    stacks: dict[str | None, Stack]  # by name
    # In a batch of more tokens per text than this, texts change each other's activations, whatever
    # the attention mask says; 0 if padding does so in any batch.
    mixes_beyond: float = inf
    # Whether a token's activations do not depend on the tokens after it.
    is_causal: bool = False


def find_anatomy(model: Any) -> Anatomy:
    """Find a model's blocks and sites; it may have a head or an adapter, and no weights.

    A ValueError lists the candidates if it is not clear which modules are the blocks.
    """
    model = bare_model(model)
    stacks = {name: _dissect(name, half, model.config) for name, half in _halves_of(model).items()}
    mixes_padding = any(stack.architecture.mixes_padding for stack in stacks.values())
    return Anatomy(model, stacks, 0 if mixes_padding else inf)


def bare_model(model: Any) -> Any:
    """Remove what activations of text do not need: PEFT's wrapper, the head, vision or audio.

    Adapters stay in effect, because they live inside the model's linear modules.
    """
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"This PEFT model learns a prompt ({model.peft_type.value}), whose virtual tokens"
                " only exist in its own forward pass. Pass a model with another kind of adapter,"
                " such as LoRA, or without one."
            )
        model = model.get_base_model()
    model = model.base_model
    has_text_part = model.config.get_text_config() is not model.config
    return model.get_decoder() if has_text_part and not is_encoder_decoder(model) else model


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model has both halves, which T5EncoderModel's configuration claims wrongly."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def _halves_of(model: Any) -> dict[str | None, Any]:
    """Return a bare model's encoder and decoder by name; any other model is named None."""
    encoder, decoder = STACKS
    halves: dict[str | None, Any] = {None: model}
    if is_encoder_decoder(model):
        halves = {encoder: model.get_encoder(), decoder: model.get_decoder()}
    elif model.config.is_encoder_decoder:
        halves = {encoder: model.get_encoder()}
    return {name: getattr(half, "base_model", half) for name, half in halves.items()}


def _dissect(name: str | None, stack: nn.Module, model_config: Any) -> Stack:
    config: Any = getattr(stack, "config", model_config)
    architecture = architecture_of(config)
    # In transformers 4, the half of FSMT that get_text_config returns does not know its width.
    width = getattr(config.get_text_config(), "hidden_size", None) or config.hidden_size
    blocks = find_blocks(stack, config, architecture)
    taps = {
        (layer, "hidden"): Tap(module, width)
        for layer, module in enumerate(_takers(stack, blocks, architecture))
    }
    # The embeddings have hidden states only.
    missing = {(0, site): f"it is in layers from 1 to {len(blocks)}." for site in SITES[1:]}
    for layer, block in enumerate(blocks, start=1):
        for site, found in find_sites(block, width, architecture.paths).items():
            if isinstance(found, str):
                missing[layer, site] = found
            else:
                taps[layer, site] = found
    # One hook reads a module that several blocks share, and tells its turns apart.
    n_turns, turns = Counter(taps.values()), defaultdict[Tap, Iterator[int]](count)
    for place, tap in taps.items():
        taps[place] = replace(
            tap,
            time_major=architecture.time_major,
            rounds_up=architecture.rounds_up,
            turn=next(turns[tap]),
            n_turns=n_turns[tap],
        )
    # One more projection may change the last hidden state's width, as in OPT-350m.
    ends = [m for path, m in stack.named_modules() if path.endswith(_LAST_PROJECTIONS)]
    last_width: Any = ends[-1].out_features if ends else width
    taps[len(blocks), "hidden"] = Tap(stack, last_width, output=True)
    return Stack(name, tuple(blocks), taps, missing, architecture)


def _takers(
    stack: nn.Module, blocks: list[nn.Module], architecture: Architecture
) -> list[nn.Module]:
    """List the modules whose inputs are hidden states 0, 1, ..., except for the last of these."""
    # A hidden state is the input of the next block, not the output of its own: between the two,
    # DeBERTa adds a convolution. The last one is the output of the stack.
    if architecture.parallel_lists:
        return [next(iter(block.children())) for block in blocks]
    if architecture.early_norm:
        return [*blocks[1:], stack.get_submodule(architecture.early_norm)]
    return blocks


def n_token_ids(model: Any) -> int:
    """Count the token ids that a model has embeddings for."""
    n_known = model.config.get_text_config().vocab_size
    with suppress(NotImplementedError):  # so says a decoder taken out of its model
        return getattr(model.get_input_embeddings(), "num_embeddings", n_known)
    return n_known


# Positions


def most_tokens(model: Any, max_length: int) -> int:
    """Lower ``max_length`` to the number of positions that a model has in each of its stacks.

    The configuration's number is not always a technical bound: with relative positions, it is the
    length up to which the model was trained.
    """
    model = bare_model(model)
    bounds: list[Any] = [max_length]
    for name, half in _halves_of(model).items():
        config = getattr(half, "config", model.config).get_text_config()
        bounds += [getattr(config, key.format(name), None) for key in _N_POSITIONS]
        bounds += _table_sizes(half, config)
    # XLNet says -1, which means no bound.
    return min(bound for bound in bounds if isinstance(bound, int) and bound > 0)


def _table_sizes(stack: Any, config: Any) -> Iterator[int]:
    """Count the tokens that each table of positions has room for."""
    architecture = architecture_of(config)
    step: Any = 1  # to a multiple of which a pass rounds its tokens up
    if architecture.rounds_up:
        step = getattr(config, "block_size", getattr(config, "attention_window", 1))
        step = max(step) if isinstance(step, list) else step
    for path, module in stack.named_modules():
        table = getattr(module, "weight", None)  # sinusoidal positions without a bound have none
        if table is None or not hasattr(module, "padding_idx") or not _TABLE.search(path):
            continue
        size = getattr(module, "num_embeddings", len(table)) - architecture.n_ahead
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
