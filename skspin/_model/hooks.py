"""Hooks that read a running model at its taps."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skspin._layout import Segment
from skspin._model.anatomy import Anatomy
from skspin._model.blocks import Tap
from skspin._model.pooling import TextGroup, group_texts, pool


class PassEnds(BaseException):
    """Everything has been read; no Exception, because a model's own code might catch that."""


def positions_by_tap(anatomy: Anatomy, segments: Sequence[Segment]) -> dict[Tap, list[int]]:
    """Find the taps that segments are read at, and the positions of the segments of each."""
    found: dict[Tap, list[int]] = {}
    for position, segment in enumerate(segments):
        tap = anatomy.stacks[segment.stack].tap(segment.layer, segment.site)
        found.setdefault(tap, []).append(position)
    return found


class Reader:
    """Reads the activations that segments ask for from one batch, while the model computes them."""

    def __init__(
        self, anatomy: Anatomy, segments: Sequence[Segment], mask: Tensor, pooled: Tensor | None
    ):
        self.segments = segments
        self.mask = mask  # (n_texts, n_tokens), bool: real tokens, which come before the padding
        self.pooled = pooled  # likewise, those that are pooled; None to read token by token
        # By segment, float32, on the device of the mask: (n_texts, n_columns) if pooled, else
        # (n_texts, n_tokens, n_columns).
        self.values = [torch.empty(0)] * len(segments)
        self.unread = positions_by_tap(anatomy, segments)
        self._groups: dict[torch.device, list[TextGroup]] = {}  # blocks may be on several devices
        self._thread = threading.get_ident()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Register the hooks, for as long as the ``with`` block lasts."""
        with ExitStack() as stack:
            # One hook counts the turns of a module.
            for tap in dict.fromkeys(replace(t, turn=0) if t.turn else t for t in self.unread):
                turns = iter([tap, *(replace(tap, turn=n) for n in range(1, tap.n_turns))])
                receive = partial(self._receive, tap, turns)
                if tap.parameter is None:
                    stack.callback(watch(tap, receive).remove)
                else:
                    stack.enter_context(_Multiplications(tap, receive))
            yield

    def _receive(self, tap: Tap, turns: Iterator[Tap], activations: Tensor) -> None:
        """Take what a tap's next turn gives, if it is asked for and of this thread's pass."""
        if threading.get_ident() != self._thread:
            return
        turn = next(turns, None)
        if turn is None:
            raise RuntimeError(
                f"The model runs {type(tap.module).__name__} more often than its structure"
                f" shows ({tap.n_turns} in one forward pass), for other tokens or in loops, so"
                " it can't be told which run is which layer's. Choose another site or model."
            )
        positions = self.unread.pop(turn, None)
        if positions is not None:
            self._read(positions, as_texts(activations, self.mask, turn))
            if not self.unread:
                raise PassEnds

    def _read(self, positions: list[int], activations: Tensor) -> None:
        """Take what some segments ask for of activations (n_texts, n_tokens, n_neurons)."""
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

    def _pool(self, activations: Tensor, pooled: Tensor, pooling: str) -> Tensor:
        device = activations.device
        if device not in self._groups:
            self._groups[device] = group_texts(pooled.to(device))
        return pool(activations, self._groups[device], pooling)


@lru_cache(maxsize=256)  # a pruned pipeline asks for the same neurons in every batch
def _on_device(neurons: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(neurons, device=device)


def watch(tap: Tap, receive: Callable[[Tensor], None]) -> Any:
    """Register a hook that gives ``receive`` what passes a tap in each call; return its handle."""
    if tap.output:
        return tap.module.register_forward_hook(partial(_after, receive))
    return tap.module.register_forward_pre_hook(partial(_before, receive), with_kwargs=True)


def _before(receive: Any, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
    if args:
        receive(args[0])
    # PyTorch leaves out the kwargs in a thread that calls the module just when another thread adds
    # or removes this hook: then there is nothing to receive.
    elif kwargs:
        receive(kwargs[next(iter(inspect.signature(module.forward).parameters))])


def _after(receive: Any, module: nn.Module, args: tuple, output: Any) -> None:
    receive(output if isinstance(output, Tensor) else output[0])


class _Multiplications(TorchFunctionMode):
    """Gives ``receive`` what this thread multiplies with a tap's parameter by `torch.einsum`."""

    def __init__(self, tap: Tap, receive: Callable[[Tensor], None]):
        super().__init__()
        self.tap, self.receive = tap, receive

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.einsum:
            weight = getattr(self.tap.module, str(self.tap.parameter))
            others = [operand for operand in args[1:] if operand is not weight]
            if len(others) < len(args[1:]):
                self.receive(others[0])
        return function(*args, **(kwargs or {}))


def as_texts(activations: Tensor, mask: Tensor, tap: Tap) -> Tensor:
    """Bring activations into the shape (n_texts, n_tokens, n_neurons), whatever shape they have.

    They may be by text and token or by token and text, heads apart or together, all tokens in one
    row or only the real ones, or have more tokens than the texts.
    """
    if tap.time_major:
        activations = activations.transpose(0, 1)
    if activations.dim() > 3:  # heads apart
        activations = activations.flatten(2)
    if activations.dim() == 2 and activations.shape[0] == mask.numel():
        activations = activations.unflatten(0, mask.shape)
    elif activations.dim() == 2 and activations.shape[0] == mask.sum():  # flash attention's packing
        packed, mask = activations, mask.to(activations.device)
        activations = packed.new_zeros(*mask.shape, packed.shape[-1])
        activations[mask] = packed
    if tap.rounds_up:
        activations = activations[:, : mask.shape[1]]
    if activations.shape != (*mask.shape, tap.width):
        raise RuntimeError(
            f"{type(tap.module).__name__} has activations of shape {tuple(activations.shape)}, but"
            f" {(*mask.shape, tap.width)} (texts, tokens, neurons) was expected: this architecture"
            " does more to its texts than its structure shows. Choose another site or model."
        )
    return activations
