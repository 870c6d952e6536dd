"""Any scikit-learn classifier is a head; a linear one is explained, whatever it is made of."""

import numpy as np
import pytest
from reviews import reviews
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    Perceptron,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
)
from sklearn.metrics import f1_score
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    TunedThresholdClassifierCV,
)
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC, NuSVC

from skspin import explain_tokens, make_spin_pipeline, prune
from skspin.datasets import demo_model

SPARSE = LinearSVC(penalty="l1", C=0.02, random_state=0)
ONE_PER_CLASS = [
    LogisticRegression(C=0.01),
    LinearSVC(C=0.001, random_state=0),
    SPARSE,
    RidgeClassifier(alpha=1000),
    RidgeClassifierCV(),
    RidgeClassifier(fit_intercept=False),
    SGDClassifier(alpha=0.1, random_state=0),
    Perceptron(penalty="l1", alpha=0.01),
    LinearDiscriminantAnalysis(),
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    OneVsRestClassifier(SVC(kernel="linear")),
    OneVsRestClassifier(make_pipeline(StandardScaler(), LogisticRegression())),
    make_pipeline(StandardScaler(), LogisticRegression()),
    GridSearchCV(LogisticRegression(), {"C": [0.01, 0.1]}, cv=2),
]
TWO_CLASSES_ONLY = [SVC(kernel="linear"), NuSVC(kernel="linear", nu=0.1)]
NOT_LINEAR = [
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


@pytest.fixture(scope="module")
def columns(data):
    """The fitted steps before a head, and the columns that they give it."""
    steps = spin(None)[:-1].fit(data[0], data[2])
    return steps, steps.transform(data[0])


def with_head(columns, head, y):
    steps, X = columns
    return Pipeline([*steps.steps, ("classify", clone(head).fit(X, y))])


def assert_explained(pipeline, texts, expected):
    explanation = explain_tokens(pipeline, texts)
    expected = np.reshape(expected, (len(texts), -1))
    np.testing.assert_allclose(
        explanation.decision_values, expected, rtol=1e-4, atol=1e-4 * max(1, np.abs(expected).max())
    )
    return explanation


@pytest.mark.parametrize("head", [ONE_PER_CLASS[1], *NOT_LINEAR], ids=str)
def test_a_head_is_trained_on_the_selected_columns(head, data):
    train, test, y_train, y_test = data
    pipeline = spin(head).fit(train, y_train)
    assert pipeline.score(test, y_test) > 0.5  # of three classes
    alone = clone(head).fit(pipeline[:-1].transform(train), y_train)
    np.testing.assert_array_equal(
        alone.predict(pipeline[:-1].transform(test)), pipeline.predict(test)
    )


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("head", [*ONE_PER_CLASS, *TWO_CLASSES_ONLY, *NOT_LINEAR], ids=str)
def test_a_head_is_pruned_and_explained_without_changing_its_decisions(
    head, n_classes, data, columns
):
    pipeline = with_head(columns, head, np.minimum(data[2], n_classes - 1))
    predicted = pipeline.predict(data[1])
    np.testing.assert_array_equal(prune(pipeline).predict(data[1]), predicted)
    linear = head in ONE_PER_CLASS or (head in TWO_CLASSES_ONLY and n_classes == 2)
    if linear:
        texts = data[1][:4]
        explanation = assert_explained(pipeline, texts, pipeline.decision_function(texts))
        np.testing.assert_array_equal(explanation.predicted_classes(), predicted[:4])
        assert_explained(prune(pipeline), texts, pipeline.decision_function(texts))


def test_columns_without_weight_are_pruned_from_every_member(data, columns):
    for head in (SPARSE, OneVsRestClassifier(SPARSE), MultiOutputClassifier(SPARSE)):
        y = np.eye(3)[data[2]] if isinstance(head, MultiOutputClassifier) else data[2]
        pipeline = with_head(columns, head, y)
        members = getattr(pipeline[-1], "estimators_", [pipeline[-1]])
        used = np.any([member.coef_.any(axis=0) for member in members], axis=0)
        pruned = prune(pipeline)
        assert pruned[0].layout_.n_columns == used.sum() < used.size
        np.testing.assert_array_equal(pruned.predict(data[1]), pipeline.predict(data[1]))


def labels(texts, kinds):
    return np.column_stack([np.eye(3)[kinds], ["not" in text for text in texts]]).astype(int)


def test_one_versus_rest_takes_several_labels(data, columns):
    train, test, y_train, y_test = data
    head = OneVsRestClassifier(LogisticRegression(C=0.01))
    pipeline = with_head(columns, head, labels(train, y_train))
    expected, predicted = labels(test, y_test), pipeline.predict(test)
    assert f1_score(expected, predicted, average="micro") > 0.5
    np.testing.assert_array_equal(prune(pipeline).predict(test), predicted)
    assert_explained(pipeline, test[:3], pipeline.decision_function(test[:3]))


@pytest.mark.filterwarnings("ignore:Label . is present")
@pytest.mark.parametrize("at", [0, 3])
def test_a_label_that_every_text_has_is_explained_by_the_intercept(at, data, columns):
    always = np.insert(np.eye(3)[data[2]], at, 1, axis=1).astype(int)
    pipeline = with_head(columns, OneVsRestClassifier(LogisticRegression()), always)
    explanation = assert_explained(pipeline, data[1][:3], pipeline.decision_function(data[1][:3]))
    assert explanation.intercept[at] == 1 and not np.any(explanation.for_class(at)[0])


def test_each_output_has_decision_values_of_its_own(data, columns):
    train, test, y_train, _ = data
    texts, X = test[:3], columns[0].transform(test[:3])
    head = MultiOutputClassifier(LogisticRegression(C=0.01))
    mixed = np.column_stack([np.array(list("abc"))[y_train], np.where(y_train > 1, "yes", "no")])
    for y, classes in [
        (labels(train, y_train), [0, 1, 2, 3]),  # as for OneVsRestClassifier
        (mixed, [(0, "a"), (0, "b"), (0, "c"), (1, "yes")]),
    ]:
        pipeline = with_head(columns, head, y)
        expected = np.column_stack([one.decision_function(X) for one in pipeline[-1].estimators_])
        explanation = assert_explained(pipeline, texts, expected)
        assert explanation.classes.tolist() == classes
        last = explanation.for_class(classes[-1])[0].sum()
        total = last + explanation.intercept_for_class(classes[-1])
        np.testing.assert_allclose(total, expected[0, 3], rtol=1e-4)
        assert explanation.to_frame()["class"].nunique() == 4


def test_a_frozen_head_is_explained_and_stays_as_it_is(data, columns):
    train, test, y_train, _ = data
    pipeline = with_head(columns, FrozenEstimator(SPARSE.fit(columns[1], y_train)), y_train)
    assert_explained(pipeline, test[:3], pipeline.decision_function(test[:3]))
    pruned = prune(pipeline)
    np.testing.assert_array_equal(pruned.predict(test), pipeline.predict(test))
    np.testing.assert_array_equal(pruned.fit(train, y_train).predict(test), pipeline.predict(test))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (HistGradientBoostingClassifier(max_iter=1), "is not linear.*sklearn.inspection"),
        (SVC(), "SVC is not linear"),
        (SVC(kernel="linear"), "SVC with 3 classes takes the votes.*OneVsRestClassifier"),
        (SVC(kernel="linear", decision_function_shape="ovo"), "SVC with 3 classes takes the vot"),
        (OneVsOneClassifier(LinearSVC()), "OneVsOneClassifier with 3 classes takes the votes"),
        (OneVsRestClassifier(SVC()), "SVC is not linear"),
        (LinearRegression(), "ends in a LinearRegression, but a linear classifier is needed"),
        (CalibratedClassifierCV(LinearSVC(), cv=2), r"calibrated_classifiers_\[0\].estimator"),
    ],
    ids=str,
)
def test_a_head_that_is_no_weighted_sum_is_refused_with_the_reason(head, message, data, columns):
    pipeline = with_head(columns, head, data[2])
    with pytest.raises(ValueError, match=message):
        explain_tokens(pipeline, data[1][:1])
    np.testing.assert_array_equal(prune(pipeline).predict(data[1]), pipeline.predict(data[1]))


def test_what_the_refusal_advises_works(data, columns):
    head = CalibratedClassifierCV(LinearSVC(C=0.001, random_state=0), cv=2).fit(columns[1], data[2])
    inside = head.calibrated_classifiers_[0].estimator
    pipeline = Pipeline([*columns[0].steps, ("classify", inside)])
    assert_explained(pipeline, data[1][:2], pipeline.decision_function(data[1][:2]))
    for wrap in (FixedThresholdClassifier, TunedThresholdClassifierCV):
        pipeline = with_head(columns, wrap(LogisticRegression()), np.minimum(data[2], 1))
        with pytest.raises(ValueError, match="no sums over tokens.*Pass its estimator_"):
            explain_tokens(pipeline, data[1][:1])
        pipeline = Pipeline([*columns[0].steps, ("classify", pipeline[-1].estimator_)])
        assert_explained(pipeline, data[1][:2], pipeline.decision_function(data[1][:2]))
