"""What only a forward pass shows of a model: what changes a text's activations, and what does not.

A few tokens show whether padding, texts read before, or the tokens that follow matter.
"""

from __future__ import annotations

from dataclasses import replace
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
from skspin._model.forward import HiddenLoopError, read

# Relative differences that are more than rounding, in float32 and in shorter formats. Batches of
# the same shape round alike; batches of another shape round differently (by 0.8% in thirty blocks
# in bfloat16).
_SAME_SHAPE = (1e-4, 1e-2)
_OTHER_SHAPE = (5e-3, 5e-2)
_MOST_TOKENS = 12


class _Trial(NamedTuple):
    """What a trial found."""

    mixes_padding: bool = True
    looks_ahead: bool = True


# By model: its fingerprint, and what a trial found; no module, which would keep the model alive.
_found: WeakKeyDictionary[Any, tuple[str, _Trial]] = WeakKeyDictionary()


def try_anatomy(model: Any, device: torch.device, fingerprint: str) -> Anatomy:
    """Find a model's anatomy, and run a few tokens to see what changes a text.

    Raises a ValueError if the model gives the same text other activations each time.
    """
    anatomy = find_anatomy(model)
    if anatomy.mixes_beyond == 0:
        return anatomy
    known, found = _found.get(model, ("", _Trial()))
    if known != fingerprint:
        trials = [_try(anatomy, stack, device) for stack in anatomy.stacks.values()]
        found = _Trial(*map(any, zip(*trials, strict=True)))
        _found[model] = fingerprint, found
    return replace(
        anatomy,
        mixes_beyond=0 if found.mixes_padding else longest_unscaled(model),
        # A decoder that attends to an encoder sees the whole text there.
        is_causal=not found.looks_ahead and len(anatomy.stacks) == 1,
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
    batch = longer.repeat(3, 1)  # (3, n_tokens)
    batch[0, n_real:] = 0  # as batches are padded; the second is padded with the longer text's end
    mask = torch.ones_like(batch)
    mask[:2, n_real:] = 0
    hidden = [(layer, tap) for (layer, site), tap in stack.taps.items() if site == "hidden"]
    segments = [Segment(stack.name, layer, "hidden", "none", tap.width) for layer, tap in hidden]

    def states(ids: Tensor, mask: Tensor) -> list[list[Tensor]]:
        """Read each text's hidden states (n_real, n_neurons) by layer."""
        inputs = {"input_ids": ids, "attention_mask": mask}
        values = read(anatomy, inputs, segments, by_token=True)[:, :n_real]
        return [list(text.split([segment.width for segment in segments], 1)) for text in values]

    try:
        (alone,) = states(batch[:1, :n_real], mask[2:, :n_real])
        padded, other_padding, longer_text = states(batch, mask)
        (again,) = states(batch[:1, :n_real], mask[2:, :n_real])
    except HiddenLoopError:
        raise
    except Exception:
        # A model that fails here, e.g. on padding, may still read texts of one length.
        return _Trial()
    shorter = model.dtype.itemsize < 4
    if _differ(again, alone, _OTHER_SHAPE[shorter]):
        raise ValueError(
            f"{type(model).__name__} gives a text other activations when it reads the text again,"
            " so none can be relied on. It draws random numbers in evaluation mode, or remembers"
            " what it has read. Switch that off in its configuration, or choose another model."
        )
    # A model that ignores the mask sees what comes behind it, so both paddings are compared.
    looks_ahead = any(
        _differ(longer_text, text, _SAME_SHAPE[shorter]) for text in (padded, other_padding)
    )
    if _differ(padded, other_padding, _SAME_SHAPE[shorter]):
        return _Trial(looks_ahead=looks_ahead)
    # In 8-bit products, rounding alone changes a token by a tenth. (Parameters of quantised models
    # have a class that is not PyTorch's.)
    quantised = any(type(parameter) is not nn.Parameter for parameter in model.parameters())
    mixes_padding = not quantised and _differ(padded, alone, _OTHER_SHAPE[shorter])
    return _Trial(mixes_padding, looks_ahead)


def _differ(states: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Tell whether any token differs in any layer, relative to its norm."""
    for x, y in zip(states, expected, strict=True):
        same = (x - y).norm(dim=1) <= tolerance * y.norm(dim=1)
        if bool((~same & y.isfinite().all(1)).any()):
            return True
    return False
