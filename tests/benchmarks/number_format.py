"""What a smaller number format changes: predictions on thousands of texts, and how far rows turn.

    python tests/benchmarks/number_format.py --data FOLDER [--sets sst2 ...]
        [--format bfloat16] [--quick] [--json FILE]

FOLDER holds NAME.csv.gz with the columns text, label and split. A test split of some hundred texts
is too small to tell two formats apart, so the pipeline with its defaults is cross-validated in
float32 and in the other one, in five folds, on all texts that are not for testing. Nothing is
chosen. The format is bfloat16, or int8: weights in 8 bits by torchao, products in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from record import write_record
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from splits import load_splits

from skspin import make_spin_pipeline, open_store
from skspin.datasets import demo_model

FORMATS = ("bfloat16", "int8")
SETS = ["sst2", "trec6", "imdb_5k"]
QUICK_TEXTS = 200
LINE = (
    "{set}, {texts:,} texts: {float32:.4f} in float32, {other:.4f} in {format}; right in one "
    "only: {only float32} and {only other}; cosine, least layer: {cosine:.5f}"
)


def settings(number_format):
    """Give a transformer's parameters for a number format."""
    if number_format != "int8":
        return {"dtype": number_format}
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    return {"dtype": "float32", "model_kwargs": {"quantization_config": quantization}}


def predict(splits, number_format):
    """Cross-validate the pipeline's defaults; give predictions, and the activations by layer."""
    open_store("memory").clear()  # the other format's rows take the room of these
    spin = make_spin_pipeline(demo_model(), **settings(number_format))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(spin, splits.texts, splits.y, cv=folds)
    transformer = spin["activations"].fit(splits.texts)
    X = np.asarray(transformer.transform(splits.texts))
    return predicted, [X[:, layer.columns] for layer in transformer.layout_.layers()]


def least_cosine(layers, others):
    """Average cosine between the two formats' rows of a text, in the layer where it is least."""
    cosines = []
    for one, other in zip(layers, others, strict=True):
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)  # (n_texts,)
        cosines.append(float(np.mean((one * other).sum(axis=1) / lengths)))
    return min(cosines)


def measure(splits, number_format):
    """Compare a format with float32 on one set."""
    single, layers = predict(splits, "float32")
    other, others = predict(splits, number_format)
    right, right_in_other = single == splits.y, other == splits.y
    return {
        "set": splits.name,
        "texts": len(splits.y),
        "format": number_format,
        "float32": float(right.mean()),
        "other": float(right_in_other.mean()),
        "points": 100 * float(right_in_other.mean() - right.mean()),
        "only float32": int((right & ~right_in_other).sum()),
        "only other": int((right_in_other & ~right).sum()),
        "cosine": least_cosine(layers, others),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=SETS, help="names of files")
    parser.add_argument("--format", default=FORMATS[0], choices=FORMATS)
    parser.add_argument("--quick", action="store_true", help="few texts")
    parser.add_argument("--json", type=Path, help="where to write rows and machine")
    options = parser.parse_args()
    rows = []
    for name in options.sets:
        splits = load_splits(options.data, name, QUICK_TEXTS if options.quick else None)
        rows.append(measure(splits, options.format))
        print(LINE.format(**rows[-1]), flush=True)
        if options.json:
            write_record(options.json, rows)


if __name__ == "__main__":
    main()
