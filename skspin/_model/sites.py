"""Inside one block: where its feed-forward neurons and its heads' outputs go in.

Both sites are inputs of linear modules: the feed-forward part's last one (the down-projection) and
the attention's last one (the output projection). They are told apart by what the parts of a block
are called and by their shapes, which are there without weights and without a forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """A module that activations go into, or a parameter of it; and how many neurons there are."""

    module: nn.Module
    width: int
    parameter: str | None = None


@dataclass(frozen=True)
class _Linear:
    """A linear module of a block, and the part of the block that it works for."""

    module: nn.Module
    name: str
    n_in: int
    n_out: int
    role: str | None
    part: nn.Module


# What a part of a block does, by the words in its class or its name. The first that fits counts:
# "NemotronHMLP" may be called "mixer", and "LinearAttentionMixer" is an attention.
_ROLES = {
    "mlp": re.compile(r"mlp|feed_?forward|ffn|^ff", re.I),
    "attention": re.compile(r"attention|attn|mha|multi_?head", re.I),
    "mixer": re.compile(r"mixer|mamba|ssm|recurrent|lru|delta|short_?conv|lstm|indexer", re.I),
}
# Linear modules beside an attention's output projection that may have its shape.
_GATE = re.compile(r"gate|^g_proj$")
# A norm may have a small network of its own, which is not the block's.
_NORM = re.compile(r"norm$", re.I)
_EXPERTS = re.compile(r"(^|[._])(experts?|router)($|[._])")


def find_entries(block: nn.Module, width: int, paths: dict[str, str]) -> dict[str, Entry | str]:
    """Find where each site's activations go in, or say why the block does not have the site.

    Parameters
    ----------
    block : Module
        One block of a stack.
    width : int
        Number of neurons of the hidden state that the block adds to.
    paths : dict of str to str
        Paths inside the block, by site, that need no finding.

    Returns
    -------
    dict of str to Entry or str
        For "attention" and "mlp": the entry, or a sentence.
    """
    finders = {"attention": _output_projection, "mlp": _down_projection}
    return {
        site: _at(block, paths[site]) if site in paths else find(block, width)
        for site, find in finders.items()
    }


def _output_projection(block: nn.Module, width: int) -> Entry | str:
    inside = [linear for linear in _linears(block, None, block) if linear.role == "attention"]
    if not inside:
        return "it has no attention."
    # A decoder's block goes on to attend to the encoder: its self-attention comes first.
    part = inside[0].part
    if _has_experts(part):
        return "each token has attention heads of its own there (a mixture of experts)."
    outward = [
        linear
        for linear in inside
        if linear.part is part and linear.n_out == width and not _GATE.search(linear.name)
    ]
    if not outward:
        return "its attention has no linear output projection."
    return Entry(outward[-1].module, outward[-1].n_in)


def _down_projection(block: nn.Module, width: int) -> Entry | str:
    if _has_experts(block):
        return "each token has neurons of its own there (a mixture of experts)."
    linears = list(_linears(block, None, block))
    named = [linear for linear in linears if linear.role == "mlp"]
    # BERT's feed-forward part is not one module, but what is left of a block.
    inside = named or [linear for linear in linears if linear.role is None]
    # Where all shapes are equal: w1 and w3 lead up in the models that number them.
    outward = [
        linear for linear in inside if linear.n_out == width and linear.name not in ("w1", "w3")
    ]
    if len(inside) < 2 or not outward:
        return "it has no feed-forward part."
    return Entry(outward[-1].module, outward[-1].n_in)


def _has_experts(part: nn.Module) -> bool:
    return any(_EXPERTS.search(path) for path, _ in part.named_modules())


def _linears(part: nn.Module, role: str | None, owner: nn.Module) -> Iterator[_Linear]:
    """Walk through a part in the order of registration; ``owner`` is what gave it its role."""
    for name, child in part.named_children():
        shape = linear_shape(child)
        found = None if shape else _role_of(name, child)
        if shape is not None:
            yield _Linear(child, name, *shape, role, owner)
        elif _NORM.search(type(child).__name__):
            continue
        elif found is None or found == role:
            yield from _linears(child, role, owner)
        else:
            yield from _linears(child, found, child)


def _role_of(name: str, part: nn.Module) -> str | None:
    for word in (type(part).__name__, name):
        for role, pattern in _ROLES.items():
            if pattern.search(word):
                return role
    return None


def linear_shape(module: Any) -> tuple[int, int] | None:
    """Count what goes into and out of a linear module; None for any other.

    Quantised and adapted linear modules keep PyTorch's two attributes, whatever their class is.
    """
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's transposed one, in several modules of its name
        n_in, n_out = module.weight.shape
        return n_in, n_out
    return None


def _at(block: nn.Module, path: str) -> Entry:
    parent, _, name = path.rpartition(".")
    owner = block.get_submodule(parent)
    target = getattr(owner, name)
    if isinstance(target, nn.Parameter):  # (hidden state, heads, neurons of a head)
        return Entry(owner, target[0].numel(), name)
    shape = linear_shape(target)
    if shape is None:
        raise TypeError(f"{type(target).__name__} at {path} is not a linear module.")
    return Entry(target, shape[0])
