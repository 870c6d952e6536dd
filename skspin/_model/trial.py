"""What only a forward pass tells of a model: whether a text's company or history changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

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
    alone = {"input_ids": batch[:1, :n_real], "attention_mask": mask[:1, :n_real]}
    beside = {"input_ids": batch, "attention_mask": mask}
    segments = [
        Segment(stack.name, layer, site, "none", tap.width)
        for (layer, site), tap in stack.taps.items()
        if site == "hidden"
    ]
    try:
        before, company, after = (
            token_forward(model, anatomy, inputs, segments)[:, :n_real]
            for inputs in (alone, beside, alone)
        )
    except Exception:
        # What can't be padded, or not be read here, may still be read in texts of one length.
        return True
    widths = [segment.width for segment in segments]
    shorter = model.dtype.itemsize < 4
    if _differ(after, before, widths, _OTHER_SHAPE[shorter]):
        raise ValueError(
            f"{type(model).__name__} gives a text other activations when it reads the text again,"
            " so none can be relied on. It draws random numbers in evaluation mode, or remembers"
            " what it has read. Switch that off in its configuration, or choose another model."
        )
    return _differ(company[:1], company[1:2], widths, _SAME_SHAPE[shorter]) or _differ(
        company[:1], before, widths, _OTHER_SHAPE[shorter]
    )


def _longer_text(model: Any, n_tokens: int, device: torch.device) -> Tensor:
    """Choose ids from the middle of the vocabulary, where no special tokens are."""
    embeddings = bare_model(model).get_input_embeddings()
    n_words = getattr(embeddings, "num_embeddings", model.config.get_text_config().vocab_size)
    return (n_words // 2 + torch.arange(n_tokens, device=device)) % n_words


def _differ(values: Tensor, expected: Tensor, widths: Sequence[int], tolerance: float) -> bool:
    """Tell whether any token differs at any layer, relative to its length as a vector."""
    return any(
        bool((~((x - y).norm(dim=-1) <= tolerance * y.norm(dim=-1)) & y.isfinite().all(-1)).any())
        for x, y in zip(values.split(widths, -1), expected.split(widths, -1), strict=True)
    )
