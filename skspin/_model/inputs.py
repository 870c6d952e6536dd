"""What a model's forward pass is called with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from skspin._model.anatomy import is_encoder_decoder


def pad_right(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move each text's tokens to the left, and the padding behind them.

    Models count positions from the left edge, and causal ones never look to the right: so padding
    on the right is the one that changes nothing, in every architecture.
    """
    padding = (inputs["attention_mask"] == 0).byte()
    order = padding.argsort(dim=1, stable=True)  # real tokens first, in their own order
    return {name: values.gather(1, order) for name, values in inputs.items()}


def arguments_for(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Complete what a model is called with.

    Parameters
    ----------
    model : PreTrainedModel
        Without a head.
    inputs : dict of str to Tensor of shape (n_texts, n_tokens)
        Padded on the right.
    """
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    arguments: dict[str, Any] = {k: v for k, v in inputs.items() if takes_any or k in accepted}
    if is_encoder_decoder(model):
        arguments["decoder_input_ids"] = _shift_right(inputs["input_ids"], model.config)
    # The pass gathers nothing for others, whatever the configuration says. (use_mems is XLNet's.)
    for switch in ("use_cache", "use_mems", "output_hidden_states", "output_attentions"):
        if switch in accepted or (takes_any and getattr(model.config, switch, False)):
            arguments[switch] = False
    return arguments


def _shift_right(ids: Tensor, config: Any) -> Tensor:
    """Give a decoder the text that its encoder reads, as in training (teacher forcing).

    A decoder is trained on the text that it is to produce, moved right by one token: at each
    position it sees what comes before. The text is as long as it was, so its mask still fits.
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
