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
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import sklearn
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

import skspin
from skspin import make_spin_pipeline, open_store
from skspin._kept_probes import forget_probes
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
    forget_probes()
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
    after = extraction(texts)
    once = (before + after) / 2
    return {
        "texts": len(texts),
        "extraction, s": once,
        "extraction before and after, s": [before, after],
        "search, s": took,
        "heads' own fits, s": heads,
        "all but the heads' fits, in extractions": (took - heads) / once,
        "goal, at most": MOST_EXTRACTIONS,
    }


def measure_speed_up(texts, y):
    """Compare the same search with and without what is kept."""
    took, heads, scores = search(texts, y, "memory")
    took_without, heads_without, scores_without = search(texts, y, None)
    return {
        "texts": len(texts),
        "search, s": took,
        "heads' own fits, s": heads,
        "search without cache, s": took_without,
        "heads' own fits without cache, s": heads_without,
        "times as fast": took_without / took,
        "goal, at least": LEAST_SPEED_UP,
        "largest difference of scores": float(np.abs(scores - scores_without).max()),
    }


def describe_machine():
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next(
            (line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line),
            cpu,
        )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "skspin": skspin.__version__,
    }


def show(title, figures):
    print(f"\n{title}", flush=True)
    for name, value in figures.items():
        values = value if isinstance(value, list) else [value]
        print(f"  {name:42} {' '.join(f'{v:10.4g}' for v in values)}")


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
    machine = describe_machine()
    texts, y = read(options.data, n_texts)
    extraction(texts[:64])  # loads the model
    figures = {"overhead": measure_overhead(texts, y)}
    show(f"{len(SPARSITIES)} sparsities x {N_FOLDS} folds and a refit", figures["overhead"])
    if n_without:
        figures["speed-up"] = measure_speed_up(texts[:n_without], y[:n_without])
        show("The same search on fewer texts, with and without a cache", figures["speed-up"])
    if options.json:
        options.json.write_text(json.dumps({"measured_on": machine, **figures}, indent=1))


if __name__ == "__main__":
    main()
