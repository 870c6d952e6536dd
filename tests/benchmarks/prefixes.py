"""Scores of all prefixes beside one pass, and the time of a token in a text that grows.

    python tests/benchmarks/prefixes.py [--rounds 7] [--quick] [--json FILE]

All prefixes of a text of 512 tokens are scored by ``score_prefixes``, by turns with the model's
bare forward pass over the same tokens and with the pipeline's own decision on the whole text; to be
at most 1.2 times as long. Then two ``PrefixScorer`` take turns, one token each, on a model with
2,048 positions: one at the text's beginning, one at its end. Pipelines are pruned, and have a
linear head for five classes. The models are a random one and, without ``--quick``,
``demo_llm()`` in float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import write_record
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from skspin import PrefixScorer, make_spin_pipeline, prune, score_prefixes
from skspin._model import Source
from skspin._model.registry import load_backbone
from skspin.datasets import demo_llm, demo_model, load_docstrings

N_TOKENS, N_GROWING, STRETCH = 512, 2046, 128  # and the tokenizer's two special ones


def save_random(folder):
    """Make a model that has learnt nothing, with 2,048 positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    LlamaModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(folder)
    return folder


def fit(path, **settings):
    """Fit a pipeline on docstrings, and prune it."""
    docstrings = load_docstrings(n_per_class=12)
    pipeline = make_spin_pipeline(
        path, max_length=2048, pool_over="text", dtype="float32", cache=None
    )
    pipeline.set_params(**settings)
    return prune(pipeline.fit(docstrings.data, docstrings.target))


def long_text(tokenizer, n_tokens):
    """Join docstrings to a text of so many tokens; also give their ids."""
    text = " ".join(load_docstrings(n_per_class=100).data)
    found = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=True,
        max_length=n_tokens,
    )  # fmt: skip
    assert len(found["input_ids"]) == n_tokens
    return text[: found["offset_mapping"][-1][1]], found["input_ids"]


def take_turns(tasks, rounds):
    """Time each task once a round, (n_rounds,) seconds by name, after a round that warms up."""
    times = {name: [] for name in tasks}
    for _ in range(rounds + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - started)
    return {name: np.array(values[1:]) for name, values in times.items()}


def figure(model, what, reference, milliseconds, ratios, most):
    """Describe a figure: the median of the rounds, the least and the most."""
    return {
        "model": model,
        "what": what,
        "reference": reference,
        "milliseconds": float(milliseconds),
        "median": float(np.median(ratios)),
        "spread": f"{ratios.min():.2f} .. {ratios.max():.2f}",
        "goal": f"at most {most}",
        "reached": "yes" if np.median(ratios) <= most else "no",
    }


def measure_prefixes(name, pipeline, model, tokenizer, rounds):
    """Compare all prefixes with one pass."""
    text, ids = long_text(tokenizer, N_TOKENS)
    ids = torch.tensor([ids])
    bare = model.base_model

    def one_pass():
        with torch.no_grad():
            bare(ids, use_cache=False)

    times = take_turns(
        {
            "bare": one_pass,
            "decision": lambda: pipeline.decision_function([text]),
            "prefixes": lambda: score_prefixes(pipeline, [text]),
        },
        rounds,
    )
    n_columns = pipeline["activations"].layout_.n_columns
    what = f"all prefixes of {N_TOKENS} tokens, {n_columns:,} columns"
    milliseconds = 1000 * np.median(times["prefixes"])
    for side, reference in {"bare": "bare forward pass", "decision": "decision_function"}.items():
        ratios = times["prefixes"] / times[side]
        yield figure(name, what, reference, milliseconds, ratios, 1.2)


def measure_growing(name, pipeline, tokenizer, rounds):
    """Compare a token at the end of a long text with one at its beginning."""
    _, ids = long_text(tokenizer, N_GROWING)
    ratios, late_times = [], []
    for _ in range(rounds):
        early, late = PrefixScorer(pipeline), PrefixScorer(pipeline)
        late.push(ids[:-STRETCH])
        tasks = {"early": pusher(early, ids[:STRETCH]), "late": pusher(late, ids[-STRETCH:])}
        times = take_turns(tasks, STRETCH - 1)
        ratios.append(np.median(times["late"]) / np.median(times["early"]))
        late_times.append(np.median(times["late"]))
    what = f"a token after {N_GROWING - STRETCH:,} others, read one by one"
    milliseconds = 1000 * np.median(late_times)
    yield figure(name, what, "a token at the beginning", milliseconds, np.array(ratios), 1.5)


def pusher(scorer, ids):
    """Make a task that pushes one of some tokens at a time."""
    coming = iter(ids)
    return lambda: scorer.push(next(coming))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a random model only, three rounds")
    parser.add_argument("--json", type=Path, help="where to write figures and machine")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"random, 8 blocks of 256": save_random(folder)}
        if not options.quick:
            models["SmolLM2-135M"] = demo_llm()
        for name, path in models.items():
            loaded = load_backbone(Source(path), "cpu", "float32")
            # Few columns, and as many as a fit on thousands of texts leaves.
            pipelines = [fit(path), fit(path, select__C=100.0, select__sparsity=0.0)]
            found = [
                *measure_prefixes(name, pipelines[0], loaded.model, loaded.tokenizer, rounds),
                *measure_prefixes(name, pipelines[1], loaded.model, loaded.tokenizer, rounds),
                *measure_growing(name, pipelines[0], loaded.tokenizer, max(1, rounds // 2)),
            ]
            for row in found:
                print(row, flush=True)
            rows += found
    if options.json:
        write_record(options.json, rows)


if __name__ == "__main__":
    main()
