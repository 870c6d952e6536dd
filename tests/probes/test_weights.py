"""A text of weight w counts as the same text w times, whatever the other settings."""

import numpy as np
import pytest
import sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from skspin import SalientNeuronSelector

rng = np.random.default_rng(0)
X = rng.normal(size=(150, 40)).astype(np.float32) * np.geomspace(0.1, 10, 40, dtype=np.float32)
SIGNAL = X[:, [3, 25, 30]] / X[:, [3, 25, 30]].std(axis=0) + rng.normal(size=(150, 3))
Y = {
    "two classes": (SIGNAL[:, 0] > 0.8).astype(int),
    "three classes": SIGNAL.argmax(axis=1),
    "labels": (SIGNAL > [0, 0.5, 1]).astype(int),
}
WEIGHT = rng.integers(0, 4, 150)
REPEATED = np.repeat(np.arange(150), WEIGHT)
DICTS = {
    "two classes": {0: 1, 1: 3},
    "three classes": {0: 1, 1: 3, 2: 0.5},
    "labels": [{0: 1, 1: 2}, {0: 3, 1: 1}, {0: 1, 1: 1}],
}
SETTINGS = {
    "plain": {},
    "l2": {"penalty": "l2", "tol": 1e-10},
    "not standardised": {"standardize": False},
    "absolute": {"salience": "absolute", "criterion": "count"},
    "several C": {"C": [0.005, 0.01, 0.02, 0.05, 0.1, 0.5]},
    "other validation part": {"validation_fraction": 0.5, "random_state": 3},
}


def fit(X, y, weight=None, **params):
    settings = {"layer_sizes": 20, "tol": 1e-7, "cache": None, **params}
    return SalientNeuronSelector(**settings).fit(X, y, weight)


def assert_same(one, other):
    np.testing.assert_array_equal(one.support_, other.support_)
    np.testing.assert_array_equal(one.C_, other.C_)
    for name in ("coef_", "salience_", "layer_scores_"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_weight", [None, "balanced", "dict"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", Y)
def test_a_weight_is_a_number_of_repetitions(kind, settings, class_weight):
    y = Y[kind]
    params = settings | {"class_weight": DICTS[kind] if class_weight == "dict" else class_weight}
    weighted = fit(X, y, WEIGHT, **params)
    assert_same(weighted, fit(X[REPEATED], y[REPEATED], **params))
    shuffled = np.concatenate([np.flatnonzero(WEIGHT >= count) for count in (1, 2, 3)])
    assert_same(weighted, fit(X[shuffled], y[shuffled], **params))
    halves = {"C": 2 * np.asarray(params.get("C", 0.1))}
    half = fit(X, y, WEIGHT / 2, **(params | halves))
    np.testing.assert_allclose(half.coef_, weighted.coef_, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["two classes", "labels"])
@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_balanced_and_weighted_probes_are_scikit_learns_on_repeated_rows(kind, penalty):
    y = Y[kind][REPEATED]
    Z = StandardScaler().fit_transform(X[REPEATED][:, :20].astype(np.float64))
    new = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)
    kind_of = {"l1_ratio": float(penalty == "l1")} if new else {"penalty": penalty}
    model = LogisticRegression(
        C=0.1, class_weight="balanced", solver="saga", tol=1e-9, max_iter=20_000, **kind_of
    )
    oracle = OneVsRestClassifier(model).fit(Z, y)
    expected = np.vstack([part.coef_ for part in oracle.estimators_])
    found = fit(X, Y[kind], WEIGHT, class_weight="balanced", penalty=penalty, tol=1e-10)
    np.testing.assert_allclose(found.coef_[:, :20], expected, atol=1e-4)


def test_weights_that_span_many_decades_are_solved():
    rng = np.random.default_rng(10)
    d, k = int(rng.choice([20, 70, 200])), float(rng.choice([1, 2, 3, 4]))
    C = float(10.0 ** rng.integers(1, 6))
    X = rng.normal(size=(300, d))
    y = (rng.random(300) < rng.choice([0.03, 0.1, 0.3])).astype(int)
    y[:3], y[3:5] = 1, 0
    selector = SalientNeuronSelector(C=C, layer_sizes=None)
    selector.fit(X, y, sample_weight=10.0 ** rng.uniform(-k, k, 300))
    assert selector.dual_gap_.max() <= 1e-3


def test_weights_of_zero_are_as_if_the_texts_were_not_there():
    weight = np.where(np.arange(150) < 50, 0.0, 1.0)
    spoilt = np.where(weight[:, None] > 0, X, np.float32(1e6))
    y = np.where(weight > 0, Y["two classes"], 2)
    weighted = fit(spoilt, y, weight, class_weight="balanced")
    assert weighted.classes_.tolist() == [0, 1]
    assert_same(weighted, fit(X[50:], y[50:], class_weight="balanced"))


def test_no_probe_is_asked_about_a_text_that_it_was_fitted_to():
    wide, y = rng.normal(size=(60, 300)), rng.integers(0, 2, 60)
    copies = np.repeat(np.arange(60), 5)
    selector = SalientNeuronSelector(C=10.0, layer_sizes=None, random_state=0)
    selector.fit(wide[copies], y[copies])
    assert selector.layer_scores_[0] < 0.8  # learnt by heart, it would be 1
