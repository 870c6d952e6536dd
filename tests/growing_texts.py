"""Pipelines on tiny causal models, and the oracle: the model is fed each prefix's ids by hand."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tiny_models import TINY, byte_tokenizer, tiny_tokenizer

from skspin import make_spin_pipeline

TEXTS = [
    "word1 word2 word3 word4",
    "word4 word5",
    "word7 word8 word9 word5 word1",
    "word10 word11 word3",
    "word2 word2 word12 word6 word13 word14",
    "word20",
] * 2
LABELS = [1, 0, 1, 0, 1, 0] * 2
POOLINGS = ("mean", "max", "first", "last")
POOL = {
    "mean": lambda values: values.mean(0),
    "max": lambda values: values.max(0),
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
}


def without_end(tokenizer):
    """Take the end's token from what a tokenizer adds, as decoders' tokenizers do."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def words():
    return without_end(tiny_tokenizer())


def letters():
    from tokenizers import decoders

    tokenizer = without_end(byte_tokenizer())
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def growing(
    name="llama", tokenizer=None, head=None, labels=LABELS, fit=True, changes=None, **params
):
    """Make a pipeline over a tiny model and fit it, all neurons kept."""
    tokenizer = words() if tokenizer is None else tokenizer
    model = TINY[name].build(**{"vocab_size": len(tokenizer), **(changes or {})})
    params = {"site": "hidden", "pooling": POOLINGS, "dtype": "float32", "cache": None, **params}
    head = LogisticRegression(C=0.1) if head is None else head
    spin = make_spin_pipeline(model, tokenizer=tokenizer, sparsity=0, head=head, **params)
    spin.set_params(select__C=100.0)  # a dozen texts
    return spin.fit(TEXTS, labels) if fit else spin


def rows_by_hand(spin, windows):
    """Pool hidden states as transformers gives them: (ids, pooled) of each window, in float64."""
    transformer = spin["activations"]
    states = []
    for ids, pooled in windows:
        with torch.no_grad():
            found = transformer.model.base_model(
                torch.tensor([list(ids)]), output_hidden_states=True
            ).hidden_states
        states.append([h[0].double().numpy()[list(pooled)] for h in found])
    layers = [np.concatenate(parts) for parts in zip(*states, strict=True)]
    segments = transformer.layout_.segments
    return np.concatenate([POOL[s.pooling](layers[s.layer]) for s in segments])


def scores_by_hand(spin, prefixes, method="decision_function"):
    """Score prefixes, each a list of windows, by all that comes behind the activations."""
    rows = np.stack([rows_by_hand(spin, windows) for windows in prefixes]).astype(np.float32)
    return np.asarray(getattr(spin[1:], method)(rows)).reshape(len(rows), -1)


def cut(ids, head=0, pooled_from=0):
    """List the prefixes of ids behind a head, each as one window."""
    return [[(ids[:end], range(pooled_from, end))] for end in range(head + 1, len(ids) + 1)]
