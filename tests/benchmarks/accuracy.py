"""Test accuracy of SPIN and of what it has to beat, on the same splits.

    python tests/benchmarks/accuracy.py --data FOLDER [--sets sst2 trec6] [--methods spin tfidf]

FOLDER holds NAME.csv.gz with the columns text, label and split. Hyper-parameters of every method
are chosen by accuracy on the validation split, or, where a set has none, on a fifth of its training
texts; then the method is fitted once more on training and validation texts together. The test split
is used once, for the figures printed.
"""

from __future__ import annotations

import argparse
import warnings
from importlib.util import find_spec
from pathlib import Path

from fine_tuning import measure_fine_tuning
from language_model import measure_language_model
from paper_recipe import measure_paper_recipe
from record import write_record
from sklearn.ensemble import VotingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from splits import load_splits

from skspin import LLMActivationTransformer, make_spin_pipeline, open_store
from skspin.datasets import demo_llm, demo_model

STRENGTHS = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0]


SPIN_GRID = {
    "select__sparsity": [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6],
    "classify__C": STRENGTHS[:-1],
}
WINDOWS = [128, 256, 512]  # tokens, special ones included


def search(splits, method, pipeline, grid, texts=None, test=None):
    """Choose, refit and test one pipeline; return it with its row of the table."""
    found = GridSearchCV(pipeline, grid, cv=splits.folds)
    found.fit(splits.texts if texts is None else texts, splits.y)
    best = found.best_estimator_
    return best, {
        "set": splits.name,
        "method": method,
        "columns": sum(p[-1].n_features_in_ for p in getattr(best, "estimators_", [best])),
        "validation": found.best_score_,
        "test": best.score(splits.test if test is None else test, splits.y_test),
        "chosen": {name.split("__")[1]: value for name, value in found.best_params_.items()},
    }


def logistic_regression():
    return LogisticRegression(max_iter=1000)


def search_tfidf(splits):
    tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    grid = {"logisticregression__C": [0.3, 1, 3, 10, 30, 100, 300, 1000]}
    pipeline = make_pipeline(tfidf, logistic_regression())
    return search(splits, "TF-IDF, logistic regression", pipeline, grid)


def measure_tfidf(splits, model):
    yield search_tfidf(splits)[1]


def measure_hidden(splits, model, method, layers):
    transformer = LLMActivationTransformer(model, layers=layers, dtype="float32")
    pipeline = make_pipeline(transformer, StandardScaler(), logistic_regression())
    yield search(splits, method, pipeline, {"logisticregression__C": STRENGTHS})[1]


def measure_last_layer(splits, model):
    return measure_hidden(splits, model, "last layer, logistic regression", -1)


def measure_all_layers(splits, model):
    return measure_hidden(splits, model, "all layers, logistic regression", None)


def measure_sentence_transformers(splits, model):
    from sentence_transformers import SentenceTransformer

    encode = SentenceTransformer(str(model), device="cpu").encode
    X, X_test = (encode(texts, show_progress_bar=False) for texts in (splits.texts, splits.test))
    pipeline = make_pipeline(StandardScaler(), logistic_regression())
    grid = {"logisticregression__C": STRENGTHS}
    method = "sentence-transformers, logistic regression"
    yield search(splits, method, pipeline, grid, X, X_test)[1]


def spin_pipeline(model, **params):
    return make_spin_pipeline(
        model, site=("hidden", "mlp"), pooling=("mean", "max"), dtype="float32", **params
    )


def measure_spin(splits, model):
    """Measure SPIN, and with the settings chosen then once more in bfloat16."""
    spin, grid = spin_pipeline(model), SPIN_GRID
    best, row = search(splits, "SPIN, hidden states and mlp neurons", spin, grid)
    yield row

    open_store("memory").clear()  # bfloat16 needs the room
    settings = {name: [best.get_params()[name]] for name in grid}
    half = spin.set_params(activations__dtype="bfloat16")
    yield search(splits, "the same in bfloat16", half, settings)[1]


def measure_long_texts(splits, model):
    """Cut off long texts, read them in windows, and ask TF-IDF, too.

    The vote is that of the pipeline with the best validation score and of TF-IDF.
    """
    ways = [("truncate", 512), *(("windows", length) for length in WINDOWS)]
    found = []
    for how, max_length in ways:
        spin = spin_pipeline(model, long_texts=how, max_length=max_length)
        found.append(search(splits, f"SPIN, {how}, {max_length} tokens", spin, SPIN_GRID))
        yield found[-1][1]
        open_store("memory").clear()  # the next needs the room
    spin = max(found, key=lambda result: result[1]["validation"])[0]
    tfidf, row = search_tfidf(splits)
    yield row
    vote = VotingClassifier([("spin", spin), ("tfidf", tfidf)], voting="soft")
    yield search(splits, "soft vote of the best SPIN and TF-IDF", vote, {})[1]


METHODS = {
    "tfidf": measure_tfidf,
    "last": measure_last_layer,
    "all": measure_all_layers,
    "sentences": measure_sentence_transformers,
    "spin": measure_spin,
    "paper": measure_paper_recipe,
    "fine-tuning": measure_fine_tuning,
    "llm": measure_language_model,
    "long": measure_long_texts,
}
QUICK_TEXTS = 200  # to learn from, and as many to test


def as_line(row):
    chosen = ", ".join(
        f"{name}={value if isinstance(value, str) else format(value, 'g')}"
        for name, value in row["chosen"].items()
    )
    return (
        f"{row['set']:<11}{row['method']:<44}{row['columns']:>8}{row['validation']:>8.3f}"
        f"{row['test']:>8.3f}  {chosen}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["sst2"], help="names of files")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="few texts")
    parser.add_argument("--model", default=str(demo_model()))
    parser.add_argument("--llm", help="model of the method llm; the demo LLM if it is not given")
    parser.add_argument("--texts", type=int, help="how many to learn from; all if it is not given")
    parser.add_argument("--json", type=Path, help="where to write rows and machine")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*max_length")
    rows = []
    print(f"{'set':<11}{'method':<44}{'columns':>8}{'valid.':>8}{'test':>8}  chosen")
    for name in options.sets:
        splits = load_splits(options.data, name, QUICK_TEXTS if options.quick else None)
        if options.texts:
            splits = splits.fewer(options.texts)
        for method in options.methods:
            if method == "sentences" and not find_spec("sentence_transformers"):
                print(f"{name:<11}sentence-transformers is not installed")
                continue
            model = (options.llm or demo_llm()) if method == "llm" else options.model
            for row in METHODS[method](splits, model):
                rows.append(row)
                print(as_line(row), flush=True)
                if options.json:  # at every row: the next method may take an hour
                    write_record(options.json, rows)


if __name__ == "__main__":
    main()
