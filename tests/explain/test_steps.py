"""Steps that act in fit only, derived pipelines and frozen steps change neither law nor numbers."""

import numpy as np
import pandas as pd
import pytest
from films import LABELS, NEW, TEXTS, activations, select
from imblearn import FunctionSampler
from imblearn.over_sampling import SMOTE, RandomOverSampler
from imblearn.pipeline import Pipeline as SamplingPipeline
from imblearn.pipeline import make_pipeline as make_sampling_pipeline
from imblearn.under_sampling import RandomUnderSampler
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import SelectFromModel
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import (
    FixedThresholdClassifier,
    GridSearchCV,
    TunedThresholdClassifierCV,
)
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import LinearSVC

from skspin import LayerSalienceDisplay, explain_neurons, explain_tokens, prune

FEW = np.array([1, 1, 1, 0, 1, 0] * 3)  # one class is rarer
FRAME = pd.DataFrame({"text": TEXTS, "length": [len(text) for text in TEXTS], "one": 1.0})


def head():
    return LogisticRegression()


def sparse_head():
    return LinearSVC(penalty="l1", C=1.0, max_iter=100_000, random_state=0)


def over():
    return RandomOverSampler(random_state=0)


def spell_out(texts):
    return [text.lower().replace("film", "moving picture") for text in texts]


class OwnPipeline(Pipeline):
    pass


class OwnSampler(BaseEstimator):
    """As little as a step that acts in fit only can have."""

    def fit_resample(self, X, y):
        return X[2:], y[2:]

    def fit(self, X, y):
        return self


def frozen(step, X=TEXTS):
    return FrozenEstimator(step.fit(X, FEW))


def frozen_behind(*steps, step):
    return [*steps, FrozenEstimator(step.fit(make_pipeline(*steps).fit_transform(TEXTS, FEW), FEW))]


PIPELINES = {
    "sampler": lambda: make_sampling_pipeline(
        activations(), select(), over(), StandardScaler(), head()
    ),
    "sampler behind a scaler": lambda: make_sampling_pipeline(
        activations(),
        select(),
        StandardScaler(),
        SMOTE(random_state=0, k_neighbors=2),
        sparse_head(),
    ),
    "sampler before the selector": lambda: make_sampling_pipeline(
        activations(), RandomUnderSampler(random_state=0), select(layer_sizes=384), head()
    ),
    "samplers of any kind": lambda: make_sampling_pipeline(
        activations(), select(), FunctionSampler(), OwnSampler(), sparse_head()
    ),
    "sampler and a step that mixes": lambda: make_sampling_pipeline(
        activations(), select(), over(), PCA(5), sparse_head()
    ),
    "sampler and another selector": lambda: make_sampling_pipeline(
        activations(), SelectFromModel(sparse_head()), over(), sparse_head()
    ),
    "sampler in a nested pipeline": lambda: SamplingPipeline(
        [
            ("activations", activations()),
            ("select", select()),
            ("end", make_sampling_pipeline(StandardScaler(), over(), sparse_head())),
        ]
    ),
    "sampling pipeline in a pipeline": lambda: make_pipeline(
        make_sampling_pipeline(activations(), select()), StandardScaler(), sparse_head()
    ),
    "derived pipelines": lambda: OwnPipeline(
        [
            ("features", OwnPipeline([("activations", activations()), ("select", select())])),
            ("classify", head()),
        ]
    ),
    "frozen transformer": lambda: make_pipeline(
        frozen(activations()), select(), StandardScaler(), sparse_head()
    ),
    "frozen pipeline": lambda: make_pipeline(
        frozen(make_pipeline(activations(), select(), StandardScaler())), sparse_head()
    ),
    "frozen selector": lambda: make_pipeline(
        *frozen_behind(activations(), step=select()), StandardScaler(), head()
    ),
    "frozen scaler": lambda: make_pipeline(
        *frozen_behind(activations(), select(), step=StandardScaler()), sparse_head()
    ),
    "frozen whole in a pipeline": lambda: make_pipeline(
        frozen(make_pipeline(activations(), select(), head()))
    ),
    "frozen whole": lambda: frozen(make_pipeline(activations(), select(), head())),
    "texts changed first": lambda: make_pipeline(
        FunctionTransformer(spell_out), activations(), select(), head()
    ),
}
NOT_EXPLAINED = {
    "frozen members of a union": lambda: make_pipeline(
        FeatureUnion(
            [
                ("one", frozen(make_pipeline(activations(), select()))),
                ("words", frozen(TfidfVectorizer())),
            ]
        ),
        head(),
    ),
    "LinearDiscriminantAnalysis as a step": lambda: make_pipeline(
        activations(), select(), LinearDiscriminantAnalysis(), sparse_head().set_params(C=0.1)
    ),
}


