"""A real decoder, read by layer: the last layer, the best layer, all layers, and SPIN.

With a prompt that asks about each text and without one. All that is compared comes out of one pass
through the model for each of the two. Hyper-parameters, the layer and the pooling among them, are
chosen by accuracy on the validation texts.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skspin import LLMActivationTransformer, SalientNeuronSelector, open_store

PROMPTS = {
    "sst2": "Review: {text}\nIs this review positive or negative? It is",
    "trec6": "Question: {text}\nIs the answer a person, a place, a number, a thing, a description "
    "or an abbreviation? It is",
}
POOLINGS = ("mean", "last")
STRENGTHS = [1e-4, 1e-3, 0.01, 0.1]
SPARSITIES = [0.0, 0.1, 0.3, 0.6]


def read(transformer, texts):
    """Give the activations by layer, site and pooling: each of shape (n_texts, n_neurons)."""
    X = np.asarray(transformer.transform(texts))
    segments = transformer.layout_.segments
    return {
        (s.layer, s.site, s.pooling): X[:, columns]
        for s, columns in zip(segments, transformer.layout_.slices, strict=True)
    }


def choose(splits, X, X_test, pipeline, grid):
    found = GridSearchCV(pipeline, grid, cv=splits.folds).fit(X, splits.y)
    best = found.best_estimator_
    return found.best_score_, best.score(X_test, splits.y_test), best, found.best_params_


def measure_language_model(splits, model):
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    strengths = {"logisticregression__C": STRENGTHS}
    for prompt in (None, PROMPTS.get(splits.name)):
        transformer = LLMActivationTransformer(
            model, site=("hidden", "mlp"), pooling=POOLINGS, prompt=prompt,
            cache=None,
        ).fit(splits.texts)  # fmt: skip
        train, test = read(transformer, splits.texts), read(transformer, splits.test)
        how = "with a prompt: " if prompt else ""

        def row(method, n_columns, validation, score, chosen, how=how):
            return {
                "set": splits.name,
                "method": f"{how}{method}",
                "columns": n_columns,
                "validation": validation,
                "test": score,
                "chosen": {name.split("__")[-1]: value for name, value in chosen.items()},
            }

        single = {}
        for layer in range(transformer.n_layers_ + 1):
            for pooling in POOLINGS:
                place = layer, "hidden", pooling
                found = choose(splits, train[place], test[place], head, strengths)
                single[layer, pooling] = found[0], found[1], found[3]
        width = train[0, "hidden", "last"].shape[1]
        yield row("last layer, last token", width, *single[transformer.n_layers_, "last"])
        (layer, pooling), found = max(single.items(), key=lambda item: item[1][0])
        chosen = {"layer": layer, "pooling": pooling, **found[2]}
        yield row("best layer", width, *found[:2], chosen)
        for pooling in POOLINGS:
            everything = [p for p in train if p[1] == "hidden" and p[2] == pooling]
            X, X_test = (np.hstack([half[p] for p in everything]) for half in (train, test))
            score, tested, _, params = choose(splits, X, X_test, head, strengths)
            yield row(f"all layers, {pooling}", X.shape[1], score, tested, params)
        for site in ("hidden", "mlp"):
            for pooling in POOLINGS:
                layers = [p for p in train if p[1] == site and p[2] == pooling]
                X, X_test = (np.hstack([half[p] for p in layers]) for half in (train, test))
                sizes = [train[p].shape[1] for p in layers]
                spin = make_pipeline(
                    SalientNeuronSelector(layer_sizes=sizes), *[part for _, part in head.steps]
                )
                grid = {"salientneuronselector__sparsity": SPARSITIES, **strengths}
                score, tested, best, params = choose(splits, X, X_test, spin, grid)
                n_columns = best[-1].n_features_in_
                yield row(f"SPIN, {site}, {pooling}", n_columns, score, tested, params)
        open_store("memory").clear()
