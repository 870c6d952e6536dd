"""A model cut down to what some columns need, as a module of its own.

No exception ends its pass: stand-ins without weights replace the blocks after the deepest layer,
and the linear modules and norms that no column depends on. So the copy can be traced, compiled and
exported, and only what is needed is copied.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skspin._layout import Layout, Segment
from skspin._model.anatomy import Stack, n_token_ids
from skspin._model.blocks import Tap, is_norm, linear_shape
from skspin._model.forward import (
    arguments_of,
    as_texts,
    positions_by_tap,
    read,
    shift_right,
    watch,
)
from skspin._model.pooling import FUNCTIONS
from skspin._model.registry import Backbone

# Relative differences that are more than rounding, in float32 and in shorter formats.
_TOLERANCE = (1e-4, 5e-2)
_IN_BLOCK = ("attention", "mlp", "hidden")  # in the order in which a block computes them
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids")


def cut_model(backbone: Backbone, layout: Layout, max_length: int) -> CutModel:
    """Copy what a layout needs of a model; a ValueError says why this model can't be cut."""
    taps = positions_by_tap(backbone.anatomy, layout.segments)
    reason = _why_not(backbone, layout, taps, min(backbone.n_positions, max_length))
    if reason is None:
        depths = _depths(backbone, layout)
        sample = _sample(backbone)
        stacks = [backbone.anatomy.stacks[name] for name in depths]
        expected, n_outputs = _run_whole(backbone, layout, stacks, sample)
        try:
            cut = _cut(backbone, layout, taps, depths, n_outputs, sample)
            found = cut(**sample)
        except Exception as error:  # A model's own code may do anything with its blocks.
            reason = f"without its last blocks it does not run ({error})."
        else:
            tolerance = _TOLERANCE[backbone.dtype != "float32"]
            if (found - expected).abs().max() <= tolerance * expected.abs().max():
                return cut
            reason = "without its last blocks it gives other numbers."
    name = type(backbone.model).__name__
    raise ValueError(f"{name} can't be cut out of its pipeline: {reason}")


