"""Time and predictions of pruned pipelines beside those of the whole ones.

    python tests/benchmarks/prune.py --data FOLDER [--layers 2 4 6] [--repeats 5] [--texts 1821]

FOLDER holds sst2.csv.gz with the columns text, label and split. Nothing is stored, so each
prediction is a pass through the model. The two pipelines take turns; the figure is the ratio of
their median times, to be at most the share of layers in use plus 0.1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

from skspin import make_spin_pipeline, prune
from skspin.datasets import demo_model


def fit(table, deepest, n_train):
    """Fit on some training texts, with all layers computed and the first ones selected from."""
    train = table[table.split == "train"].sample(n_train, random_state=0)
    pipeline = make_spin_pipeline(demo_model(), site=("hidden", "mlp"), dtype="float32")
    pipeline.set_params(select__max_layer=deepest)
    return pipeline.fit(train.text.tolist(), train.label)


def seconds(pipeline, texts):
    """Time one pass."""
    started = time.perf_counter()
    pipeline.predict(texts)
    return time.perf_counter() - started


def measure(table, deepest, repeats, n_train, n_test):
    """Compare one pipeline with its pruned self."""
    whole = fit(table, deepest, n_train)
    pruned = prune(whole)
    texts = table[table.split == "test"].text.tolist()[:n_test]
    for pipeline in (whole, pruned):
        pipeline.set_params(activations__cache=None)
    decisions = [pipeline.decision_function(texts) for pipeline in (whole, pruned)]
    times = np.array([[seconds(p, texts) for p in (whole, pruned)] for _ in range(repeats)])
    before, after = np.median(times, axis=0)
    layout = pruned["activations"].layout_
    share = max(s.layer for s in layout.segments) / whole["activations"].n_layers_
    return {
        "deepest layer / layers": round(share, 3),
        "columns": layout.n_columns,
        "whole, s": round(before, 2),
        "pruned, s": round(after, 2),
        "ratio": round(after / before, 3),
        "allowed": round(share + 0.1, 3),
        "labels differ": int(((decisions[0] > 0) != (decisions[1] > 0)).sum()),
        "largest difference": float(np.abs(decisions[0] - decisions[1]).max()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", type=int, default=1000, help="texts to fit on")
    parser.add_argument("--texts", type=int, default=None, help="texts of the test split; all")
    options = parser.parse_args()
    table = pd.read_csv(options.data / "sst2.csv.gz")
    rows = [
        measure(table, deepest, options.repeats, options.train, options.texts)
        for deepest in options.layers
    ]
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
