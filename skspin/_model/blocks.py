"""Which modules of a stack are its blocks, and where in a block its sites are.

Both are found from structure alone: from the names and shapes of modules, which need neither
weights nor a forward pass. The feed-forward neurons are the input of the last linear module of the
feed-forward part (the down-projection), and the heads' outputs are the input of the last linear
module of the attention (the output projection). A table says of a few architectures what their
structure does not tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """What the structure of a model does not tell."""

    # By site, the path inside a block of the module or parameter that its activations go into.
    paths: dict[str, str] = field(default_factory=dict)
    # Inside the stack, activations are of shape (n_tokens, n_texts, n_neurons).
    time_major: bool = False
    # If the stack's list holds groups of blocks, and each group runs several times in a row, all
    # equally often: the name of the list of blocks in a group.
    shared_groups: str | None = None
    # If parts of blocks are in separate lists: their names; the first parts take hidden states.
    parallel_lists: tuple[str, ...] = ()
    # The hidden states that the model returns begin after block 1, and end with one before and
    # one after the norm of this name.
    early_norm: str | None = None
    # Inside the stack, the model may add tokens at the end.
    rounds_up: bool = False
    # Padding changes the activations of real tokens, but a trial's texts are too short to show it.
    mixes_padding: bool = False
    # The number of positions that a pass needs beyond its tokens.
    n_ahead: int = 0


_PLAIN = Architecture()
# By a configuration's model_type, one line each.
_EXCEPTIONS = {
    "albert": Architecture(shared_groups="albert_layers"),
    # The length of a batch decides how its tokens attend to each other, if it is long enough.
    "big_bird": Architecture(rounds_up=True, mixes_padding=True),
    "bigbird_pegasus": Architecture(rounds_up=True, mixes_padding=True),
    "falcon_mamba": Architecture(early_norm="norm_f"),
    "flaubert": Architecture(parallel_lists=("attentions", "ffns")),
    "fsmt": Architecture(time_major=True),
    "led": Architecture(rounds_up=True),
    "longformer": Architecture(rounds_up=True),
    "mega": Architecture(time_major=True),
    "mamba": Architecture(early_norm="norm_f"),
    "mamba2": Architecture(early_norm="norm_f"),
    # A block has bottlenecks and small feed-forward parts around the main one.
    "mobilebert": Architecture(
        paths={"mlp": "output.dense", "attention": "attention.output.dense"}
    ),
    "pegasus_x": Architecture(rounds_up=True),
    # Several streams of tokens, the text itself first; the others are ahead of it.
    "prophetnet": Architecture(rounds_up=True, n_ahead=1),
    "rwkv": Architecture(early_norm="ln_out"),
    "xlm": Architecture(parallel_lists=("attentions", "ffns")),
    # The attention's output projection is a parameter, used in an einsum.
    "xlnet": Architecture(paths={"attention": "rel_attn.o"}, time_major=True),
    # A block has small feed-forward parts, one for each language, behind the main one.
    "xmod": Architecture(paths={"mlp": "output.dense"}),
}


def architecture_of(config: Any) -> Architecture:
    """Look up what is special about a configuration's architecture; most often nothing is."""
    return _EXCEPTIONS.get(config.model_type, _PLAIN)


@dataclass(frozen=True)
class Tap:
    """Where token-level activations can be read: what goes into a module, or comes out of it."""

    module: nn.Module = field(repr=False)
    width: int  # neurons
    parameter: str | None = None  # read what the module multiplies with this parameter of it
    output: bool = False  # read what the module returns, not what it is given
    time_major: bool = False  # they come by token and text
    rounds_up: bool = False  # more tokens than the text has may come
    turn: int = 0  # which of the module's calls in a pass: blocks may share a module
    n_turns: int = 1  # how many calls there are in a pass


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
_EXPERTS = re.compile(r"(^|[._])experts?($|[._])|(^|\.)router($|\.)")


