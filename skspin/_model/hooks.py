"""Hooks that read a running model at its taps, and change nothing."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skspin._model.anatomy import Tap


def listen(stack: ExitStack, taps: Sequence[Tap], read: Callable[[Tap, Tensor], None]) -> None:
    """Call ``read`` with a tap and its activations whenever this thread's model comes by one.

    Parameters
    ----------
    stack : ExitStack
        Gets every hook as it is made, so that closing it removes them all.
    taps : sequence of Tap
        Where to listen.
    read : callable
        Called with the tap, and its activations as the model has them.
    """
    places: dict[tuple[nn.Module, bool, str | None], dict[int, Tap]] = {}
    for tap in taps:
        places.setdefault((tap.module, tap.output, tap.parameter), {})[tap.turn] = tap
    for (module, output, parameter), by_turn in places.items():
        notice = _in_turn(by_turn, read)
        if parameter is not None:
            stack.enter_context(_Multiplications(module, parameter, notice))
        elif output:
            stack.callback(_after(module, notice).remove)
        else:
            stack.callback(_before(module, notice).remove)


def _in_turn(
    by_turn: dict[int, Tap], read: Callable[[Tap, Tensor], None]
) -> Callable[[Tensor], None]:
    """Tell the calls of a shared module apart, and the passes of other threads from our own."""
    thread = threading.get_ident()
    turns = count()
    any_tap = next(iter(by_turn.values()))

    def notice(activations: Tensor) -> None:
        if threading.get_ident() != thread:
            return
        turn = next(turns)
        if turn >= any_tap.n_turns:
            raise RuntimeError(
                f"The model runs {type(any_tap.module).__name__} more often than its structure"
                f" shows ({any_tap.n_turns} in one forward pass), for other tokens or in loops, so"
                " it can't be told which run is which layer's. Choose another site or model."
            )
        if turn in by_turn:
            read(by_turn[turn], activations)

    return notice


def _before(module: nn.Module, notice: Callable[[Tensor], None]) -> Any:
    # PyTorch leaves out the kwargs in a thread that calls the module just when another thread adds
    # or removes this hook: then there is nothing for us to notice.
    def hook(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if args:
            notice(args[0])
        elif kwargs:
            notice(kwargs[next(iter(inspect.signature(module.forward).parameters))])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, notice: Callable[[Tensor], None]) -> Any:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        notice(output if isinstance(output, Tensor) else output[0])

    return module.register_forward_hook(hook)


class _Multiplications(TorchFunctionMode):
    """Notice what this thread multiplies with a parameter by `torch.einsum`."""

    def __init__(self, module: nn.Module, parameter: str, notice: Callable[[Tensor], None]):
        super().__init__()
        self.module, self.parameter, self.notice = module, parameter, notice

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.einsum:
            operands, weight = args[1:], getattr(self.module, self.parameter)
            if any(operand is weight for operand in operands):
                self.notice(next(operand for operand in operands if operand is not weight))
        return function(*args, **(kwargs or {}))


def as_texts(activations: Tensor, mask: Tensor, tap: Tap) -> Tensor:
    """Bring activations into one shape, whatever shape the model computes them in.

    Parameters
    ----------
    activations : Tensor
        As the model has them: by text and token or by token and text, heads apart or together,
        all tokens in one row or only the real ones, or longer than the texts.
    mask : Tensor of shape (n_texts, n_tokens), bool
        True for real tokens, which come before the padding.
    tap : Tap
        Where they are from.

    Returns
    -------
    Tensor of shape (n_texts, n_tokens, n_neurons)
    """
    if tap.time_major:
        activations = activations.transpose(0, 1)
    if activations.dim() > 3:  # heads apart
        activations = activations.flatten(2)
    if activations.dim() == 2 and len(activations) == mask.numel():
        activations = activations.unflatten(0, mask.shape)
    elif activations.dim() == 2 and len(activations) == mask.sum():  # flash attention's packing
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
