"""Hooks that read a running model at its taps; the model does not notice, and is left as it was."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skspin._layout import Segment
from skspin._model.anatomy import Anatomy, Stack
from skspin._model.architectures import Architecture
from skspin._model.blocks import Tap
from skspin._model.pooling import TextGroup, group_texts, pool


class PassEnds(BaseException):
    """Everything has been read. Not an Exception, which a model's own code might catch."""


class Reader:
    """Takes the activations that segments ask for from one batch, as the model comes by them.

    ``mask`` of shape (n_texts, n_tokens) is True for real tokens, which come before the padding,
    and ``pooled`` for those that are pooled. A segment's values are then of shape (n_texts,
    n_columns); if ``pooled`` is None they are (n_texts, n_tokens, n_columns). They are on the
    device of the mask, and float32.
    """

    def __init__(
        self, anatomy: Anatomy, segments: Sequence[Segment], mask: Tensor, pooled: Tensor | None
    ):
        self.segments, self.mask, self.pooled = segments, mask, pooled
        self.values = [torch.empty(0)] * len(segments)
        self._unread: dict[Tap, tuple[Stack, list[int]]] = {}  # which segments read what is there
        for position, segment in enumerate(segments):
            stack = anatomy.stacks[segment.stack]
            tap = stack.tap(segment.layer, segment.site)
            self._unread.setdefault(tap, (stack, []))[1].append(position)
        self._groups: dict[torch.device, list[TextGroup]] = {}  # blocks may be on several devices

    @property
    def unread(self) -> list[str]:
        """Name the segments that the model did not come by."""
        return sorted({self.segments[p].key for _, ps in self._unread.values() for p in ps})

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hang up the hooks, for as long as the ``with`` block lasts."""
        taps_at: dict[tuple[nn.Module, bool, str | None], dict[int, Tap]] = {}
        for tap in self._unread:
            taps_at.setdefault((tap.module, tap.output, tap.parameter), {})[tap.turn] = tap
        with ExitStack() as stack:
            for taps in taps_at.values():
                _Hook(self, taps).attach(stack)
            yield

    def read(self, tap: Tap, activations: Tensor) -> None:
        """Take what the segments of a tap ask for; end the pass if that was the last."""
        stack, positions = self._unread.pop(tap)
        # (n_texts, n_tokens, n_neurons)
        activations = as_texts(activations, self.mask, tap, stack.architecture)
        for position in positions:
            segment = self.segments[position]
            values = activations
            if self.pooled is not None:
                values = self._pool(activations, self.pooled, segment.pooling)
            # Chosen after pooling, so that they are to the bit what they are among all neurons.
            # Before it, only a few in a hundred would be cheaper.
            if segment.neurons is not None:
                values = values[..., _on_device(segment.neurons, values.device)]
            self.values[position] = values.float().to(self.mask.device)
        if not self._unread:
            raise PassEnds

    def _pool(self, activations: Tensor, pooled: Tensor, pooling: str) -> Tensor:
        device = activations.device
        if device not in self._groups:
            self._groups[device] = group_texts(pooled.to(device))
        return pool(activations, self._groups[device], pooling)


@lru_cache(maxsize=256)  # a pruned pipeline asks for the same neurons in every batch
def _on_device(neurons: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(neurons, device=device)


class _Hook:
    """Tells the calls of one module apart, and the passes of other threads from this one's."""

    def __init__(self, reader: Reader, taps: dict[int, Tap]):  # by turn
        self.reader, self.taps = reader, taps
        self.tap = next(iter(taps.values()))
        self.thread = threading.get_ident()
        self.n_calls = 0

    def attach(self, stack: ExitStack) -> None:
        """Hang the hook up, until the stack is closed."""
        if self.tap.parameter is not None:
            stack.enter_context(_Multiplications(self))
        elif self.tap.output:
            stack.callback(self.tap.module.register_forward_hook(self.after).remove)
        else:
            handle = self.tap.module.register_forward_pre_hook(self.before, with_kwargs=True)
            stack.callback(handle.remove)

    def before(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        # PyTorch leaves out the kwargs in a thread that calls the module just when another thread
        # adds or removes this hook: then there is nothing to notice.
        if args or kwargs:
            self.notice(input_of(module, args, kwargs or {}))

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.notice(output if isinstance(output, Tensor) else output[0])

    def notice(self, activations: Tensor) -> None:
        """Have the reader take the activations, if they are of its thread and of a wanted turn."""
        if threading.get_ident() != self.thread:
            return
        if self.n_calls >= self.tap.n_turns:
            raise RuntimeError(
                f"The model runs {type(self.tap.module).__name__} more often than its structure"
                f" shows ({self.tap.n_turns} in one forward pass), for other tokens or in loops, so"
                " it can't be told which run is which layer's. Choose another site or model."
            )
        turn, self.n_calls = self.n_calls, self.n_calls + 1
        if turn in self.taps:
            self.reader.read(self.taps[turn], activations)


def input_of(module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """Find a module's first input, which may be given by name."""
    if args:
        return args[0]
    return kwargs[next(iter(inspect.signature(module.forward).parameters))]


class _Multiplications(TorchFunctionMode):
    """Notices what this thread multiplies with a parameter by `torch.einsum`."""

    def __init__(self, hook: _Hook):
        super().__init__()
        self.hook = hook

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.einsum:
            tap, operands = self.hook.tap, args[1:]
            weight = getattr(tap.module, str(tap.parameter))
            if any(operand is weight for operand in operands):
                self.hook.notice(next(operand for operand in operands if operand is not weight))
        return function(*args, **(kwargs or {}))


def as_texts(activations: Tensor, mask: Tensor, tap: Tap, architecture: Architecture) -> Tensor:
    """Bring activations into the shape (n_texts, n_tokens, n_neurons), whatever they come in.

    They may be by text and token or by token and text, heads apart or together, all tokens in one
    row or only the real ones, or longer than the texts.
    """
    inside = not tap.output
    if inside and architecture.time_major:
        activations = activations.transpose(0, 1)
    if activations.dim() > 3:  # heads apart
        activations = activations.flatten(2)
    if activations.dim() == 2 and activations.shape[0] == mask.numel():
        activations = activations.unflatten(0, mask.shape)
    elif activations.dim() == 2 and activations.shape[0] == mask.sum():  # flash attention's packing
        packed, mask = activations, mask.to(activations.device)
        activations = packed.new_zeros(*mask.shape, packed.shape[-1])
        activations[mask] = packed
    if inside and architecture.rounds_up:
        activations = activations[:, : mask.shape[1]]
    if activations.shape != (*mask.shape, tap.width):
        raise RuntimeError(
            f"{type(tap.module).__name__} has activations of shape {tuple(activations.shape)}, but"
            f" {(*mask.shape, tap.width)} (texts, tokens, neurons) was expected: this architecture"
            " does more to its texts than its structure shows. Choose another site or model."
        )
    return activations


@dataclass
class _Use:
    """How many passes use a model at the moment, and what was in training before them."""

    training: list[nn.Module]
    n_passes: int = 0


_uses: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and give each module its own mode back when the last pass is over.

    Threads may share the model: the first one's leaving must not switch dropout on for the others.
    """
    with _lock:
        use = _uses.get(model)
        if use is None:
            use = _uses[model] = _Use([module for module in model.modules() if module.training])
            if use.training:
                model.eval()
        use.n_passes += 1
    try:
        yield
    finally:
        with _lock:
            use.n_passes -= 1
            if not use.n_passes:
                del _uses[model]
                for module in use.training:
                    module.training = True
