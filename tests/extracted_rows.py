"""Rows that a tiny model gives through the model's front door, and how else to come by them."""

from contextlib import contextmanager

import numpy as np
import torch

from skspin._layout import Layout, Segment
from skspin._model import Recipe, Source, extract, fingerprint

TEXTS = ["a fine film", "", "two hours of my life", "so it goes", "no " * 30, "well, well"]


def recipe_of(model, tokenizer, **options):
    source = Source(model, tokenizer=tokenizer)
    return Recipe(source, fingerprint(source), **options)


def layout_of(n_layers=2, width=8, poolings=("mean", "last"), stack=None):
    return Layout(
        tuple(
            Segment(stack, layer, "hidden", pooling, width)
            for layer in range(n_layers + 1)
            for pooling in poolings
        )
    )


def rows_of(recipe, texts, layout=None, told=None):
    """Extract rows (n_texts, n_columns); ``told`` gets all that comes beside them."""
    layout = layout_of() if layout is None else layout
    rows = np.full((len(texts), layout.n_columns), np.nan, dtype=np.float32)
    for found in extract(recipe, texts, layout):
        assert np.isnan(rows[found.positions]).all(), "a text came twice"
        assert found.values.dtype == np.float32
        rows[found.positions] = found.values
        if told is not None:
            told.append(found)
    return rows


def expected_row(model, ids, **inputs):
    """The oracle: one text alone, pooled by hand from transformers' own hidden states."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True, **inputs).hidden_states
    return torch.cat([part for h in states for part in (h[0].mean(0), h[0, -1])]).numpy()


@contextmanager
def watching(model, see):
    """Call ``see(ids)`` with every batch of token ids that goes into a model.

    A model is tried once, on ids from the middle of its vocabulary; those are passed over.
    """
    word_embeddings = model.get_input_embeddings()

    def hook(module, args):
        if args[0][0, 0] != module.num_embeddings // 2:
            see(args[0])

    handle = word_embeddings.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
