"""The estimators in scikit-learn's own machinery, on the demo model and real text."""

import subprocess
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
from reviews import reviews
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skspin import LLMActivationTransformer, SalientNeuronSelector, make_spin_pipeline
from skspin.datasets import demo_model


@pytest.fixture(scope="module")
def data():
    texts, kinds = reviews(80, 2)
    return texts[:100], texts[100:], kinds[:100], kinds[100:]


def spin(**params):
    return make_spin_pipeline(demo_model(), site=("hidden", "mlp"), dtype="float32", **params)


def test_the_pipeline_learns_from_real_text(data):
    train, test, y_train, y_test = data
    pipeline = spin().fit(train, y_train)
    assert list(pipeline.named_steps) == ["activations", "select", "scale", "classify"]
    assert pipeline.score(test, y_test) > 0.75
    assert pipeline.predict_proba(test).shape == (len(test), 2)
    names = pipeline[:-1].get_feature_names_out()
    selector = pipeline["select"]
    assert len(names) == selector.n_selected_.sum()
    assert all(name.startswith("layer") for name in names)
    assert len(selector.layer_names_) == 7 + 6 and selector.layer_names_[-1] == "layer6_mlp"


def test_shuffled_labels_are_not_predictive(data):
    train, test, y_train, y_test = data
    shuffled = np.random.default_rng(0).permutation(y_train)
    assert 0.2 < spin().fit(train, shuffled).score(test, y_test) < 0.8


def test_grid_search_reaches_every_step(data):
    train, test, y_train, y_test = data
    grid = {
        "select__sparsity": [0.2, 0.6],
        "select__C": [0.1, 1.0],
        "activations__layers": [None, [0, 1, 2]],
        "classify__C": [0.01],
    }
    search = GridSearchCV(spin(), grid, cv=3).fit(train, y_train)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.score(test, y_test) > 0.75


def test_cross_validation_on_activations_computed_once(data):
    train, _, y_train, _ = data
    steps = spin()
    X = steps["activations"].fit_transform(train)
    on_activations = cross_val_score(steps[1:], X, y_train, cv=3)
    on_texts = cross_val_score(steps, train, y_train, cv=3)
    np.testing.assert_allclose(on_activations, on_texts)


def test_text_beside_numbers(data):
    train, test, y_train, y_test = data

    def frame(texts):
        return pd.DataFrame({"text": texts, "length": [len(text) for text in texts]})

    text = make_pipeline(
        LLMActivationTransformer(demo_model(), dtype="float32"), SalientNeuronSelector()
    )
    columns = ColumnTransformer([("text", text, "text"), ("number", StandardScaler(), ["length"])])
    pipeline = make_pipeline(columns, LogisticRegression(max_iter=1000))
    pipeline.fit(frame(train), y_train)
    assert pipeline.score(frame(test), y_test) > 0.75
    names = columns.fit(frame(train), y_train).get_feature_names_out()
    assert names[0].startswith("text__layer") and names[-1] == "number__length"


@pytest.mark.parametrize("output", ["default", "pandas"])
@pytest.mark.parametrize("prefixed", [True, False], ids=["prefixed", "plain"])
def test_a_union_of_two_poolings_is_one_transformer_with_both(data, output, prefixed):
    train, _, y, _ = data

    def activations(pooling):
        params = {"layers": [0, 3], "dtype": "float32"}
        return LLMActivationTransformer(demo_model(), pooling=pooling, **params)

    branches = [(pooling, activations(pooling)) for pooling in ("max", "mean")]
    union = FeatureUnion(branches, verbose_feature_names_out=prefixed)
    one = make_pipeline(activations(("mean", "max")), SalientNeuronSelector(C=1.0)).fit(train, y)
    two = make_pipeline(union, SalientNeuronSelector(C=1.0)).set_output(transform=output)
    two.fit(train, y)
    names = [name.split("__")[-1] for name in two.get_feature_names_out()]
    assert set(names) == set(one.get_feature_names_out())
    assert two[-1].layer_names_ == one[-1].layer_names_ == ["layer0_hidden", "layer3_hidden"]
    np.testing.assert_array_equal(two[-1].layer_scores_, one[-1].layer_scores_)


def test_calibration(data):
    train, test, y_train, y_test = data
    calibrated = CalibratedClassifierCV(spin(head=LinearSVC(C=1e-3, random_state=0)), cv=3).fit(
        train, y_train
    )
    assert calibrated.score(test, y_test) > 0.75


def test_a_fitted_pipeline_moves_to_another_process(data, tmp_path):
    train, test, y_train, _ = data
    pipeline = spin().fit(train, y_train)
    joblib.dump((pipeline, test), tmp_path / "spin.joblib")
    assert (tmp_path / "spin.joblib").stat().st_size < 2_000_000
    code = (
        "import joblib, sys; folder = sys.argv[1]\n"
        "pipeline, test = joblib.load(f'{folder}/spin.joblib')\n"
        "joblib.dump(pipeline.decision_function(test), f'{folder}/decisions.joblib')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    pipeline.set_params(activations__cache=None)  # other tests read these texts in other batches
    decisions = joblib.load(tmp_path / "decisions.joblib")
    np.testing.assert_allclose(decisions, pipeline.decision_function(test), atol=1e-5)
