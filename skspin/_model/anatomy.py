"""Where a model's blocks are, and where their activations can be read.

Nothing is run to find this out, so it works on a model without weights (torch's meta device), too.
`skspin._model.blocks` finds the blocks, `skspin._model.sites` looks inside one, and
`skspin._model.architectures` lists the few architectures that their structure does not explain.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from skspin._model.architectures import ODDITIES, PLAIN, Oddity
from skspin._model.blocks import find_blocks
from skspin._model.sites import Entry, find_entries

SITES = ("hidden", "mlp", "attention")


@dataclass(frozen=True)
class Tap:
    """One place of a model where token-level activations can be read.

    Parameters
    ----------
    module : Module
        Whose input is read, or whose output.
    width : int
        Number of neurons.
    turn : int
        Which call of the module within one forward pass, from 0: blocks may share a module.
    n_turns : int
        How many calls of the module there are in a forward pass.
    output : bool
        Read what the module returns, not what it is given.
    parameter : str or None
        For a module that multiplies by a parameter of its own instead of calling a linear module:
        the parameter's name. What it is multiplied with is read.
    time_major : bool
        The activations are of shape (n_tokens, n_texts, ...), not (n_texts, n_tokens, ...).
    rounds_up : bool
        There may be more tokens than in the texts; those at the end are not theirs.
    """

    module: nn.Module = field(repr=False)
    width: int
    turn: int = 0
    n_turns: int = 1
    output: bool = False
    parameter: str | None = None
    time_major: bool = False
    rounds_up: bool = False


@dataclass(frozen=True)
class Stack:
    """One half of an encoder-decoder model, or the whole of any other.

    Parameters
    ----------
    name : {"encoder", "decoder"} or None
        Which half; None for a model that is one stack.
    blocks : tuple of Module
        In the order of the forward pass; a shared block appears once for each of its turns.
    taps : dict of (layer, site) to Tap
        Where to read what.
    missing : dict of (layer, site) to str
        What there is none of, and why.
    """

    name: str | None
    blocks: tuple[nn.Module, ...] = field(repr=False)
    taps: dict[tuple[int, str], Tap] = field(repr=False)
    missing: dict[tuple[int, str], str] = field(repr=False)

    def tap(self, layer: int, site: str) -> Tap:
        """Say where ``site`` of ``layer`` is read; a ValueError says why there is none."""
        if (layer, site) in self.taps:
            return self.taps[layer, site]
        n_layers = len(self.blocks)
        if site not in SITES:
            raise ValueError(f"site={site!r} is unknown. Choose from {', '.join(SITES)}.")
        if not 0 <= layer <= n_layers:
            raise ValueError(
                f"layer {layer} does not exist: this model has layers 0 to {n_layers}."
            )
        if layer == 0:
            raise ValueError(
                f"layer 0 (the embeddings) has no site={site!r}. Choose layers from 1 to"
                f" {n_layers}, or site='hidden'."
            )
        raise ValueError(
            f"layer {layer} ({type(self.blocks[layer - 1]).__name__}) has no site={site!r}:"
            f" {self.missing[layer, site]} Choose site='hidden', or other layers."
        )

    def width(self, layer: int, site: str) -> int:
        """Count the neurons at ``site`` of ``layer``; a ValueError says why there are none."""
        return self.tap(layer, site).width


@dataclass(frozen=True)
class Anatomy:
    """What is where in a model.

    Parameters
    ----------
    stacks : dict of str to Stack
        By name: "encoder" and "decoder", or None for a model of one stack.
    mixes_padding : bool
        Padding tokens change the activations of real ones, whatever the attention mask says.
    """

    stacks: dict[str | None, Stack]
    mixes_padding: bool = False

    @property
    def n_layers(self) -> int:
        """Number of blocks; of the deeper stack where there are two."""
        return max(len(stack.blocks) for stack in self.stacks.values())


def find_anatomy(model: Any) -> Anatomy:
    """Find the blocks of a model, and where their activations can be read.

    Parameters
    ----------
    model : PreTrainedModel
        With any head or none, wrapped by PEFT or not, with weights or on the meta device.

    Returns
    -------
    Anatomy

    Raises
    ------
    ValueError
        If it can't be told which modules are the blocks; the message lists what was looked at.
    """
    model = bare_model(model)
    stacks = {}
    mixes_padding = False
    for name, half in _halves(model).items():
        config = getattr(half, "config", model.config)
        oddity = ODDITIES.get(config.model_type, PLAIN)
        stacks[name] = _dissect(name, half, config, oddity)
        mixes_padding |= oddity.mixes_padding
    return Anatomy(stacks, mixes_padding)


def bare_model(model: Any) -> Any:
    """Take off what text's activations do not need: PEFT's wrapper, the head, other senses.

    Adapters stay in effect, because they live inside the model's own linear modules.
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
    """Tell whether a model has both halves; T5EncoderModel's configuration claims so, too."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def _halves(model: Any) -> dict[str | None, Any]:
    halves: dict[str | None, Any] = {None: model}
    if is_encoder_decoder(model):
        halves = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
    elif model.config.is_encoder_decoder:
        halves = {"encoder": model.get_encoder()}
    return {name: getattr(half, "base_model", half) for name, half in halves.items()}


def _dissect(name: str | None, stack: nn.Module, config: Any, oddity: Oddity) -> Stack:
    width = config.get_text_config().hidden_size
    blocks = find_blocks(stack, config, oddity)
    entries: dict[tuple[int, str], Entry] = {}
    missing: dict[tuple[int, str], str] = {}
    for layer, module in enumerate(_takers(stack, blocks, oddity)):
        entries[layer, "hidden"] = Entry(module, width)
    for layer, block in enumerate(blocks, start=1):
        for site, found in find_entries(block, width, oddity.paths).items():
            if isinstance(found, str):
                missing[layer, site] = found
            else:
                entries[layer, site] = found

    n_turns = Counter((entry.module, site) for (_, site), entry in entries.items())
    turns: Counter[tuple[nn.Module, str]] = Counter()
    taps = {}
    for (layer, site), entry in entries.items():
        turn = turns[entry.module, site]
        turns[entry.module, site] += 1
        taps[layer, site] = Tap(
            entry.module,
            entry.width,
            turn,
            n_turns[entry.module, site],
            parameter=entry.parameter,
            time_major=oddity.time_major,
            rounds_up=oddity.rounds_up,
        )
    # OPT-350m narrows the last hidden state by one more projection.
    for path, module in stack.named_modules():
        if path.endswith("project_out"):
            width = module.out_features
    taps[len(blocks), "hidden"] = Tap(stack, width, output=True)
    return Stack(name, tuple(blocks), taps, missing)


def _takers(stack: nn.Module, blocks: list[nn.Module], oddity: Oddity) -> list[nn.Module]:
    """List the modules that take hidden states 0, 1, ...: all but the last, which leaves the stack.

    A hidden state is what goes into the next block, not what comes out of its own: between the two,
    DeBERTa adds a convolution.
    """
    if oddity.parallel_lists:
        return [next(iter(block.children())) for block in blocks]
    if oddity.early_norm:
        return [*blocks[1:], stack.get_submodule(oddity.early_norm)]
    return blocks
