"""What only a forward pass tells of a model: whether a text's company or history changes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from skspin._layout import Segment
from skspin._model.anatomy import Anatomy, Stack, bare_model, find_anatomy
from skspin._model.forward import token_forward
from skspin._model.positions import longest_unscaled, most_tokens

# Relative differences that are more than rounding, in float32 and in shorter formats. Batches of
# one shape compute the same but for what their padding holds; others round differently (0.8% in
# thirty blocks in bfloat16).
_SAME_SHAPE = (1e-4, 1e-2)
_OTHER_SHAPE = (5e-3, 5e-2)
_MOST_TOKENS = 12

# What a trial found, and of which weights. It holds no module, so it keeps no model alive.
_found: WeakKeyDictionary[Any, tuple[str, bool]] = WeakKeyDictionary()


def try_anatomy(model: Any, device: torch.device, fingerprint: str) -> Anatomy:
    """Find a model's anatomy, and run a few tokens to see whether padding changes a text.

    A ValueError says so if the model gives a text other activations each time.
    """
    anatomy = find_anatomy(model)
    if anatomy.mixes_padding:
        return anatomy
    known, mixes_padding = _found.get(model, ("", False))
    if known != fingerprint:
        stacks = anatomy.stacks.values()
        mixes_padding = any(_mixes_padding(model, anatomy, stack, device) for stack in stacks)
        _found[model] = fingerprint, mixes_padding
    return replace(anatomy, mixes_beyond=0 if mixes_padding else longest_unscaled(model))


def _mixes_padding(model: Any, anatomy: Anatomy, stack: Stack, device: torch.device) -> bool:
    """Compare a text alone with the same text beside a longer one, padded with this and that."""
    n_tokens = most_tokens(model, _MOST_TOKENS)
    n_real = n_tokens // 2
    if not n_real:
        return False
    batch = _longer_text(model, n_tokens, device).repeat(3, 1)  # (3, n_tokens)
    batch[0, n_real:] = 0  # as batches are padded; the second is padded with the longer text's end
    mask = torch.ones_like(batch)
    mask[:2, n_real:] = 0
    text, ones = batch[:1, :n_real], mask[2:, :n_real]
    try:
        alone = _states(model, anatomy, stack, text, ones)
        padded = _states(model, anatomy, stack, batch, mask)
        again = _states(model, anatomy, stack, text, ones)
    except Exception:
        # What can't be padded, or not be read here, may still be read in texts of one length.
        return True
    shorter = model.dtype.itemsize < 4
    if _differ(again[0], alone[0], _OTHER_SHAPE[shorter]):
        raise ValueError(
            f"{type(model).__name__} gives a text other activations when it reads the text again,"
            " so none can be relied on. It draws random numbers in evaluation mode, or remembers"
            " what it has read. Switch that off in its configuration, or choose another model."
        )
    if _differ(padded[0], padded[1], _SAME_SHAPE[shorter]):
        return True
    # Of 8-bit products, rounding alone changes a token by a tenth (quantisers have parameters of a
    # class that is not PyTorch's).
    quantised = any(type(parameter) is not nn.Parameter for parameter in model.parameters())
    return not quantised and _differ(padded[0], alone[0], _OTHER_SHAPE[shorter])


def _longer_text(model: Any, n_tokens: int, device: torch.device) -> Tensor:
    """Choose ids from the middle of the vocabulary, where no special tokens are."""
    embeddings = bare_model(model).get_input_embeddings()
    n_words = getattr(embeddings, "num_embeddings", model.config.get_text_config().vocab_size)
    return (n_words // 2 + torch.arange(n_tokens, device=device)) % n_words


def _states(
    model: Any, anatomy: Anatomy, stack: Stack, ids: Tensor, mask: Tensor
) -> list[list[Tensor]]:
    """Read each text's hidden states (n_tokens, n_neurons) by layer, at tokens that all have."""
    segments = [
        Segment(stack.name, layer, site, "none", tap.width)
        for (layer, site), tap in stack.taps.items()
        if site == "hidden"
    ]
    inputs = {"input_ids": ids, "attention_mask": mask}
    values = token_forward(model, anatomy, inputs, segments)  # (n_texts, n_tokens, n_columns)
    widths = [segment.width for segment in segments]
    return [list(text[: int(mask.sum(1).min())].split(widths, 1)) for text in values]


def _differ(states: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Tell whether any token differs in any layer, relative to its length as a vector."""
    for x, y in zip(states, expected, strict=True):
        same = (x - y).norm(dim=1) <= tolerance * y.norm(dim=1)
        if bool((~same & y.isfinite().all(1)).any()):
            return True
    return False
