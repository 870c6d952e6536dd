"""Which modules of a stack are its blocks, in the order of the forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from skspin._model.architectures import Oddity
from skspin._model.sites import linear_shape


def find_blocks(stack: nn.Module, config: Any, oddity: Oddity) -> list[nn.Module]:
    """List a stack's blocks; one that takes several turns is there several times.

    Parameters
    ----------
    stack : Module
        What the blocks are in, at any depth.
    config : PreTrainedConfig
        Of the stack. Its number of layers only counts where blocks are shared: a model that was cut
        short in memory has fewer.
    oddity : Oddity
        What is special about the architecture.

    Raises
    ------
    ValueError
        If no list of modules, or more than one, may be the blocks; the message names candidates.
    """
    if oddity.parallel_lists:
        parts = [stack.get_submodule(name).children() for name in oddity.parallel_lists]
        return [nn.ModuleList(block) for block in zip(*parts, strict=True)]
    blocks = _heaviest_list(stack)
    if oddity.shared_groups:
        groups = [list(group.get_submodule(oddity.shared_groups).children()) for group in blocks]
        n_turns = config.num_hidden_layers
        turns = [groups[turn * len(groups) // n_turns] for turn in range(n_turns)]
        return [block for group in turns for block in group]
    return blocks


def _heaviest_list(stack: nn.Module) -> list[nn.Module]:
    candidates = _lists_of_blocks(stack, nn.ModuleList) or _lists_of_blocks(stack, nn.Sequential)
    if not candidates:
        raise ValueError(
            f"{type(stack).__name__} has no torch.nn.ModuleList or Sequential of blocks, so its"
            f" layers can't be told. It contains: {_inventory(stack)}."
        )
    heaviest = max(candidates.values(), key=_n_parameters)
    kind = type(heaviest[0])
    rivals = [
        f"{path} ({len(modules)} x {type(modules[0]).__name__})"
        for path, modules in candidates.items()
        if len(modules) == len(heaviest) or type(modules[0]) is kind
    ]
    if len(rivals) > 1:
        raise ValueError(
            f"{type(stack).__name__} has several lists of modules that may be its blocks, so its"
            f" layers can't be told: {', '.join(rivals)}."
        )
    return heaviest


def _lists_of_blocks(stack: nn.Module, kind: type[nn.Module]) -> dict[str, list[nn.Module]]:
    # Norms and scales by layer come in lists, too: only those that hold linear modules count.
    return {
        path: list(found)  # not children(), which passes over a block that comes again
        for path, found in _outermost(stack, kind)
        if any(linear_shape(module) for module in found.modules())
    }


def _outermost(part: nn.Module, kind: type[nn.Module], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in part.named_children():
        if isinstance(child, kind):
            yield f"{path}{name}", child
        elif linear_shape(child) is None:  # an adapter has lists inside a linear module
            yield from _outermost(child, kind, f"{path}{name}.")


def _inventory(stack: nn.Module) -> str:
    """Name the parts of a stack, and their parts, so that a reader can tell what is what."""
    parts = []
    for name, part in stack.named_children():
        inside = Counter(type(child).__name__ for child in part.children())
        contents = ", ".join(f"{n} x {kind}" for kind, n in inside.items())
        parts.append(f"{name} ({type(part).__name__}{' of ' + contents if contents else ''})")
    return "; ".join(parts) or "nothing"


def _n_parameters(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
