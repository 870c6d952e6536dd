"""A model cut down to what some columns need, as a module of its own.

No exception ends its pass: stand-ins without weights replace the blocks after the deepest layer,
and the linear modules and norms that no column depends on. So the copy can be traced, compiled and
exported, and only what is needed is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skspin._layout import Layout, Segment
from skspin._model.anatomy import bare_model
from skspin._model.architectures import Architecture
from skspin._model.blocks import Tap, is_norm, linear_shape
from skspin._model.forward import arguments_of, pooled_forward, shift_right
from skspin._model.hooks import as_texts, input_of
from skspin._model.pooling import FUNCTIONS
from skspin._model.registry import Backbone

# Relative differences that are more than rounding, in float32 and in shorter formats.
_TOLERANCE = (1e-4, 5e-2)
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids")


def cut_model(backbone: Backbone, layout: Layout) -> CutModel:
    """Copy what a layout needs of a model; a ValueError says why this model can't be cut."""
    readings = _find_readings(backbone, layout)
    if reason := _why_not(backbone, readings):
        _refuse(backbone, reason)
    model = bare_model(backbone.model)
    stacks = {segment.stack for segment in layout.segments}
    if stacks == {"encoder"}:
        model = model.get_encoder()
    copied, blocks = _copy_blocks_in_use(model, backbone, layout)
    paths = {module: path for path, module in model.named_modules()}
    sample = _sample(backbone)
    try:
        _leave_out_unused(CutModel(copied, _moved(readings, copied, paths)), blocks, sample)
        cut = CutModel(copied, _moved(readings, copied, paths))
        found = cut(**sample)
    except Exception as error:  # A model's own code may do anything with its blocks.
        _refuse(backbone, f"without its last blocks it does not run ({error}).")
    expected = pooled_forward(backbone.model, backbone.anatomy, sample, layout.segments)
    tolerance = _TOLERANCE[backbone.dtype != "float32"]
    if not (found - expected).abs().max() <= tolerance * expected.abs().max():
        _refuse(backbone, "without its last blocks it gives other numbers.")
    return cut


