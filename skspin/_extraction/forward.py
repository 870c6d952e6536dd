"""One batch through the model, pooled by hooks, stopping at the deepest layer asked for."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from skspin._extraction.anatomy import Anatomy, Tap
from skspin._extraction.pooling import POOLINGS
from skspin._layout import Segment

# What a forward pass must not do for us, where the model has the choice.
_QUIET = {
    "use_cache": False,
    "use_mems": False,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
}


class _Enough(BaseException):
    """Raised by a hook when the last activation wanted has been read."""


@torch.inference_mode()
def pooled_forward(
    model: Any, anatomy: Anatomy, inputs: dict[str, Tensor], segments: Sequence[Segment]
) -> Tensor:
    """Read the activations of a batch of texts.

    Parameters
    ----------
    model : PreTrainedModel
        Left as it was.
    anatomy : Anatomy
        Of this model.
    inputs : dict of Tensor
        ``input_ids`` and ``attention_mask`` of shape (n_texts, n_tokens), padded on either side.
    segments : sequence of Segment
        What to read.

    Returns
    -------
    Tensor of shape (n_texts, n_columns), float32
    """
    base = model.base_model
    ids, mask = _align(inputs["input_ids"], inputs["attention_mask"].bool())
    wanted: dict[Tap, list[int]] = {}
    for position, segment in enumerate(segments):
        tap = anatomy.stacks[segment.stack].tap(segment.layer, segment.site)
        wanted.setdefault(tap, []).append(position)

    columns: list[Tensor | None] = [None] * len(segments)
    thread = threading.get_ident()

    def read(tap: Tap, hidden: Tensor) -> None:
        for position in wanted.pop(tap):
            segment = segments[position]
            pooled = POOLINGS[segment.pooling](hidden, mask.to(hidden.device))
            if segment.neurons is not None:
                pooled = pooled[:, torch.tensor(segment.neurons, device=pooled.device)]
            columns[position] = pooled.to(ids.device)
        if not wanted:
            raise _Enough

    with ExitStack() as hooks:
        for tap in list(wanted):
            hooks.callback(_attach(tap, read, thread).remove)
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            base(**_arguments(base, ids, mask))
        except _Enough:
            pass
        finally:
            for module in training:
                module.training = True
    return torch.cat([column for column in columns if column is not None], dim=1)


def _attach(tap: Tap, read: Any, thread: int) -> Any:
    def before(module: Any, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == thread:
            read(tap, args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            read(tap, output[0])

    if tap.output:
        return tap.module.register_forward_hook(after)
    return tap.module.register_forward_pre_hook(before, with_kwargs=True)


def _align(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move every text's tokens to the left edge, so that positions start at the first of them."""
    order = (~mask).int().argsort(dim=1, stable=True)  # real tokens first, in their own order
    return ids.gather(1, order), mask.gather(1, order)


def _arguments(base: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if base.config.is_encoder_decoder:
        # Teacher forcing, as in training: the decoder sees token i when it is to tell token i + 1.
        start = torch.full_like(ids[:, :1], _start_token(base.config))
        arguments["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)
    accepted = inspect.signature(base.forward).parameters
    return arguments | {name: value for name, value in _QUIET.items() if name in accepted}


def _start_token(config: Any) -> int:
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return token
    raise ValueError("The decoder's first token is not known: set config.decoder_start_token_id.")
