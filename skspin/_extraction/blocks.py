"""Which modules of a stack are its blocks, in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from skspin._extraction.oddities import Oddity
from skspin._extraction.sites import linear_shape


def find_blocks(stack: nn.Module, n_layers: int, oddity: Oddity) -> list[nn.Module]:
    """List a stack's blocks; one that takes several turns is there several times.

    Parameters
    ----------
    stack : Module
        What the blocks are in, at any depth.
    n_layers : int
        Number of layers by the configuration. It only counts where blocks are shared: a model that
        was cut short in memory has fewer than its configuration says.
    oddity : Oddity
        What is special about the architecture.

    Raises
    ------
    ValueError
        If no list of modules, or more than one, may be the blocks; the message names them.
    """
    if oddity.parallel_lists:
        parts = [stack.get_submodule(name).children() for name in oddity.parallel_lists]
        return [nn.ModuleList(block) for block in zip(*parts, strict=True)]
    blocks = _heaviest_list(stack)
    if oddity.shared_groups:
        groups = [list(group.get_submodule(oddity.shared_groups).children()) for group in blocks]
        turns = [groups[turn * len(groups) // n_layers] for turn in range(n_layers)]
        return [block for group in turns for block in group]
    return blocks


def _heaviest_list(stack: nn.Module) -> list[nn.Module]:
    # Norms and scales by layer come in lists, too: only lists that hold linear modules count.
    candidates = {
        path: modules
        for path, modules in _outermost_lists(stack)
        if any(linear_shape(module) for module in modules.modules())
    }
    if not candidates:
        parts = ", ".join(
            f"{name} ({type(part).__name__})" for name, part in stack.named_children()
        )
        raise ValueError(
            f"{type(stack).__name__} has no torch.nn.ModuleList of blocks, so its layers can't be"
            f" told. It consists of: {parts or 'nothing'}."
        )
    heaviest = max(candidates.values(), key=_n_parameters)
    rivals = [
        f"{path} ({len(modules)} x {type(modules[0]).__name__})"
        for path, modules in candidates.items()
        if len(modules) == len(heaviest) or type(modules[0]) is type(heaviest[0])
    ]
    if len(rivals) > 1:
        raise ValueError(
            f"{type(stack).__name__} has several lists of modules that may be its blocks, so its"
            f" layers can't be told: {', '.join(rivals)}."
        )
    return list(heaviest)


def _outermost_lists(part: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in part.named_children():
        if isinstance(child, nn.ModuleList):
            yield f"{path}{name}", child
        elif linear_shape(child) is None:  # an adapter has lists inside a linear module
            yield from _outermost_lists(child, f"{path}{name}.")


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