class CutModel(nn.Module):
    """Token ids in, pooled activations (n_texts, n_columns) out, float32.

    Inputs are of shape (n_texts, n_tokens), or (n_texts, n_windows, n_tokens) for texts in windows,
    padded on the right; a window may be all padding. ``pooled`` is not zero for the tokens that are
    pooled; if it is None, all real tokens are.
    """

    def __init__(self, model: Any, readings: list[_Reading]):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._readings = readings
        self._n_segments = sum(len(reading.segments) for reading in readings)
        for position, segment in (pair for reading in readings for pair in reading.segments):
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
        self._handles = [self._hang_up(reading) for reading in readings]

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
        values: list[Any] = [None] * self._n_segments
        thread = _thread()
        self._passes[thread] = real, pooled, values
        try:
            self.model(**rows, **self._switches)
        finally:
            del self._passes[thread]
        return torch.cat(values, dim=1)

    def remove_hooks(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _hang_up(self, reading: _Reading) -> Any:
        module = reading.tap.module
        if reading.tap.output:
            return module.register_forward_hook(partial(self._after, reading))
        return module.register_forward_pre_hook(partial(self._before, reading), with_kwargs=True)

    def _before(self, reading: _Reading, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._read(reading, input_of(module, args, kwargs))

    def _after(self, reading: _Reading, module: nn.Module, args: tuple, output: Any) -> None:
        self._read(reading, output if isinstance(output, Tensor) else output[0])

    def _read(self, reading: _Reading, activations: Tensor) -> None:
        real, pooled, values = self._passes[_thread()]
        activations = as_texts(activations, real, reading.tap, reading.architecture)
        # The windows of a text become one row of tokens, so pooling merges them.
        activations = activations.reshape(pooled.shape[0], -1, reading.tap.width)
        for position, segment in reading.segments:
            row = FUNCTIONS[segment.pooling](activations, pooled)
            if segment.neurons is not None:
                row = row[:, getattr(self, f"neurons_{position}")]
            values[position] = row


def _thread() -> int:
    # A tracer runs the pass once, in one thread, and can't trace a thread's identifier.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


@dataclass(frozen=True)
class _Reading:
    """What is read at one tap."""

    tap: Tap
    architecture: Architecture
    segments: tuple[tuple[int, Segment], ...]  # with their positions in the layout


def _find_readings(backbone: Backbone, layout: Layout) -> list[_Reading]:
    found: dict[Tap, tuple[Architecture, list[tuple[int, Segment]]]] = {}
    for position, segment in enumerate(layout.segments):
        stack = backbone.anatomy.stacks[segment.stack]
        tap = stack.tap(segment.layer, segment.site)
        found.setdefault(tap, (stack.architecture, []))[1].append((position, segment))
    return [_Reading(tap, kind, tuple(segments)) for tap, (kind, segments) in found.items()]


def _moved(readings: list[_Reading], copied: Any, paths: dict[nn.Module, str]) -> list[_Reading]:
    """Make readings of the same modules in a copy."""
    return [
        replace(reading, tap=replace(reading.tap, module=copied.get_submodule(path)))
        for reading in readings
        for path in [paths[reading.tap.module]]
    ]


def _why_not(backbone: Backbone, readings: list[_Reading]) -> str | None:
    if backbone.anatomy.mixes_padding:
        return "padding changes what it makes of a text, so it takes no batches."
    if any(reading.tap.n_turns > 1 for reading in readings):
        return "it runs through the same blocks several times."
    if any(reading.architecture.parallel_lists for reading in readings):
        return "its blocks are no modules of their own."
    if any(reading.tap.parameter for reading in readings):
        return "its attention heads are read at a parameter; choose another site."
    if len(set((getattr(backbone.model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices. Leave out device_map."
    if any(not weight.is_floating_point() for weight in backbone.model.parameters()):
        return "its weights are quantised. Fit with the weights as they were before."
    return None


def _refuse(backbone: Backbone, reason: str) -> None:
    name = type(backbone.model).__name__
    raise ValueError(f"{name} can't be cut out of its pipeline: {reason}")


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one stack of a copy."""

    modules: list[nn.Module]
    n_whole: int  # how many of these are kept whole, from the first on
    n_outputs: list[int]  # of a block that returns a tuple; empty for a tensor, and before a pass


def _copy_blocks_in_use(
    model: Any, backbone: Backbone, layout: Layout
) -> tuple[Any, list[_Blocks]]:
    """Copy a model, with stand-ins for the blocks after the deepest layer of each stack."""
    stacks = backbone.anatomy.stacks
    deepest: dict[str | None, tuple[int, bool]] = {}  # by stack: a layer, and whether to its end
    for segment in layout.segments:
        # Some models have no hidden state for the embeddings alone.
        layer = segment.layer + bool(stacks[segment.stack].architecture.early_norm)
        reached = layer, segment.site == "hidden"
        deepest[segment.stack] = max(reached, deepest.get(segment.stack, reached))
    if "decoder" in deepest:  # it attends to the encoder's last hidden state
        deepest["encoder"] = len(stacks["encoder"].blocks), True
    memo: dict[int, Any] = {}
    n_outputs: dict[str | None, list[int]] = {name: [] for name in deepest}
    for name, (depth, _) in deepest.items():
        # The first block stays until a pass has shown what a block returns.
        for block in stacks[name].blocks[max(depth, 1) :]:
            memo[id(block)] = _StandIn(block, n_outputs[name])
    copied = deepcopy(model, memo)
    paths = {module: path for path, module in model.named_modules()}
    return copied, [
        _Blocks(
            [copied.get_submodule(paths[block]) for block in stacks[name].blocks],
            depth if to_end else depth - 1,
            n_outputs[name],
        )
        for name, (depth, to_end) in deepest.items()
    ]


def _sample(backbone: Backbone) -> dict[str, Tensor]:
    """Make a batch of two texts, one of them padded, of tokens that are not special."""
    n_words = bare_model(backbone.model).get_input_embeddings().num_embeddings
    ids = n_words // 2 + torch.arange(10).reshape(2, 5) % (n_words // 2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return {name: values.to(backbone.device) for name, values in inputs.items()}


# Stand-ins for modules that are left out


class _StandIn(nn.Module):
    """Replaces a block or a norm, and returns the hidden state that it is given."""

    def __init__(self, module: nn.Module, n_outputs: Iterable[int] = ()):
        super().__init__()
        for name, value in vars(module).items():
            # Models ask their blocks for settings, such as the kind of attention.
            if isinstance(value, str | int) and not hasattr(self, name):
                setattr(self, name, value)
        self.n_outputs = n_outputs  # as in `_Blocks`

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden state; the next blocks are stand-ins, too, and need nothing else."""
        for n_outputs in self.n_outputs:
            return (hidden_states, *[None] * (n_outputs - 1))
        return hidden_states


class _Nothing(nn.Module):
    """Replaces a linear module, and returns zeros, on which no column depends."""

    weight = bias = None  # some models look here for the number format

    def __init__(self, n_out: int):
        super().__init__()
        self.n_out = n_out

    def forward(self, activations: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros in the shape of the linear module's output."""
        return activations.new_zeros(*activations.shape[:-1], self.n_out)


def _leave_out_unused(cut: CutModel, stacks: list[_Blocks], sample: dict[str, Tensor]) -> None:
    """Replace modules by stand-ins if no column depends on their weights."""
    handles = [
        stack.modules[0].register_forward_hook(partial(_count_outputs, stack.n_outputs))
        for stack in stacks
    ]
    weights = list(cut.parameters())
    cut.requires_grad_(True)
    with torch.enable_grad():
        total = cut(**sample).sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    cut.requires_grad_(False)
    cut.remove_hooks()
    for handle in handles:
        handle.remove()
    used = {id(w) for w, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    blocks = {block: stack for stack in stacks for block in stack.modules}
    # A few tokens do not reach all experts of a mixture, so blocks in full use are kept whole.
    whole = {block for stack in stacks for block in stack.modules[: stack.n_whole]}
    _put_stand_ins(cut.model, used, blocks, whole)


def _count_outputs(counts: list[int], block: nn.Module, args: tuple, output: Any) -> None:
    if not isinstance(output, Tensor):
        counts[:] = [len(output)]


def _put_stand_ins(
    part: nn.Module, used: set[int], blocks: dict[nn.Module, _Blocks], whole: set[nn.Module]
) -> None:
    for name, child in part.named_children():
        weights = list(child.parameters())
        if any(id(weight) in used for weight in weights):
            if child not in whole:
                _put_stand_ins(child, used, blocks, whole)
        elif child in blocks and not isinstance(child, _StandIn):
            setattr(part, name, _StandIn(child, blocks[child].n_outputs))
        elif weights and (shape := linear_shape(child)):
            setattr(part, name, _Nothing(shape[1]))
        elif weights and is_norm(child):
            setattr(part, name, _StandIn(child))
        else:
            _put_stand_ins(child, used, blocks, whole)
