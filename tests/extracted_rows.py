"""Rows that a tiny model gives, and how else to come by them."""

from contextlib import contextmanager

import numpy as np
import torch
from transformers import BertConfig, BertModel

from skspin._layout import Segment
from skspin._model.batches import extract
from skspin._model.files import Source
from skspin._model.registry import load_backbone

SIZES = {
    "vocab_size": 30522,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
TEXTS = ["a fine film", "", "two hours of my life", "a fine film", "no " * 30, "well, well"]


def load_tiny(tokenizer, **settings):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**SIZES, **settings})).eval()
    return load_backbone(Source(model, tokenizer=tokenizer))


def segments(n_layers=2, width=8, poolings=("mean", "last")):
    return [
        Segment(None, layer, "hidden", pooling, width)
        for layer in range(n_layers + 1)
        for pooling in poolings
    ]


def rows_of(backbone, texts, wanted=None, **options):
    wanted = segments() if wanted is None else wanted
    rows = np.full((len(texts), sum(s.n_columns for s in wanted)), np.nan, dtype=np.float32)
    for positions, values in extract(backbone, texts, wanted, **options):
        assert np.isnan(rows[positions]).all(), "a text came twice"
        assert values.dtype == np.float32
        rows[positions] = values
    return rows


def expected_row(model, ids):
    """The oracle: one text alone, pooled by hand from transformers' own hidden states."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.cat([part for h in states for part in (h[0].mean(0), h[0, -1])]).numpy()


@contextmanager
def watching(model, see):
    """Call ``see(ids)`` with every batch of token ids that goes into a model."""
    word_embeddings = model.get_input_embeddings()
    handle = word_embeddings.register_forward_pre_hook(lambda module, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()
