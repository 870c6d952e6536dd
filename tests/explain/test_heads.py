"""Any scikit-learn classifier is a head: it sees the selected columns, and nothing else changes."""

import numpy as np
import pytest
from reviews import reviews
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import LinearSVC

from skspin import explain_tokens, make_spin_pipeline, prune
from skspin.datasets import demo_model

HEADS = [
    LinearSVC(C=0.001, random_state=0),
    RidgeClassifier(alpha=1000),
    SGDClassifier(alpha=0.1, random_state=0),
    HistGradientBoostingClassifier(max_iter=20, random_state=0),
    MLPClassifier((8,), max_iter=1000, random_state=0),
]


@pytest.fixture(scope="module")
def data():
    texts, kinds = reviews(60)
    return texts[:120], texts[120:], kinds[:120], kinds[120:]


def spin(head):
    pipeline = make_spin_pipeline(demo_model(), layers=[2, 4], dtype="float32", head=head)
    return pipeline.set_params(select__tol=0.05)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_a_head_is_trained_on_the_selected_columns(head, data):
    train, test, y_train, y_test = data
    pipeline = spin(head).fit(train, y_train)
    assert pipeline.score(test, y_test) > 0.5  # of three classes
    alone = clone(head).fit(pipeline[:-1].transform(train), y_train)
    np.testing.assert_array_equal(
        alone.predict(pipeline[:-1].transform(test)), pipeline.predict(test)
    )
    np.testing.assert_array_equal(prune(pipeline).predict(test), pipeline.predict(test))


def test_one_versus_rest_takes_several_labels(data):
    train, test, y_train, y_test = data
    kind = np.eye(3, dtype=int)
    labels, expected = (
        np.column_stack([kind[y], ["not" in text for text in texts]]).astype(int)
        for texts, y in [(train, y_train), (test, y_test)]
    )
    pipeline = spin(OneVsRestClassifier(LogisticRegression(C=0.01))).fit(train, labels)
    predicted = pipeline.predict(test)
    assert predicted.shape == expected.shape
    assert f1_score(expected, predicted, average="micro") > 0.5
    np.testing.assert_array_equal(prune(pipeline).predict(test), predicted)
    np.testing.assert_allclose(
        explain_tokens(pipeline, test[:3]).decision_values,
        pipeline.decision_function(test[:3]),
        rtol=1e-4,
        atol=1e-5,
    )
