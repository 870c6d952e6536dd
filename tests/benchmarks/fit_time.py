"""Time of one fit, from texts to classifier: SPIN beside fine-tuning and its authors' recipe.

    python tests/benchmarks/fit_time.py --data FOLDER [--set trec6] [--rounds 2] [--json FILE]

FOLDER holds NAME.csv.gz with the columns text, label and split; its training texts are fitted.
Settings are given and nothing is searched; nothing is stored from one fit to the next. The sides
take turns, and the figure is the median over the rounds of each side's time beside SPIN's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
from fine_tuning import EPOCHS, LEARNING_RATES, train
from paper_recipe import fit
from record import write_record
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skspin import LLMActivationTransformer, make_spin_pipeline
from skspin.datasets import demo_model

RECIPE = {"site": "hidden", "pooling": "mean", "eta": 0.8, "C": 1, "probes' C": [0.2] * 7}


def sides(texts, y):
    """Name every side, with what it does anew at each call."""
    model, n_classes = str(demo_model()), len(np.unique(y))
    plain = {"dtype": "float32", "cache": None}
    last = make_pipeline(
        LLMActivationTransformer(model, layers=-1, **plain),
        StandardScaler(),
        LogisticRegression(max_iter=1000),
    )
    spin = make_spin_pipeline(model, site=("hidden", "mlp"), **plain).set_params(select__cache=None)
    return {
        "SPIN": lambda: spin.fit(texts, y),
        "last layer, logistic regression": lambda: last.fit(texts, y),
        "SPIN by its authors' recipe": lambda: fit(texts, y, model, RECIPE, cache=None),
        f"fine-tuning, {EPOCHS} epochs": lambda: train(
            model, texts, y, n_classes, LEARNING_RATES[-1]
        ),
    }


def measure(name, texts, y, n_rounds):
    """Let the sides take turns, each first in its turn."""
    runs = sides(texts, y)
    names = list(runs)
    seconds = {side: [] for side in runs}
    for turn in range(n_rounds):
        for side in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            runs[side]()
            seconds[side].append(time.perf_counter() - started)
    for side in names:
        ratios = [a / b for a, b in zip(seconds[side], seconds["SPIN"], strict=True)]
        yield {
            "set": name,
            "texts": len(texts),
            "method": side,
            "seconds": median(seconds[side]),
            "beside_spin": median(ratios),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", default="trec6")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few texts, one round")
    parser.add_argument("--json", type=Path, help="where to write rows and machine")
    options = parser.parse_args()
    table = pd.read_csv(options.data / f"{options.set}.csv.gz")
    table = table[table.split == "train"]
    if options.quick:
        table = table.sample(300, random_state=0)
    y = np.unique(table.label, return_inverse=True)[1]
    n_rounds = 1 if options.quick else options.rounds
    rows = list(measure(options.set, table.text.tolist(), y, n_rounds))
    for row in rows:
        print(f"{row['method']:<34}{row['seconds']:>8.1f} s{row['beside_spin']:>8.2f} x SPIN's")
    if options.json:
        write_record(options.json, rows)


if __name__ == "__main__":
    main()