class CutModel(nn.Module):
    """Token ids in, pooled activations (n_texts, n_columns) out, float32.

    Inputs are of shape (n_texts, n_tokens), or (n_texts, n_windows, n_tokens) for texts in windows,
    padded on the right; a window may be all padding. ``pooled`` is not zero for the tokens that are
    pooled; if it is None, all real tokens are. ``taps`` are the model's, each with the positions of
    its segments.
    """

    def __init__(self, model: Any, layout: Layout, taps: dict[Tap, list[int]]):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._segments = layout.segments
        for position, segment in enumerate(layout.segments):
            if segment.neurons is not None:
                neurons = torch.tensor(segment.neurons, device=model.device)
                self.register_buffer(f"neurons_{position}", neurons)
        given = dict.fromkeys(_BY_TOKEN, torch.zeros(1, 1, dtype=torch.long))
        arguments = arguments_of(model, given)
        self.inputs = tuple(name for name in _BY_TOKEN if name in arguments)
        self._switches = {k: v for k, v in arguments.items() if not isinstance(v, Tensor)}
        self._has_decoder = "decoder_input_ids" in arguments
        # What is read in a pass, by thread: threads may share the module.
        self._passes: dict[int, tuple[Tensor, Tensor, list[Any]]] = {}
        self.handles = [watch(tap, partial(self._read, tap, taps[tap])) for tap in taps]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Compute the columns."""
        given = zip(_BY_TOKEN, (input_ids, attention_mask, token_type_ids), strict=True)
        # For the model, each window is a text.
        rows: dict[str, Any] = {
            name: values.flatten(0, -2)
            for name, values in given
            if name in self.inputs and values is not None
        }
        if self._has_decoder:
            rows["decoder_input_ids"] = shift_right(rows["input_ids"], self.model.config)
        real = attention_mask.flatten(0, -2).bool()  # (n_rows, n_tokens)
        pooled = (attention_mask if pooled is None else pooled).flatten(1).bool()
        values: list[Any] = [None] * len(self._segments)
        thread = _thread()
        self._passes[thread] = real, pooled, values
        try:
            self.model(**rows, **self._switches)
        finally:
            del self._passes[thread]
        return torch.cat(values, dim=1)

    def _read(self, tap: Tap, positions: list[int], activations: Tensor) -> None:
        real, pooled, values = self._passes[_thread()]
        activations = as_texts(activations, real, tap)
        # The windows of a text become one row of tokens, so pooling merges them.
        activations = activations.reshape(pooled.shape[0], -1, tap.width)
        for position in positions:
            segment = self._segments[position]
            row = FUNCTIONS[segment.pooling](activations, pooled)
            if segment.neurons is not None:
                row = row[:, getattr(self, f"neurons_{position}")]
            values[position] = row


def _thread() -> int:
    # A tracer runs the pass once, in one thread, and can't trace a thread's identifier.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _why_not(
    backbone: Backbone, layout: Layout, taps: dict[Tap, list[int]], max_length: int
) -> str | None:
    stacks = [backbone.anatomy.stacks[segment.stack] for segment in layout.segments]
    if (bound := backbone.anatomy.mixes_beyond) == 0:
        return "padding changes what it makes of a text, so it takes no batches."
    if bound < max_length:
        return (
            f"a text of more than {bound} tokens changes the others of its batch, and "
            f"max_length={max_length}. Fit with max_length={bound} or less."
        )
    if any(tap.n_turns > 1 for tap in taps):
        return "it runs through the same blocks several times."
    if any(stack.architecture.parallel_lists for stack in stacks):
        return "its blocks are no modules of their own."
    if any(tap.parameter for tap in taps):
        return "its attention heads are read at a parameter; choose another site."
    if len(set((getattr(backbone.model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices. Leave out device_map."
    if any(not weight.is_floating_point() for weight in backbone.model.parameters()):
        return "its weights are quantised. Fit with the weights as they were before."
    return None


def _depths(backbone: Backbone, layout: Layout) -> dict[str | None, tuple[int, bool]]:
    """Count the blocks that run in each stack, and tell whether the last runs to its end."""
    stacks = backbone.anatomy.stacks
    deepest: dict[str | None, tuple[int, int]] = {}  # a layer, and a site's place in it
    for segment in layout.segments:
        # Some models have no hidden state for the embeddings alone.
        layer = segment.layer + bool(stacks[segment.stack].architecture.early_norm)
        reached = layer, _IN_BLOCK.index(segment.site)
        deepest[segment.stack] = max(reached, deepest.get(segment.stack, reached))
    if "decoder" in deepest:
        if deepest["decoder"] > (1, 0):  # behind its first attention, it attends to the encoder's
            deepest["encoder"] = len(stacks["encoder"].blocks), 2  # last hidden state
        deepest.setdefault("encoder", (0, 2))
    return {name: (layer, place == 2) for name, (layer, place) in deepest.items()}


def _sample(backbone: Backbone) -> dict[str, Tensor]:
    """Make a batch of two texts, one of them padded, of tokens that are not special."""
    n_words = n_token_ids(backbone.anatomy.model)
    ids = n_words // 2 + torch.arange(10).reshape(2, 5) % (n_words // 2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return {name: values.to(backbone.device) for name, values in inputs.items()}


def _run_whole(
    backbone: Backbone, layout: Layout, stacks: list[Stack], sample: dict[str, Tensor]
) -> tuple[Tensor, dict[nn.Module, int]]:
    """Compute the columns as the whole model does; say what the first blocks return."""
    n_outputs: dict[nn.Module, int] = {}

    def count(block: nn.Module, args: tuple, output: Any) -> None:
        n_outputs[block] = 0 if isinstance(output, Tensor) else len(output)

    # The first blocks run to their ends before layer 1 is read.
    ends = [Segment(s.name, 1, "hidden", "mean", s.tap(1, "hidden").width) for s in stacks]
    with ExitStack() as hooks:
        for stack in stacks:
            hooks.callback(stack.blocks[0].register_forward_hook(count).remove)
        segments = [*layout.segments, *ends]
        values = read(backbone.anatomy, sample, segments)
    return values[:, : layout.n_columns], n_outputs


def _cut(
    backbone: Backbone,
    layout: Layout,
    taps: dict[Tap, list[int]],
    depths: dict[str | None, tuple[int, bool]],
    n_outputs: dict[nn.Module, int],
    sample: dict[str, Tensor],
) -> CutModel:
    model = backbone.anatomy.model
    if set(depths) == {"encoder"}:
        model = model.get_encoder()
    memo: dict[int, Any] = {}
    # A few tokens do not reach all experts of a mixture, so blocks in full use are kept whole.
    whole: set[nn.Module] = set()
    for name, (depth, to_end) in depths.items():
        blocks = backbone.anatomy.stacks[name].blocks
        memo |= {id(block): _StandIn(block, n_outputs[blocks[0]]) for block in blocks[depth:]}
        whole.update(blocks[: depth if to_end else depth - 1])
    model, taps, whole = deepcopy((model, taps, whole), memo)
    tried = CutModel(model, layout, taps)
    used = _used_weights(tried, sample)
    for handle in tried.handles:
        handle.remove()
    stand_ins = _put_stand_ins(model, used, whole)
    in_place = {replace(t, module=stand_ins.get(t.module, t.module)): taps[t] for t in taps}
    return CutModel(model, layout, in_place)


def _used_weights(cut: CutModel, sample: dict[str, Tensor]) -> set[int]:
    """Tell, by their ids, on which weights any column depends."""
    weights = list(cut.parameters())
    cut.requires_grad_(True)
    with torch.enable_grad():
        total = cut(**sample).sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    cut.requires_grad_(False)
    return {id(w) for w, gradient in zip(weights, gradients, strict=True) if gradient is not None}


def _put_stand_ins(
    part: nn.Module, used: set[int], whole: set[nn.Module]
) -> dict[nn.Module, nn.Module]:
    """Replace modules on whose weights no column depends; return what replaces which."""
    replaced: dict[nn.Module, nn.Module] = {}
    for name, child in part.named_children():
        weights = list(child.parameters())
        is_used = any(id(weight) in used for weight in weights)
        if weights and not is_used and (shape := linear_shape(child)):
            replaced[child] = _Nothing(shape[1])
            setattr(part, name, replaced[child])
        elif weights and not is_used and is_norm(child):
            replaced[child] = _StandIn(child)
            setattr(part, name, replaced[child])
        elif child not in whole:
            replaced |= _put_stand_ins(child, used, whole)
    return replaced


class _StandIn(nn.Module):
    """Replaces a block or a norm, and returns the hidden state that it is given."""

    def __init__(self, module: nn.Module, n_outputs: int = 0):
        super().__init__()
        for name, value in vars(module).items():
            # Models ask their blocks for settings, such as the kind of attention.
            if isinstance(value, str | int) and not hasattr(self, name):
                setattr(self, name, value)
        self.n_outputs = n_outputs  # of a tuple; 0 for a tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden state; the next blocks are stand-ins, too, and need nothing else."""
        if not self.n_outputs:
            return hidden_states
        return (hidden_states, *[None] * (self.n_outputs - 1))


class _Nothing(nn.Module):
    """Replaces a linear module, and returns zeros, on which no column depends."""

    weight = bias = None  # some models look here for the number format

    def __init__(self, n_out: int):
        super().__init__()
        self.n_out = n_out

    def forward(self, activations: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros in the shape of the linear module's output."""
        return activations.new_zeros(*activations.shape[:-1], self.n_out)
