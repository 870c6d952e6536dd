"""scikit-learn's own checks on the selector; their like on the transformer, whose input is text."""

import pickle

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from skspin import LLMActivationTransformer, SalientNeuronSelector
from skspin.datasets import demo_model

TEXTS = [
    "A fine film.",
    "Two hours lost.",
    "",
    "naïve café 🤷 日本語",
    "A fine film.",
    "word " * 90,
]


def transformer(**params):
    return LLMActivationTransformer(demo_model(), **{"dtype": "float32", "cache": None, **params})


@pytest.mark.filterwarnings("ignore:X carries no layers:UserWarning")
@pytest.mark.filterwarnings("ignore:No probe puts weight:UserWarning")
@parametrize_with_checks([SalientNeuronSelector()])
def test_selector_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def test_order_and_company_of_texts_do_not_matter():
    X = transformer().fit_transform(TEXTS)
    order = [5, 2, 0, 3, 1, 4]
    np.testing.assert_allclose(
        transformer().fit_transform([TEXTS[i] for i in order]), X[order], atol=1e-5
    )
    np.testing.assert_allclose(transformer().fit_transform(TEXTS[3:4]), X[3:4], atol=1e-5)


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
    again = once.fit(TEXTS)
    assert vars(again) == before


def test_a_pickle_holds_no_weights_before_and_after_fit():
    fresh = transformer()
    fitted = clone(fresh).fit(TEXTS)
    expected = fitted.transform(TEXTS)
    for estimator in (fresh, fitted):
        pickled = pickle.dumps(estimator)
        assert len(pickled) < 10_000
        loaded = pickle.loads(pickled)
        np.testing.assert_array_equal(loaded.fit(TEXTS).transform(TEXTS), expected)


def test_frames_in_and_out():
    frame = pd.DataFrame({"text": TEXTS}, index=list("abcdef"))
    out = transformer(layers=2).set_output(transform="pandas").fit_transform(frame)
    assert out.index.tolist() == list("abcdef")
    assert out.columns[3] == "layer2_hidden_mean_3"
    np.testing.assert_allclose(
        out.to_numpy(), transformer(layers=2).fit_transform(frame["text"]), atol=1e-6
    )


def test_a_clone_has_the_parameters_and_nothing_learnt():
    fitted = transformer(layers=2).fit(TEXTS)
    twin = clone(fitted)
    assert twin.get_params() == fitted.get_params()
    assert not [name for name in vars(twin) if name.endswith("_") and not name.endswith("__")]


def test_a_clone_keeps_its_output_container():
    twin = clone(transformer(layers=0).set_output(transform="pandas"))
    assert isinstance(twin.fit_transform(TEXTS), pd.DataFrame)


@pytest.mark.parametrize("container", [list, tuple, np.array, pd.Series, pl.Series])
def test_every_container_of_texts_gives_the_same_activations(container):
    X = transformer(layers=1).fit_transform(container(TEXTS))
    np.testing.assert_allclose(X, transformer(layers=1).fit_transform(TEXTS), atol=1e-6)


def test_fit_and_transform_is_fit_transform():
    X = transformer(layers=1).fit(TEXTS).transform(TEXTS)
    np.testing.assert_array_equal(X, transformer(layers=1).fit_transform(TEXTS))


def test_there_are_as_many_names_as_columns():
    fitted = transformer(layers=[0, 3], pooling=("mean", "last")).fit(TEXTS[:1])
    assert len(fitted.get_feature_names_out()) == fitted.transform(TEXTS).shape[1] == 2 * 2 * 384
    assert len(set(fitted.get_feature_names_out())) == 2 * 2 * 384
