"""SPIN as its authors' scripts do it, with scikit-learn's estimators alone, as a baseline.

Probes and head are L1-penalised one-versus-rest logistic regressions on columns as they are, by
saga, stopped after 64 passes over the texts, converged or not. Site, pooling, the number of first
layers, the share eta of the salience that is kept and each ``C`` are chosen by validation accuracy.

Two cuts bound the cost: the first third, two thirds and all of the layers are tried instead of
every number of them, and the head's ``C`` is chosen after the rest, which is chosen at ``C=1``.
"""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from skspin import LLMActivationTransformer

STRENGTHS = (0.1, 0.2, 1, 10, 100)
SHARES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
SITES = ("hidden", "mlp")
POOLINGS = ("mean", "max")
PASSES = 64


def fit_saga(X, y, C):
    """Fit one of the recipe's classifiers."""
    saga = LogisticRegression(l1_ratio=1, C=C, solver="saga", max_iter=PASSES, random_state=42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return OneVsRestClassifier(saga).fit(X, y)


def salience(probe):
    """Square the weights, and sum them over classes."""
    return sum(np.square(one.coef_[0]) for one in probe.estimators_)  # (n_columns,)


def most_salient(values, share):
    """Take columns, the most salient first, until they hold this share of all salience."""
    order = np.argsort(-values, kind="stable")
    held = np.cumsum(values[order])
    return order[: np.searchsorted(held, share * held[-1]) + 1]


def layers_of(model, texts, site, pooling, cache="memory"):
    """Compute activations, layer by layer."""
    transformer = LLMActivationTransformer(
        model, site=site, pooling=pooling, dtype="float32", cache=cache
    )
    X = np.asarray(transformer.fit_transform(texts))
    return [X[:, layer.columns] for layer in transformer.layout_.layers()]


def best_probe(X, y, train, valid):
    """Choose one layer's C, and give the probe's salience with it."""
    probes = {C: fit_saga(X[train], y[train], C) for C in STRENGTHS}
    best = max(STRENGTHS, key=lambda C: probes[C].score(X[valid], y[valid]))
    return best, salience(probes[best])


def choose(splits, model):
    """Choose everything on validation texts; return the settings and their accuracy there."""
    train, valid = np.flatnonzero(~splits.validation), np.flatnonzero(splits.validation)
    y, best = splits.y, (-1.0,)

    def score(X, C):
        return fit_saga(X[train], y[train], C).score(X[valid], y[valid])

    for site, pooling in product(SITES, POOLINGS):
        layers = layers_of(model, splits.texts, site, pooling)
        probes = [best_probe(X, y, train, valid) for X in layers]
        for share, thirds in product(SHARES, (1, 2, 3)):
            first = round(len(layers) * thirds / 3)
            X = join(layers, [values for _, values in probes[:first]], share)
            accuracy = score(X, 1)
            if accuracy > best[0]:
                strengths = [C for C, _ in probes[:first]]
                settings = {"site": site, "pooling": pooling, "eta": share, "layers": first}
                best = accuracy, settings, strengths, X
    accuracy, settings, strengths, X = best
    scores = {1: accuracy} | {C: score(X, C) for C in STRENGTHS if C != 1}
    C = max(scores, key=scores.get)
    return settings | {"C": C, "probes' C": strengths}, scores[C]


def join(layers, saliences, share):
    """Put the most salient columns of as many layers as have been probed side by side."""
    kept = [X[:, most_salient(v, share)] for X, v in zip(layers, saliences, strict=False)]
    return np.concatenate(kept, axis=1)


def fit(texts, y, model, settings, cache="memory"):
    """Fit with settings chosen already; return the head, and each layer's salience."""
    layers = layers_of(model, texts, settings["site"], settings["pooling"], cache)
    strengths = settings["probes' C"]  # of the first layers only
    probes = [fit_saga(X, y, C) for X, C in zip(layers, strengths, strict=False)]
    saliences = [salience(probe) for probe in probes]
    return fit_saga(join(layers, saliences, settings["eta"]), y, settings["C"]), saliences


def measure_paper_recipe(splits, model):
    """Choose, fit on training and validation texts together, and test once."""
    chosen, accuracy = choose(splits, model)
    head, saliences = fit(splits.texts, splits.y, model, chosen)
    layers = layers_of(model, splits.test, chosen["site"], chosen["pooling"])
    X_test = join(layers, saliences, chosen["eta"])
    yield {
        "set": splits.name,
        "method": "SPIN by its authors' recipe",
        "columns": X_test.shape[1],
        "validation": accuracy,
        "test": head.score(X_test, splits.y_test),
        "chosen": {k: v for k, v in chosen.items() if k != "probes' C"},
    }
