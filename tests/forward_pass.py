"""What tests of a forward pass ask for, and what they compare it with."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny_models import tiny_batch

from skspin._layout import SITES, Layout, Segment
from skspin._model import forward
from skspin._model.anatomy import find_anatomy
from skspin._model.batches import TokenBudget
from skspin._model.trial import try_anatomy

BY_HAND = {
    "mean": lambda tokens: tokens.mean(0),
    "max": lambda tokens: tokens.amax(0),
    "first": lambda tokens: tokens[0],
    "last": lambda tokens: tokens[-1],
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def segments_of(model, sites=SITES, poolings=("mean",), layers=None):
    return [
        Segment(stack.name, layer, site, pooling, tap.width)
        for stack in find_anatomy(model).stacks.values()
        for (layer, site), tap in sorted(stack.taps.items())
        if site in sites and (layers is None or layer in layers)
        for pooling in poolings
    ]


def n_blocks(model):
    """Count the blocks of a model's deeper stack."""
    return max(len(stack.blocks) for stack in find_anatomy(model).stacks.values())


def read(model, segments=None, batch=None, anatomy=None):
    """Read texts' pooled activations, in one batch as far as the model allows."""
    segments = segments_of(model) if segments is None else segments
    batch = tiny_batch() if batch is None else batch
    anatomy, device = anatomy or tried(model), torch.device("cpu")
    backbone = SimpleNamespace(model=model, anatomy=anatomy, device=device, dtype="float32")
    budget = TokenBudget(backbone, 10**6)
    lengths = batch["attention_mask"].sum(1)
    left, rows = lengths.argsort(descending=True), [None] * len(lengths)
    while len(left):
        n_texts = budget.n_texts(lengths[left].numpy(), budget.tokens)
        together, left = left[:n_texts].sort().values, left[n_texts:]
        n_tokens = lengths[together].max()
        some = {name: values[together, :n_tokens] for name, values in batch.items()}
        for row, values in zip(together, forward.read(anatomy, some, segments), strict=True):
            rows[row] = values
    return torch.stack(rows)


def tried(model, fingerprint="any"):
    return try_anatomy(model, torch.device("cpu"), fingerprint)


def alone(model, batch, row):
    """Run one text without padding, as transformers documents it."""
    real = batch["attention_mask"][row].bool()
    inputs = {n: v[row][real][None] for n, v in batch.items() if n != "attention_mask"}
    inputs["output_hidden_states"] = True
    if model.config.is_encoder_decoder:
        start = torch.full((1, 1), model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat([start, inputs["input_ids"][:, :-1]], 1)
        inputs["use_cache"] = False
    with torch.no_grad():
        return model(**inputs)


def columns(segments):
    return zip(segments, Layout(tuple(segments)).slices, strict=True)


def assert_pooled(row, segments, tokens_of):
    """Compare a row with what ``tokens_of(segment)``, (n_tokens, n_neurons), pools to."""
    for segment, where in columns(segments):
        expected = BY_HAND[segment.pooling](tokens_of(segment))
        torch.testing.assert_close(row[where], expected, **CLOSE)
