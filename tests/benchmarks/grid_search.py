"""A grid search beside one extraction, and beside the same search with nothing kept.

    python tests/benchmarks/grid_search.py --data FOLDER [--quick] [--json FILE]
        [--texts N] [--texts-without-cache N]

FOLDER holds sst2.csv.gz with the columns text, label and split. The search goes over ten sparsities
in five folds, on the training texts, with the demo model in float32.

Without a cache each of its 51 fits and 50 scorings runs the model and every probe again. That is
long, so it is measured on fewer texts, beside the search with a cache on the same fewer texts;
nothing is extrapolated. What the heads' own fits took is measured inside the very searches.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
from record import write_record
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from skspin import make_spin_pipeline, open_store
from skspin._probes import probe_cache
from skspin.datasets import demo_model

SPARSITIES = np.linspace(0, 0.9, 10).tolist()
N_FOLDS = 5
N_TEXTS, QUICK_TEXTS = 4000, 400
N_WITHOUT_CACHE, QUICK_WITHOUT_CACHE = 200, 40
MOST_EXTRACTIONS = 1.5
LEAST_SPEED_UP = 10


class TimedHead(LogisticRegression):
    """The pipeline's own head, with a clock."""

    seconds = 0.0

    def fit(self, X, y, sample_weight=None):
        started = time.perf_counter()
        super().fit(X, y, sample_weight)
        TimedHead.seconds += time.perf_counter() - started
        return self


def read(folder, n_texts):
    """Read the first training texts and their labels."""
    table = pd.read_csv(folder / "sst2.csv.gz")
    table = table[table.split == "train"].head(n_texts)
    return table.text.tolist(), table.label.to_numpy()


def pipeline(cache):
    """Make the pipeline with its defaults, all that it keeps switched on or off."""
    plain = make_spin_pipeline(demo_model())["classify"]
    head = TimedHead(**plain.get_params())
    spin = make_spin_pipeline(demo_model(), head=head, dtype="float32", cache=cache)
    return spin.set_params(select__cache=cache)


def search(texts, y, cache):
    """Time a search that begins with nothing; return seconds, the heads' own, and the scores."""
    open_store().clear()
    probe_cache.clear()
    TimedHead.seconds = 0.0
    grid = GridSearchCV(pipeline(cache), {"select__sparsity": SPARSITIES}, cv=N_FOLDS)
    started = time.perf_counter()
    grid.fit(texts, y)
    took = time.perf_counter() - started
    return took, TimedHead.seconds, grid.cv_results_["mean_test_score"]


def extraction(texts):
    """Time one plain pass."""
    transformer = pipeline(None)["activations"].fit(texts)
    started = time.perf_counter()
    transformer.transform(texts)
    return time.perf_counter() - started


def measure_overhead(texts, y):
    """Compare a search with one extraction, timed before and after it."""
    before = extraction(texts)
    took, heads, _ = search(texts, y, "memory")
    once = (before + extraction(texts)) / 2
    return {
        "what": "all but the heads' fits, in extractions",
        "texts": len(texts),
        "search, s": took,
        "heads, s": heads,
        "beside": "one extraction",
        "beside, s": once,
        "value": (took - heads) / once,
        "goal": f"<= {MOST_EXTRACTIONS}",
    }


def measure_speed_up(texts, y):
    """Compare the same search with and without what is kept."""
    took, heads, scores = search(texts, y, "memory")
    took_without, _, scores_without = search(texts, y, None)
    return {
        "what": "times as fast",
        "texts": len(texts),
        "search, s": took,
        "heads, s": heads,
        "beside": "the same without a cache",
        "beside, s": took_without,
        "value": took_without / took,
        "goal": f">= {LEAST_SPEED_UP}",
        "largest difference of scores": float(np.abs(scores - scores_without).max()),
    }


def show(row):
    print(
        f"{row['texts']:5,} texts: search {row['search, s']:.1f} s, heads' own fits "
        f"{row['heads, s']:.1f} s, {row['beside']} {row['beside, s']:.1f} s; {row['what']} "
        f"{row['value']:.2f} (goal {row['goal']})",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few texts")
    parser.add_argument("--texts", type=int, help="texts of the search with a cache")
    parser.add_argument("--texts-without-cache", type=int, help="texts of the search without; or 0")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    n_texts = options.texts or (QUICK_TEXTS if options.quick else N_TEXTS)
    n_without = options.texts_without_cache
    if n_without is None:
        n_without = QUICK_WITHOUT_CACHE if options.quick else N_WITHOUT_CACHE
    texts, y = read(options.data, n_texts)
    extraction(texts[:64])  # loads the model
    rows = [measure_overhead(texts, y)]
    show(rows[-1])
    if n_without:
        rows.append(measure_speed_up(texts[:n_without], y[:n_without]))
        show(rows[-1])
    if options.json:
        write_record(options.json, rows)


if __name__ == "__main__":
    main()