def find_blocks(stack: nn.Module, config: Any, architecture: Architecture) -> list[nn.Module]:
    """List a stack's blocks in the order of the forward pass; one that runs twice is there twice.

    A ValueError names the candidates if no list of modules, or more than one, may be the blocks.
    """
    if architecture.parallel_lists:
        parts = [stack.get_submodule(name).children() for name in architecture.parallel_lists]
        return [nn.ModuleList(block) for block in zip(*parts, strict=True)]
    blocks = _heaviest_list(stack)
    if architecture.shared_groups:
        name = architecture.shared_groups
        groups = [list(group.get_submodule(name).children()) for group in blocks]
        # Used only here: a model that was cut in memory has fewer blocks than its config says.
        n_turns = config.num_hidden_layers
        turns = [groups[turn * len(groups) // n_turns] for turn in range(n_turns)]
        return [block for group in turns for block in group]
    return blocks


def _heaviest_list(stack: nn.Module) -> list[nn.Module]:
    candidates = dict(_lists_of(stack, nn.ModuleList)) or dict(_lists_of(stack, nn.Sequential))
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


def _lists_of(
    part: nn.Module, kind: type[nn.Module], path: str = ""
) -> Iterator[tuple[str, list[nn.Module]]]:
    """Find the outermost lists of a kind that hold linear modules, as lists of norms do not."""
    for name, child in part.named_children():
        if isinstance(child, kind):
            if any(linear_shape(module) for module in child.modules()):
                modules: Any = child
                yield f"{path}{name}", list(modules)  # not children(), which skip repeated blocks
        elif linear_shape(child) is None:  # an adapter has lists inside a linear module
            yield from _lists_of(child, kind, f"{path}{name}.")


def _inventory(stack: nn.Module) -> str:
    """Name the modules of a stack and count the modules in each, for an error message."""
    parts = []
    for name, part in stack.named_children():
        inside = Counter(type(child).__name__ for child in part.children())
        contents = ", ".join(f"{n} x {kind}" for kind, n in inside.items())
        parts.append(f"{name} ({type(part).__name__}{' of ' + contents if contents else ''})")
    return "; ".join(parts) or "nothing"


def _n_parameters(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def find_sites(block: nn.Module, width: int, paths: dict[str, str]) -> dict[str, Tap | str]:
    """Find the tap of "attention" and "mlp", or say why a block does not have the site.

    ``width`` is that of the hidden state; ``paths`` holds the sites whose modules are known.
    """
    finders = {"attention": _output_projection, "mlp": _down_projection}
    return {
        site: _at(block, paths[site]) if site in paths else find(block, width)
        for site, find in finders.items()
    }


def _output_projection(block: nn.Module, width: int) -> Tap | str:
    inside = [linear for linear in _linears(block, None, block) if linear.role == "attention"]
    if not inside:
        return "it has no attention."
    # In a decoder's block, self-attention comes before the attention to the encoder.
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
    return Tap(outward[-1].module, outward[-1].n_in)


def _down_projection(block: nn.Module, width: int) -> Tap | str:
    if _has_experts(block):
        return "each token has neurons of its own there (a mixture of experts)."
    linears = list(_linears(block, None, block))
    # BERT's feed-forward part is not one module, but the rest of the block.
    inside = [linear for linear in linears if linear.role == "mlp"] or [
        linear for linear in linears if linear.role is None
    ]
    # Shapes may be equal, but in models that number their modules, w1 and w3 are up-projections.
    outward = [
        linear for linear in inside if linear.n_out == width and linear.name not in ("w1", "w3")
    ]
    if len(inside) < 2 or not outward:
        return "it has no feed-forward part."
    return Tap(outward[-1].module, outward[-1].n_in)


def _has_experts(part: nn.Module) -> bool:
    return any(_EXPERTS.search(path) for path, _ in part.named_modules())


@dataclass(frozen=True)
class _Linear:
    """A linear module of a block, and the part of the block that it works for."""

    module: nn.Module
    name: str
    n_in: int
    n_out: int
    role: str | None
    part: nn.Module


def _linears(part: nn.Module, role: str | None, owner: nn.Module) -> Iterator[_Linear]:
    """List a part's linear modules as registered; ``owner`` is the module that sets their role."""
    for name, module in part.named_children():
        child = _in_use(module)
        shape = linear_shape(child)
        if shape is not None:
            yield _Linear(child, name, *shape, role, owner)
        elif not is_norm(child):
            found = _role_of(name, child)
            if found in (None, role):
                yield from _linears(child, role, owner)
            else:
                yield from _linears(child, found, child)


def _in_use(module: Any) -> Any:
    """Choose the copy of a module that runs, if PEFT trains copies of it."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = [] if module.disable_adapters else module.active_adapters
    return next((copies[name] for name in active if name in copies), module.original_module)


def _role_of(name: str, part: nn.Module) -> str | None:
    for word in (type(part).__name__, name):
        for role, pattern in _ROLES.items():
            if pattern.search(word):
                return role
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm."""
    return _NORM.search(type(module).__name__) is not None


def linear_shape(module: Any) -> tuple[int, int] | None:
    """Return (n_in, n_out) of a linear module, also a quantised or adapted one; None of others."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's transposed linear, defined in several places
        n_in, n_out = module.weight.shape
        return n_in, n_out
    return None


def _at(block: nn.Module, path: str) -> Tap:
    parent, _, name = path.rpartition(".")
    owner = block.get_submodule(parent)
    target: Any = getattr(owner, name)
    if isinstance(target, nn.Parameter):  # (hidden state, heads, neurons of a head)
        return Tap(owner, target[0].numel(), name)
    return Tap(target, target.in_features)
