"""scikit-learn's own checks on the selector; their like on the transformer, whose input is text."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from tiny_models import tiny_reader

from skspin import LLMActivationTransformer, SalientNeuronSelector
from skspin.datasets import demo_model

TEXTS = ["A fine film.", "Two hours lost.", "", "naïve café 🤷 日本語", "A fine film."]


def transformer(**params):
    return LLMActivationTransformer(**{**tiny_reader(), "layers": 1, "cache": None, **params})


@pytest.mark.filterwarnings("ignore:X carries no layers:UserWarning")
@pytest.mark.filterwarnings("ignore:No probe puts weight:UserWarning")
@parametrize_with_checks([SalientNeuronSelector()])
def test_selector_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def test_no_work_happens_before_fit():
    absent = LLMActivationTransformer("no/such-model", site=7, layers="x")
    assert clone(absent).get_params() == absent.get_params()
    with pytest.raises(NotFittedError):
        absent.transform(TEXTS)
    with pytest.raises(NotFittedError):
        absent.get_feature_names_out()


def test_parameters_make_the_round_trip():
    params = transformer(site="mlp", prompt="{text}!").get_params()
    assert LLMActivationTransformer(**params).get_params() == params
    assert LLMActivationTransformer().set_params(**params).get_params() == params


def test_fitting_twice_is_fitting_once():
    once = transformer().fit(TEXTS)
    before = {**vars(once)}
    X = once.transform(TEXTS)
    assert vars(once.fit(TEXTS)) == before
    np.testing.assert_array_equal(once.fit_transform(TEXTS), X)


def test_a_pickle_holds_no_weights_before_and_after_fit():
    fresh = LLMActivationTransformer(demo_model(), layers=1, cache=None)
    fitted = clone(fresh).fit(TEXTS)
    expected = fitted.transform(TEXTS)
    for estimator in (fresh, fitted):
        pickled = pickle.dumps(estimator)
        assert len(pickled) < 10_000
        loaded = pickle.loads(pickled)
        np.testing.assert_array_equal(loaded.fit(TEXTS).transform(TEXTS), expected)


def test_frames_in_and_out():
    frame = pd.DataFrame({"text": TEXTS}, index=list("abcde"))
    step = transformer(pooling=("mean", "last")).set_output(transform="pandas")
    out = step.fit_transform(frame)
    assert out.index.tolist() == list("abcde")
    assert out.columns[3] == "layer1_hidden_mean_3"
    assert len(set(out.columns)) == out.shape[1] == 2 * 24
    assert clone(step).fit_transform(frame).columns.equals(out.columns)
    np.testing.assert_array_equal(
        out.to_numpy(), step.set_output(transform="default").transform(frame["text"])
    )


def test_a_clone_has_the_parameters_and_nothing_learnt():
    fitted = transformer().fit(TEXTS)
    twin = clone(fitted)
    assert twin.get_params() == fitted.get_params()
    assert not [name for name in vars(twin) if name.endswith("_") and not name.endswith("__")]
