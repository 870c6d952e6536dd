"""Test accuracy of SPIN and of what it has to beat, on the same splits.

    python tests/benchmarks/accuracy.py --data FOLDER [--sets sst2 trec6] [--rst docs/accuracy.rst]

FOLDER holds NAME.csv.gz with the columns text, label and split. Hyper-parameters of every method
are chosen by accuracy on the validation split, or, where a set has none, on a fifth of its training
texts; then the method is fitted once more on training and validation texts together. The test split
is used once, for the figures printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
import torch
import transformers
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import skspin
from skspin import LLMActivationTransformer, make_spin_pipeline
from skspin.datasets import demo_model


def load(folder, name):
    """Read a set: texts and labels to learn from, the fold of each, texts and labels to test."""
    table = pd.read_csv(folder / f"{name}.csv.gz")
    test = table[table.split == "test"]
    rest = table[table.split != "test"]
    held_out = (rest.split == "validation").to_numpy(copy=True)
    if not held_out.any():
        rows = np.arange(len(rest))
        validation = train_test_split(rows, test_size=0.2, stratify=rest.label, random_state=0)[1]
        held_out[validation] = True
    folds = PredefinedSplit(np.where(held_out, 0, -1))
    return rest.text.tolist(), rest.label.to_numpy(), folds, test.text.tolist(), test.label


def methods(model):
    """Name every method, with the grid its hyper-parameters are chosen from."""
    tfidf = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(max_iter=1000)
    )
    strengths = [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0]
    yield "TF-IDF, logistic regression", tfidf, {"logisticregression__C": [0.3, 1, 3, 10, 30, 100]}
    for name, layers in [("last layer", -1), ("all layers", None)]:
        plain = make_pipeline(
            LLMActivationTransformer(model, layers=layers),
            StandardScaler(),
            LogisticRegression(max_iter=1000),
        )
        yield f"{name}, logistic regression", plain, {"logisticregression__C": strengths}
    spin = make_spin_pipeline(model, site=("hidden", "mlp"), pooling=("mean", "max"))
    grid = {
        "select__sparsity": [0.05, 0.1, 0.2, 0.4],
        "classify__C": [3e-4, 1e-3, 3e-3, 0.01, 0.03],
    }
    yield "SPIN, hidden states and mlp neurons", spin, grid


def measure(folder, name, model):
    """Search, refit and test every method on one set."""
    texts, y, folds, test, y_test = load(folder, name)
    for method, pipeline, grid in methods(model):
        started = time.perf_counter()
        search = GridSearchCV(pipeline, grid, cv=folds).fit(texts, y)
        yield {
            "set": name,
            "method": method,
            "validation": search.best_score_,
            "test": search.score(test, y_test),
            "columns": search.best_estimator_[-1].n_features_in_,
            "seconds": time.perf_counter() - started,
            "chosen": search.best_params_,
        }


def as_rst(rows):
    """Write the rows as a table for the documentation."""
    lines = [
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * - data set\n     - method\n     - columns\n     - validation\n     - test",
    ]
    for row in rows:
        lines.append(
            f"   * - {row['set']}\n     - {row['method']}\n     - {row['columns']:,}\n"
            f"     - {row['validation']:.3f}\n     - {row['test']:.3f}"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["sst2", "trec6"])
    parser.add_argument("--model", default=str(demo_model()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rst", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*max_length")

    rows = []
    print(f"{'set':<8}{'method':<38}{'columns':>8}{'valid.':>8}{'test':>8}{'s':>7}  chosen")
    for name in options.sets:
        for row in measure(options.data, name, options.model):
            rows.append(row)
            chosen = ", ".join(f"{k.split('__')[1]}={v:g}" for k, v in row["chosen"].items())
            print(
                f"{row['set']:<8}{row['method']:<38}{row['columns']:>8}{row['validation']:>8.3f}"
                f"{row['test']:>8.3f}{row['seconds']:>7.0f}  {chosen}",
                flush=True,
            )
    if options.rst:
        options.rst.write_text(as_rst(rows))
    if options.json:
        versions = {m.__name__: m.__version__ for m in (skspin, sklearn, torch, transformers)}
        machine = {"processor": platform.processor() or platform.machine(), "versions": versions}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
