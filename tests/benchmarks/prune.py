"""Time and predictions of pruned pipelines beside those of the whole ones.

    python tests/benchmarks/prune.py --data FOLDER [--layers 2 4 6] [--repeats 5] [--json FILE]

FOLDER holds sst2.csv.gz with the columns text, label and split. Nothing is stored, so each
prediction is a pass through the model. The two pipelines take turns; the figure is the ratio of
their times in one turn, median (least to most), to be at most the share of layers in use plus 0.1.
Decision values are compared twice: in the same batches, and with the pruned pipeline's batches much
smaller, so that other texts and other padding are beside each text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from record import write_record

from skspin import make_spin_pipeline, prune
from skspin.datasets import demo_model

SMALL_BATCH = 512  # tokens


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


def difference(one, other):
    """Compare decision values: the largest relative difference, small values as typical ones."""
    size = np.maximum(np.abs(one), np.median(np.abs(one)))
    return float((np.abs(one - other) / size).max())


def measure(table, deepest, repeats, n_train, n_test):
    """Compare one pipeline with its pruned self."""
    whole = fit(table, deepest, n_train)
    pruned = prune(whole)
    texts = table[table.split == "test"].text.tolist()[:n_test]
    for pipeline in (whole, pruned):
        pipeline.set_params(activations__cache=None)
    decisions = [pipeline.decision_function(texts) for pipeline in (whole, pruned)]
    pruned.set_params(activations__batch_tokens=SMALL_BATCH)
    decisions.append(pruned.decision_function(texts))
    pruned.set_params(activations__batch_tokens="auto")
    times = np.array([[seconds(p, texts) for p in (whole, pruned)] for _ in range(repeats)])
    ratios = times[:, 1] / times[:, 0]
    layout = pruned["activations"].layout_
    n_layers = whole["activations"].n_layers_
    in_use = max(segment.layer for segment in layout.segments)
    return {
        "layers in use": in_use,
        "layers": n_layers,
        "columns": layout.n_columns,
        "columns before": whole["activations"].layout_.n_columns,
        "texts": len(texts),
        "whole, s": np.median(times[:, 0]),
        "pruned, s": np.median(times[:, 1]),
        "ratio": np.median(ratios),
        "least": ratios.min(),
        "most": ratios.max(),
        "allowed": in_use / n_layers + 0.1,
        "labels differ": int(((decisions[0] > 0) != (decisions[1] > 0)).sum()),
        "difference": difference(decisions[0], decisions[1]),
        "labels differ, other batches": int(((decisions[0] > 0) != (decisions[2] > 0)).sum()),
        "difference, other batches": difference(decisions[0], decisions[2]),
    }


def print_table(rows):
    """Print what matters most of each row."""
    print(
        f"{'layers':<9}{'columns':<17}{'whole, s':>9}{'pruned, s':>10}"
        f"{'ratio':>8}{'(least to most)':>17}{'allowed':>9}   labels and decision values"
    )
    for row in rows:
        print(
            f"{row['layers in use']} of {row['layers']:<4}"
            f"{row['columns']:>6,} of {row['columns before']:<7,}"
            f"{row['whole, s']:>9.2f}{row['pruned, s']:>10.2f}{row['ratio']:>8.2f}"
            f"{row['least']:>9.2f} to {row['most']:.2f}{row['allowed']:>9.2f}"
            f"   {row['labels differ']} labels, {row['difference']:.1e}; in other batches"
            f" {row['labels differ, other batches']}, {row['difference, other batches']:.1e}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", type=int, default=1000, help="texts to fit on")
    parser.add_argument("--texts", type=int, default=None, help="texts of the test split; all")
    parser.add_argument("--json", type=Path, help="where to write figures and machine")
    options = parser.parse_args()
    table = pd.read_csv(options.data / "sst2.csv.gz")
    rows = [
        measure(table, deepest, options.repeats, options.train, options.texts)
        for deepest in options.layers
    ]
    print_table(rows)
    if options.json:
        write_record(options.json, rows)


if __name__ == "__main__":
    main()
