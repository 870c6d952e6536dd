"""What only a forward pass shows of a model: what changes a text's activations, and what does not.

A few tokens show whether padding, texts read before, or the tokens that follow matter, and whether
the hidden states are those that the model itself returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skspin._layout import Segment
from skspin._model.anatomy import (
    Anatomy,
    Stack,
    find_anatomy,
    longest_unscaled,
    most_tokens,
    n_token_ids,
)
from skspin._model.blocks import Tap
from skspin._model.forward import HiddenLoopError, Use, arguments_of, read, restored, watch

# Relative differences that are more than rounding, in float32 and in shorter formats. Batches of
# the same shape round alike; batches of another shape round differently (by 0.8% in thirty blocks
# in bfloat16).
_SAME_SHAPE = (1e-4, 1e-2)
_OTHER_SHAPE = (5e-3, 5e-2)
_MOST_TOKENS = 12


class _Trial(NamedTuple):
    """What a trial of a stack found."""

    mixes_padding: bool = True
    looks_ahead: bool = True
    # By layer, the path of the module that takes the hidden state, where it is not the one that the
    # structure says; None if there is none. No module, which would keep its model alive.
    moved: dict[int, str | None] = {}


_States = dict[int, Tensor]  # hidden states (n_texts, n_tokens, n_neurons), by layer

# By model: its fingerprint, and what a trial of each stack found.
_found: WeakKeyDictionary[Any, tuple[str, dict[str | None, _Trial]]] = WeakKeyDictionary()


def try_anatomy(model: Any, device: torch.device, fingerprint: str) -> Anatomy:
    """Find a model's anatomy, and run a few tokens to see what changes a text.

    Raises a ValueError if the model gives the same text other activations each time.
    """
    anatomy = find_anatomy(model)
    known, found = _found.get(model, ("", {}))
    if known != fingerprint:
        found = {name: _try(anatomy, stack, device) for name, stack in anatomy.stacks.items()}
        _found[model] = fingerprint, found
    mixes_padding = anatomy.mixes_beyond == 0 or any(t.mixes_padding for t in found.values())
    return replace(
        anatomy,
        stacks={name: _move(anatomy.stacks[name], trial.moved) for name, trial in found.items()},
        mixes_beyond=0 if mixes_padding else longest_unscaled(model),
        # A decoder that attends to an encoder sees the whole text there.
        is_causal=len(found) == 1 and not any(trial.looks_ahead for trial in found.values()),
    )


def _try(anatomy: Anatomy, stack: Stack, device: torch.device) -> _Trial:
    """Compare a text alone with the same text in a batch, padded in two ways, and a longer text."""
    model = anatomy.model
    n_tokens = most_tokens(model, _MOST_TOKENS)
    n_real = n_tokens // 2
    if not n_real:
        return _Trial(mixes_padding=False)
    # Ids from the middle of the vocabulary, where no special tokens are.
    n_words = n_token_ids(model)
    longer = (n_words // 2 + torch.arange(n_tokens, device=device)) % n_words
    ids = longer.repeat(3, 1)  # (3, n_tokens)
    ids[0, n_real:] = 0  # as batches are padded; the second is padded with the longer text's end
    mask = torch.ones_like(ids)
    mask[:2, n_real:] = 0
    one_text = {"input_ids": ids[:1, :n_real], "attention_mask": mask[2:, :n_real]}
    shorter = model.dtype.itemsize < 4

    alone = _hidden_states(anatomy, stack, one_text)
    if _differ(_hidden_states(anatomy, stack, one_text), alone, _OTHER_SHAPE[shorter]):
        raise ValueError(
            f"{type(model).__name__} gives a text other activations when it reads the text again,"
            " so none can be relied on. It draws random numbers in evaluation mode, or remembers"
            " what it has read. Switch that off in its configuration, or choose another model."
        )
    moved = _find_moved(anatomy, stack, one_text, alone, _SAME_SHAPE[shorter])
    if moved:
        stack = _move(stack, moved)
        anatomy = replace(anatomy, stacks=anatomy.stacks | {stack.name: stack})
        alone = _hidden_states(anatomy, stack, one_text)
    batch = _hidden_states(anatomy, stack, {"input_ids": ids, "attention_mask": mask})
    # Without the last one, what the blocks do to a text is not known.
    if batch.keys() != alone.keys() or len(stack.blocks) not in batch:
        # A model that fails here, e.g. on padding, may still read texts of one length.
        return _Trial(moved=moved)
    padded, other_padding, longer_text = (
        {layer: states[row, :n_real] for layer, states in batch.items()} for row in range(3)
    )
    # A model that ignores the mask sees what comes behind it, so both paddings are compared.
    looks_ahead = any(
        _differ(longer_text, text, _SAME_SHAPE[shorter]) for text in (padded, other_padding)
    )
    # In 8-bit products, rounding alone changes a token by a tenth. (Parameters of quantised models
    # have a class that is not PyTorch's.)
    quantised = any(type(parameter) is not nn.Parameter for parameter in model.parameters())
    mixes_padding = _differ(padded, other_padding, _SAME_SHAPE[shorter]) or (
        not quantised and _differ(padded, alone, _OTHER_SHAPE[shorter])
    )
    return _Trial(mixes_padding, looks_ahead, moved)


def _hidden_states(
    anatomy: Anatomy, stack: Stack, inputs: dict[str, Tensor], segments: Sequence[Segment] = ()
) -> _States:
    """Read the hidden states that can be read, of all layers or of some segments."""
    segments = segments or [
        Segment(stack.name, layer, site, "none", tap.width)
        for (layer, site), tap in stack.taps.items()
        if site == "hidden"
    ]
    try:
        values = read(anatomy, inputs, segments, by_token=True)
    except HiddenLoopError:
        raise
    except Exception:
        if len(segments) < 2:
            return {}
        each = [_hidden_states(anatomy, stack, inputs, [segment]) for segment in segments]
        return {layer: states for found in each for layer, states in found.items()}
    split = values.split([segment.width for segment in segments], -1)
    return {segment.layer: states for segment, states in zip(segments, split, strict=True)}


def _find_moved(
    anatomy: Anatomy, stack: Stack, inputs: dict[str, Tensor], ours: _States, tolerance: float
) -> dict[int, str | None]:
    """Find where the hidden states go that the model itself returns and that ``ours`` has not.

    Models of text and image return the last one before their final norm, for example.
    """
    returned, passed = _ask_model(anatomy.model, stack, inputs)
    n_blocks = len(stack.blocks)
    if len(returned) != n_blocks + 1:  # these have other indices
        is_read = n_blocks in ours  # without the last one, little is known of the others
        return {layer: None for layer in range(n_blocks) if is_read and layer not in ours}

    n_texts, n_tokens = inputs["input_ids"].shape

    def same(states: Any, layer: int) -> bool:
        own = returned[layer]
        # The last one of Pegasus-X has another beside it, and tokens that round a text up.
        pair = states, own[0] if isinstance(own, tuple) else own
        found = [x[:, :n_tokens].float().cpu() for x in pair if getattr(x, "ndim", 0) > 1]
        shape = n_texts, n_tokens, stack.taps[layer, "hidden"].width
        if [x.shape for x in found] != [shape, shape]:
            return False
        return not _differ({layer: found[0]}, {layer: found[1]}, tolerance)

    return {
        layer: next((path for path, states in passed.items() if same(states, layer)), None)
        for layer in range(len(returned))
        if not same(ours.get(layer), layer)
    }


@torch.no_grad()
def _ask_model(
    model: Any, stack: Stack, inputs: dict[str, Tensor]
) -> tuple[Sequence[Any], dict[str, Tensor]]:
    """Get the hidden states that a model returns, and what goes into modules beside its blocks."""
    output, passed = None, dict[str, Tensor]()
    half = stack.taps[len(stack.blocks), "hidden"].module
    inside = {module for block in stack.blocks for module in block.modules()}
    with restored(model, Use()), _hooks_kept(model), ExitStack() as hooks:
        for path, module in half.named_modules():
            if module not in inside:
                keep = partial(passed.__setitem__, path)
                hooks.callback(watch(Tap(module, 0), keep).remove)
        asked = {"output_hidden_states": True, "return_dict": True}
        with suppress(Exception):  # not every model has such options
            output = model(**arguments_of(model, inputs) | asked)
    names = [f"{stack.name}_hidden_states", "hidden_states"]
    return next((states for name in names if (states := getattr(output, name, None))), ()), passed


@contextmanager
def _hooks_kept(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that transformers leaves in a model whose hidden states it returned."""
    found = [(module._forward_hooks, set(module._forward_hooks)) for module in model.modules()]
    yield
    for hooks, before in found:
        for name in hooks.keys() - before:
            if hooks[name].__module__.startswith("transformers."):
                del hooks[name]


def _move(stack: Stack, moved: dict[int, str | None]) -> Stack:
    """Read some hidden states elsewhere, or nowhere."""
    half = stack.taps[len(stack.blocks), "hidden"].module
    taps, missing = dict(stack.taps), dict(stack.missing)
    for layer, path in moved.items():
        tap = taps.pop((layer, "hidden"))
        if path is None:
            missing[layer, "hidden"] = (
                "what is read there, if anything, is not what the model returns for it."
            )
        else:
            taps[layer, "hidden"] = Tap(half.get_submodule(path), tap.width)
    return replace(stack, taps=taps, missing=missing)


def _differ(states: _States, expected: _States, tolerance: float) -> bool:
    """Tell whether any token differs in any layer that both have, relative to its norm."""
    for layer in states.keys() & expected.keys():
        x, y = states[layer], expected[layer]
        same = (x - y).norm(dim=-1) <= tolerance * y.norm(dim=-1)
        if bool((~same & y.isfinite().all(-1)).any()):
            return True
    return False
