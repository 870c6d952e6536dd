"""A tiny BERT with random weights: in memory, in a folder, in a cache of the hub."""

import shutil

import torch
from transformers import BertConfig, BertModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {
    "vocab_size": 30522,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZES | settings)).eval()


def save(folder, *parts):
    """Write a model or a tokenizer, or both, and return the folder."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def as_hub_cache(cache, folder):
    """Lay a folder out as the hub's client does with the model org/tiny."""
    repository = cache / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return str(cache)
