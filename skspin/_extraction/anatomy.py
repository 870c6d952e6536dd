"""Where a model's blocks, feed-forward neurons and attention outputs are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

SITES = ("hidden", "mlp", "attention")


@dataclass(frozen=True)
class Tap:
    """One place in a model where token-level activations can be read.

    Parameters
    ----------
    module : Module
        Whose input or output is read.
    call : int
        Which call of the module within one forward pass, for modules that several blocks share.
    output : bool
        Read what the module returns, not what it is given.
    width : int
        Number of neurons.
    """

    module: nn.Module
    call: int
    output: bool
    width: int


@dataclass(frozen=True)
class Stack:
    """One half of an encoder-decoder model, or the whole of any other.

    Parameters
    ----------
    name : {"encoder", "decoder"} or None
        Which half; None for a model that is one stack.
    blocks : tuple of Module
        The blocks in the order of the forward pass; a shared block appears at each of its turns.
    taps : dict of (layer, site) to Tap
        Where to read what.
    """

    name: str | None
    blocks: tuple[nn.Module, ...]
    taps: dict[tuple[int, str], Tap]

    def tap(self, layer: int, site: str) -> Tap:
        """Find where ``site`` of ``layer`` is read; a ValueError says why it is not there."""
        if (layer, site) in self.taps:
            return self.taps[layer, site]
        if site not in SITES:
            raise ValueError(f"site={site!r} is not known. Choose from {list(SITES)}.")
        if not 0 <= layer <= len(self.blocks):
            raise ValueError(
                f"layer {layer} is not there: the model has layers 0 to {len(self.blocks)}."
            )
        if layer == 0:
            raise ValueError(f"site={site!r} begins at layer 1; layer 0 (embeddings) has 'hidden'.")
        raise ValueError(
            f"site={site!r} was not found in block {layer} ({type(self.blocks[layer - 1]).__name__})."
            " Use site='hidden'."
        )

    def width(self, layer: int, site: str) -> int:
        """Count the neurons of ``site`` in ``layer``."""
        return self.tap(layer, site).width


@dataclass(frozen=True)
class Anatomy:
    """The stacks of a model, by name."""

    stacks: dict[str | None, Stack]

    @property
    def n_layers(self) -> int:
        """Number of blocks; of the deeper stack where there are two."""
        return max(len(stack.blocks) for stack in self.stacks.values())


def find_anatomy(model: Any) -> Anatomy:
    """Find the blocks of a model, and where their activations can be read.

    Parameters
    ----------
    model : PreTrainedModel
        With weights or on the meta device.
    """
    base = model.base_model
    if base.config.is_encoder_decoder:
        halves = {"encoder": base.get_encoder(), "decoder": base.get_decoder()}
        return Anatomy({name: _find_stack(name, half) for name, half in halves.items()})
    return Anatomy({None: _find_stack(None, base)})


def _find_stack(name: str | None, module: nn.Module) -> Stack:
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ValueError(f"No blocks were found in {type(module).__name__}.")
    blocks = tuple(max(lists, key=len))
    width = module.config.hidden_size  # type: ignore[union-attr]
    taps = {(i, "hidden"): Tap(block, 0, False, width) for i, block in enumerate(blocks)}
    taps[len(blocks), "hidden"] = Tap(module, 0, True, width)
    for i, block in enumerate(blocks, start=1):
        linears = list(_linears(block))
        outward = [(linear, shape[0]) for linear, shape in linears if shape[1] == width]
        down, n_neurons = outward[-1]
        taps[i, "mlp"] = Tap(down, 0, False, n_neurons)
        own = _self_attention(block)
        inside = {id(child) for child in own.modules()} if own is not None else set()
        attention = [(m, n) for m, n in outward if id(m) in inside]
        if attention:
            taps[i, "attention"] = Tap(attention[-1][0], 0, False, attention[-1][1])
    return Stack(name, blocks, taps)


def _self_attention(block: nn.Module) -> nn.Module | None:
    return next((m for m in block.modules() if "Attention" in type(m).__name__), None)


def _linears(block: nn.Module) -> Iterator[tuple[nn.Module, tuple[int, int]]]:
    for child in block.modules():
        if isinstance(child, nn.Linear):
            yield child, (child.in_features, child.out_features)
        elif type(child).__name__ == "Conv1D":
            yield child, tuple(child.weight.shape)  # type: ignore[misc]
