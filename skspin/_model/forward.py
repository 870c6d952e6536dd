"""One batch through the model: read by hooks, stopped at the deepest layer asked for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from skspin._layout import Segment
from skspin._model.anatomy import Anatomy, bare_model, is_encoder_decoder
from skspin._model.hooks import PassEnds, Reader, unchanged


def pooled_forward(
    model: Any, anatomy: Anatomy, inputs: dict[str, Tensor], segments: Sequence[Segment]
) -> Tensor:
    """Read the pooled activations (n_texts, n_columns) of a batch, float32 on the inputs' device.

    ``inputs`` are "input_ids", "attention_mask", whatever else the model takes by token, and
    "pooled" (bool) if not all tokens are pooled. All are of shape (n_texts, n_tokens) and padded on
    the right, because models count positions from the left edge, and causal ones never look to the
    right. Each text has at least one token that is pooled.

    The pass ends when everything has been read, so later layers and the head cost nothing. The
    model is left as it was, even if the pass fails. Threads may share a model; a pass that the
    user's code runs meanwhile is neither read nor stopped.
    """
    if inputs["attention_mask"].shape[1] <= anatomy.mixes_beyond:
        return torch.cat(_read(model, anatomy, inputs, segments), dim=1)
    # Where texts in a batch change each other, only texts of one length are run together.
    lengths = inputs["attention_mask"].sum(1)  # (n_texts,)
    groups = lengths.where(lengths > anatomy.mixes_beyond, 0)  # short texts make one group
    columns = torch.empty(len(lengths), sum(s.n_columns for s in segments), device=lengths.device)
    for group in groups.unique().tolist():
        rows = groups == group
        n_tokens = int(lengths[rows].max())
        alike = {name: values[rows, :n_tokens] for name, values in inputs.items()}
        columns[rows] = torch.cat(_read(model, anatomy, alike, segments), dim=1)
    return columns


def token_forward(
    model: Any,
    anatomy: Anatomy,
    inputs: dict[str, Tensor],
    segments: Sequence[Segment],
    cache: Any = None,
) -> Tensor:
    """Read activations (n_texts, n_tokens, n_columns) at every token; see `pooled_forward`.

    With a key-value cache, which is for one text only, the tokens come after those that it holds.
    """
    return torch.cat(_read(model, anatomy, inputs, segments, by_token=True, cache=cache), dim=2)


# Not inference mode: whatever a model keeps from a pass (a table of positions, say) could then not
# be used in training.
@torch.no_grad()
def _read(
    model: Any,
    anatomy: Anatomy,
    inputs: dict[str, Tensor],
    segments: Sequence[Segment],
    *,
    by_token: bool = False,
    cache: Any = None,
) -> list[Tensor]:
    model = bare_model(model)
    inputs = dict(inputs)
    mask = inputs["attention_mask"].bool()
    pooled = inputs.pop("pooled", mask)
    if cache is not None:
        del inputs["attention_mask"]  # it would have to cover all tokens so far, and masks none
    reader = Reader(anatomy, segments, mask, None if by_token else pooled)
    with unchanged(model), reader.hooks(), suppress(PassEnds):
        model(**arguments_of(model, inputs, cache))
    if reader.unread:
        raise RuntimeError(
            f"{type(model).__name__} ended its forward pass without these layers: {reader.unread}."
            " Were its modules replaced after loading?"
        )
    return reader.values


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
    if is_encoder_decoder(model):
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
    """Give a decoder the text that its encoder reads, as in training (teacher forcing).

    A decoder is trained on the text that it is to produce, moved right by one token: at each
    position it sees what comes before. The length stays the same, so the mask still fits.
    """
    # generate looks for the first token in this order; T5, which has no other, starts with padding.
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    start = next((t for n in names if (t := getattr(config, n, None)) is not None), None)
    if start is None:
        raise ValueError(
            "The model's configuration has no token for its decoder to start with. Set"
            " config.decoder_start_token_id."
        )
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
