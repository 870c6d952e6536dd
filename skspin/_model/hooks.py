"""Hooks that read a running model at its taps, and leave the model as it was."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from operator import is_
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
from skspin._system import after_fork


class PassEnds(BaseException):
    """Everything has been read; no Exception, because a model's own code might catch that."""


class Reader:
    """Reads the activations that segments ask for from one batch, while the model computes them.

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
        self._unread: dict[Tap, tuple[Stack, list[int]]] = {}  # and the segments of each tap
        for position, segment in enumerate(segments):
            stack = anatomy.stacks[segment.stack]
            tap = stack.tap(segment.layer, segment.site)
            self._unread.setdefault(tap, (stack, []))[1].append(position)
        self._groups: dict[torch.device, list[TextGroup]] = {}  # blocks may be on several devices

    @property
    def unread(self) -> list[str]:
        """Name the segments that have not been read."""
        return sorted({self.segments[p].key for _, ps in self._unread.values() for p in ps})

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Register the hooks, for as long as the ``with`` block lasts."""
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
            # Chosen after pooling, so that values are bit for bit those among all neurons. Choosing
            # before it would be faster only for a few neurons in a hundred.
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
        """Register the hook, until the stack is closed."""
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
        """Give activations to the reader, if they are of its thread and of a wanted turn."""
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
    """Bring activations into the shape (n_texts, n_tokens, n_neurons), whatever shape they have.

    They may be by text and token or by token and text, heads apart or together, all tokens in one
    row or only the real ones, or have more tokens than the texts.
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


# A pass may write to tables of at most so many elements, such as the frequencies of rotary
# positions; larger tables are only read.
_LARGEST = 2**14


class _Use:
    """The state that the passes of one model share."""

    def __init__(self) -> None:
        self.n_passes = 0  # at the moment
        self.turn = threading.Lock()
        self.changes_itself = False

    def begin(self, model: Any) -> None:
        """Switch to evaluation mode, and note the state before the first pass."""
        modules = list(model.modules())
        self._training = [module for module in modules if module.training]
        if self._training:
            model.eval()
        # A model that changes itself logs so in the first pass, and then not again.
        self._logger = logging.getLogger(type(model).__module__)
        self._was_silent = self._logger.disabled
        self._logger.disabled |= self.changes_itself
        # PyTorch's own modules never change themselves.
        modules = [m for m in modules if not type(m).__module__.startswith("torch.nn.")]
        changeable = [vars(model.config)]
        for module in modules:
            changeable += [vars(module), module._modules, module._buffers]
        self._found = [(values, values.copy()) for values in changeable]
        self._tables = [
            (table, table._version, table.clone())
            for module in modules
            for table in module._buffers.values()
            if table is not None and table.numel() <= _LARGEST and not table.is_inference()
        ]

    def end(self) -> None:
        """Restore the state before the first pass."""
        for values, found in self._found:
            if len(values) != len(found) or not all(map(is_, values.values(), found.values())):
                self.changes_itself = True
                values.clear()
                values.update(found)
        for table, version, found_there in self._tables:
            if table._version != version:
                self.changes_itself = True
                with torch.no_grad():
                    table.copy_(found_there)
        self._logger.disabled = self._was_silent
        for module in self._training:
            module.training = True
        self._training, self._found, self._tables = [], [], []


_uses: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()
_lock = threading.Lock()


@after_fork
def _recover_from_fork() -> None:
    """Forget the passes of the parent's threads, which do not exist in the child."""
    global _lock
    _lock = threading.Lock()
    _uses.clear()


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Put a model in evaluation mode, and restore its state after its last pass.

    Some models change in a pass: BigBird switches its attention for good when a text is short, and
    positions that are scaled by length stay as the longest text had them. Without this, a row would
    depend on texts read before. Threads may share the model, but take turns if it changes itself.
    """
    with _lock:
        use = _uses.setdefault(model, _Use())
    with use.turn if use.changes_itself else nullcontext():
        with _lock:
            if not use.n_passes:
                use.begin(model)
            use.n_passes += 1
        try:
            yield
        finally:
            with _lock:
                use.n_passes -= 1
                if not use.n_passes:
                    use.end()
