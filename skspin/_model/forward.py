"""One batch through the model, read by hooks and stopped at the deepest layer.

The model stays as it was.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skspin._layout import Segment
from skspin._model.anatomy import Anatomy
from skspin._model.blocks import Tap
from skspin._model.pooling import TextGroup, group_texts, pool
from skspin._system import after_fork

# A pass may write to tables of at most so many elements, such as the frequencies of rotary
# positions; larger tables are only read.
_LARGEST = 2**14


# Not inference mode: whatever a model keeps from a pass (a table of positions, say) could then not
# be used in training.
@torch.no_grad()
def read(
    anatomy: Anatomy,
    inputs: dict[str, Tensor],
    segments: Sequence[Segment],
    *,
    by_token: bool = False,
    cache: Any = None,
) -> Tensor:
    """Read the activations of a batch, float32 on the inputs' device.

    They are pooled, (n_texts, n_columns), or with ``by_token`` (n_texts, n_tokens, n_columns).

    ``inputs`` are "input_ids", "attention_mask", whatever else the model takes by token, and
    "pooled" (bool, true somewhere in each text) if not all tokens are pooled. All are of shape
    (n_texts, n_tokens) and padded on the right, because models count positions from the left edge,
    and causal ones never look to the right. Which texts may be in one batch, `TokenBudget` says.

    With a key-value cache, which is for one text only, the tokens come after those that it holds.
    Threads may share a model; a pass that the user's code runs meanwhile is neither read nor
    stopped.
    """
    model, inputs = anatomy.model, dict(inputs)
    mask = inputs["attention_mask"].bool()
    pooled = inputs.pop("pooled", mask)
    if cache is not None:
        del inputs["attention_mask"]  # it would have to cover all tokens so far, and masks none
    reader = Reader(anatomy, segments, mask, None if by_token else pooled)
    with _unchanged(model), reader.hooks(), suppress(PassEnds):
        model(**arguments_of(model, inputs, cache))
    unread = {segments[p].key for positions in reader.unread.values() for p in positions}
    if unread:
        raise RuntimeError(
            f"{type(model).__name__} ended its forward pass without these layers: {sorted(unread)}."
            " Were its modules replaced after loading?"
        )
    return torch.cat(reader.values, dim=-1)


def arguments_of(model: Any, inputs: dict[str, Tensor], cache: Any = None) -> dict[str, Any]:
    """Choose the inputs that the model takes, and add its other arguments."""
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    # Some models take any keyword, only to refuse it (Bloom before transformers 5). So they get the
    # rarer inputs only by name, unless their signature names no input at all.
    takes_any_input = takes_any and "input_ids" not in accepted
    common = ("input_ids", "attention_mask") if takes_any else ()
    arguments: dict[str, Any] = {
        name: values
        for name, values in inputs.items()
        if name in accepted or name in common or takes_any_input
    }
    if "decoder_input_ids" in accepted:
        arguments["decoder_input_ids"] = shift_right(inputs["input_ids"], model.config)
    # The pass collects no further outputs, whatever the configuration says. (use_mems is XLNet's.)
    for switch in ("use_cache", "use_mems", "output_hidden_states", "output_attentions"):
        if switch in accepted or (takes_any and getattr(model.config, switch, False)):
            arguments[switch] = False
    if cache is not None:
        # transformers has two names for it; a model that takes neither will say so.
        name = "cache" if "cache" in accepted else "past_key_values"
        arguments |= {name: cache, "use_cache": True}
    return arguments


def shift_right(ids: Tensor, config: Any) -> Tensor:
    """Give a decoder the text that its encoder reads, as in training (teacher forcing)."""
    # At each position a decoder sees what comes before. The length stays, so the mask still fits.
    # generate looks for the first token in this order; T5, which has no other, starts with padding.
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    start = next((t for n in names if (t := getattr(config, n, None)) is not None), None)
    if start is None:
        raise ValueError(
            "The model's configuration has no token for its decoder to start with. Set"
            " config.decoder_start_token_id."
        )
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


# Hooks that read a running model at its taps


class HiddenLoopError(RuntimeError):
    """A model runs a module more often than its structure shows."""


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
                receive = partial(self._receive, tap, count())
                if tap.parameter is None:
                    stack.callback(watch(tap, receive).remove)
                else:
                    stack.enter_context(_Multiplications(tap, receive))
            yield

    def _receive(self, tap: Tap, turns: Iterator[int], activations: Tensor) -> None:
        """Take what a tap's next turn gives, if it is asked for and of this thread's pass."""
        if threading.get_ident() != self._thread:
            return
        turn = next(turns)
        if turn >= tap.n_turns:
            raise HiddenLoopError(
                f"The model runs {type(tap.module).__name__} more often than its structure"
                f" shows ({tap.n_turns} in one forward pass), for other tokens or in loops, so"
                " it can't be told which run is which layer's. Choose another site or model."
            )
        positions = self.unread.pop(replace(tap, turn=turn) if turn else tap, None)
        if positions is not None:
            self._read(positions, as_texts(activations, self.mask, tap))
            if not self.unread:
                raise PassEnds

    def _read(self, positions: list[int], activations: Tensor) -> None:
        """Take what some segments ask for of activations (n_texts, n_tokens, n_neurons)."""
        device = activations.device
        if self.pooled is not None and device not in self._groups:
            self._groups[device] = group_texts(self.pooled.to(device))
        for position in positions:
            segment = self.segments[position]
            values = activations
            if self.pooled is not None:
                values = pool(activations, self._groups[device], segment.pooling)
            # Chosen after pooling, so that values are bit for bit those among all neurons. Choosing
            # before it would be faster only for a few neurons in a hundred.
            if segment.neurons is not None:
                values = values[..., _on_device(segment.neurons, values.device)]
            self.values[position] = values.float().to(self.mask.device)


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


# The model stays as it was


class Use:
    """The state that the passes of one model share."""

    def __init__(self) -> None:
        self.n_passes = 0  # at the moment
        self.turn = threading.Lock()
        self.changes_itself = False
        self.restoring = ExitStack()


_uses: WeakKeyDictionary[nn.Module, Use] = WeakKeyDictionary()
_lock = threading.Lock()


@after_fork
def _recover_from_fork() -> None:
    """Forget the passes of the parent's threads, which do not exist in the child."""
    global _lock
    _lock = threading.Lock()
    _uses.clear()


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Put a model in evaluation mode, and restore its state after its last pass.

    Some models change in a pass: BigBird switches its attention for good when a text is short, and
    positions that are scaled by length stay as the longest text had them. Without this, a row would
    depend on texts read before. Threads may share the model, but take turns if it changes itself.
    """
    with _lock:
        use = _uses.setdefault(model, Use())
    with use.turn if use.changes_itself else nullcontext():
        with _lock:
            if not use.n_passes:
                use.restoring.enter_context(restored(model, use))
            use.n_passes += 1
        try:
            yield
        finally:
            with _lock:
                use.n_passes -= 1
                if not use.n_passes:
                    use.restoring.close()


@contextmanager
def restored(model: Any, use: Use) -> Iterator[None]:
    """Put a model in evaluation mode, and its state back at the end; note if it changed itself."""
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    if training:
        model.eval()
    # A model that changes itself logs so in the first pass, and then not again.
    logger = logging.getLogger(type(model).__module__)
    was_silent = logger.disabled
    logger.disabled |= use.changes_itself
    # PyTorch's own modules never change themselves.
    modules = [m for m in modules if not type(m).__module__.startswith("torch.nn.")]
    changeable = [vars(model.config)]
    for module in modules:
        changeable += [vars(module), module._modules, module._buffers]
    found = [(values, values.copy()) for values in changeable]
    tables = [
        (table, table._version, table.clone())
        for module in modules
        for table in module._buffers.values()
        if table is not None and table.numel() <= _LARGEST and not table.is_inference()
    ]
    yield
    for values, before in found:
        if len(values) != len(before) or not all(map(is_, values.values(), before.values())):
            use.changes_itself = True
            values.clear()
            values.update(before)
    for table, version, before in tables:
        if table._version != version:
            use.changes_itself = True
            with torch.no_grad():
                table.copy_(before)
    logger.disabled = was_silent
    for module in training:
        module.training = True