@pytest.mark.parametrize("name", [*PIPELINES, *NOT_EXPLAINED])
def test_what_stands_around_the_steps_changes_no_prediction(name):
    whole = (PIPELINES | NOT_EXPLAINED)[name]().fit(TEXTS, FEW)
    expected, pruned = whole.decision_function(NEW), prune(whole)
    for pipeline in (pruned, prune(pruned)):
        np.testing.assert_allclose(pipeline.decision_function(NEW), expected, atol=1e-5)
        np.testing.assert_array_equal(pipeline.predict(NEW), whole.predict(NEW))
    if name in PIPELINES:
        for pipeline in (whole, pruned):
            np.testing.assert_allclose(
                explain_tokens(pipeline, NEW).decision_values[:, 0], expected, atol=1e-4
            )
    pruned.fit(TEXTS, FEW)  # from all layers on
    np.testing.assert_allclose(pruned.decision_function(NEW), expected, atol=1e-5)


def test_only_columns_in_use_are_computed_behind_samplers_and_in_frozen_steps():
    for name in ("sampler behind a scaler", "frozen transformer", "sampler and another selector"):
        whole = PIPELINES[name]().fit(TEXTS, FEW)
        used = np.count_nonzero(whole[-1].coef_)
        assert prune(whole)[0].layout_.n_columns == used < whole[0].layout_.n_columns / 10


def test_a_sampler_may_come_before_the_texts_are_read():
    first = FunctionTransformer(lambda frame: frame["text"])
    whole = make_sampling_pipeline(over(), first, activations(), select(), head()).fit(FRAME, FEW)
    np.testing.assert_array_equal(prune(whole).predict(FRAME), whole.predict(FRAME))
    values = explain_tokens(whole, FRAME).decision_values[:, 0]
    np.testing.assert_allclose(values, whole.decision_function(FRAME), atol=1e-4)


@pytest.mark.parametrize("classifier", [head(), sparse_head()], ids=["all", "some"])
def test_what_stands_beside_texts_in_a_column_transformer_stays(classifier):
    spin = make_sampling_pipeline(activations(), select(), StandardScaler())
    parts = ColumnTransformer(
        [
            ("scaled", StandardScaler(), ["length", "one"]),
            ("text", spin, "text"),
            ("numbers", "passthrough", ["length", "one"]),
            ("words", TfidfVectorizer(), "text"),
        ],
        sparse_threshold=0,
    )
    whole = make_sampling_pipeline(parts, over(), StandardScaler(), classifier).fit(FRAME, FEW)
    pruned, expected = prune(whole), whole.decision_function(FRAME)
    np.testing.assert_allclose(pruned.decision_function(FRAME), expected, rtol=1e-5, atol=1e-5)
    assert set(pruned[0].get_feature_names_out()) < set(whole[0].get_feature_names_out())
    n_columns = pruned[0].named_transformers_["text"][0].layout_.n_columns
    assert n_columns <= whole[0].named_transformers_["text"][1].n_selected_.sum()
    np.testing.assert_allclose(
        pruned.fit(FRAME, FEW).decision_function(FRAME), expected, rtol=1e-5, atol=1e-5
    )


def test_tokens_are_those_of_the_text_that_the_model_reads():
    whole = PIPELINES["texts changed first"]().fit(TEXTS, LABELS)
    explanation = explain_tokens(whole, ["A FILM"])
    assert explanation.merge_words().tokens[0].surfaces()[1:-1] == ["a", "moving", "picture"]
    found = explain_neurons(whole, ["A FILM"], "layer1_hidden_mean_3")
    assert found.texts == ["a moving picture"]


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (
            lambda spin: GridSearchCV(spin, {"logisticregression__C": [1.0]}, cv=2),
            "best_estimator_",
        ),
        (
            lambda spin: CalibratedClassifierCV(spin, cv=2),
            r"calibrated_classifiers_\[0\].estimator",
        ),
        (lambda spin: TunedThresholdClassifierCV(spin, cv=2), r"Pass its estimator_\."),
        (FixedThresholdClassifier, r"Pass its estimator_\."),
    ],
    ids=["search", "calibration", "tuned threshold", "fixed threshold"],
)
def test_what_holds_pipelines_is_refused_with_the_one_to_pass(wrap, advice):
    whole = wrap(make_pipeline(activations(), select(), head()))
    if isinstance(whole, GridSearchCV):
        with pytest.raises(TypeError, match="GridSearchCV.*best_estimator_, after a fit"):
            prune(whole)
    whole.fit(TEXTS, LABELS)
    for function in (lambda: explain_tokens(whole, NEW), lambda: prune(whole)):
        with pytest.raises(TypeError, match=f"{type(whole).__name__}, but.*{advice}"):
            function()
    for function in (
        lambda: explain_neurons(whole, NEW, "layer1_hidden_mean_3"),
        lambda: LayerSalienceDisplay.from_estimator(whole),  # draws nothing
    ):
        with pytest.raises(ValueError, match=f"{type(whole).__name__} has 0 steps.*{advice}"):
            function()
    inside = getattr(whole, "best_estimator_", getattr(whole, "estimator_", None))
    inside = inside or whole.calibrated_classifiers_[0].estimator
    assert len(explain_tokens(inside, NEW)) == len(NEW) and prune(inside) is not inside


def test_a_best_estimator_is_only_asked_of_what_has_one():
    with pytest.raises(TypeError, match="Pass its estimator_, after a fit"):
        prune(FixedThresholdClassifier(make_pipeline(activations(), select(), head())))
    with pytest.raises(TypeError, match=r"takes a fitted Pipeline\.$"):
        prune(LogisticRegressionCV())
