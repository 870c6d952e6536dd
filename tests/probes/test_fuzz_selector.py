"""Whatever activations, labels and parameters: a finite salience, or an error that says why not.

A test draws 50 examples, and with ``--hypothesis-profile=nightly`` 600.
"""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from skspin import SalientNeuronSelector

fuzz = settings(
    max_examples=settings().max_examples // 2,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


GOOD = {
    "sparsity": [0.0, 0, 0.3, 0.999, np.float32(0.5)],
    "criterion": ["salience", "count"],
    "C": [1e-3, 0.1, 1, 100.0, [0.01, 1], np.array([1, 2])],
    "penalty": ["l1", "l2"],
    "salience": ["squared", "absolute"],
    "max_layer": [None, 0, 1, 99],
    "layer_sizes": [None, 2, np.int32(1), "auto"],
    "standardize": [True, False],
    "class_weight": [None, "balanced"],
    "validation_fraction": [0.01, 0.2, 0.9],
    "tol": [1e-3, 0.1],
    "max_iter": [1, 200],
    "cache": [None, "memory"],
    "random_state": [None, 0, np.random.RandomState(0)],
}
BAD = {
    "sparsity": [-0.1, 1, 1.0, np.nan, None, "0.4", [0.1]],
    "criterion": ["best", None],
    "C": [0, -1, np.inf, np.nan, None, "1", [], [0.1, 0], [1, np.inf], [[1]], [None], ["a"]],
    "penalty": ["l0", None],
    "salience": ["cubed", None],
    "max_layer": [-1, 0.5, "all"],
    "layer_sizes": [0, -1, 5, [], [4, 0], [3], [1.5, 2.5], "all", [[2, 2]]],
    "standardize": [None, "yes"],
    "class_weight": ["even", 3, [{0: 1}], {0: "a"}, {0: -1}, {0: np.nan}],
    "validation_fraction": [0, 1, 1.5, np.nan, None],
    "tol": [0, -1, np.nan, None],
    "max_iter": [0, 1.5, np.inf, None],
    "device": ["abacus", "cuda:99", "meta", 3, ""],
    "cache": ["folder", 3],
    "random_state": ["seed", -1, 0.5],
}
SPOILT = [(name, value) for name, values in BAD.items() for value in values]
X_OF_4 = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
Y_OF_2 = np.arange(12) % 2
SPOILT_DATA = {
    "nan": (np.where(np.eye(12, 4) > 0, np.nan, X_OF_4), Y_OF_2, None),
    "infinite": (np.where(np.eye(12, 4) > 0, np.inf, X_OF_4), Y_OF_2, None),
    "beyond float32": (X_OF_4.astype(float) * 1e60, Y_OF_2, None),
    "beyond its squares": (X_OF_4 * np.float32(1e30), Y_OF_2, None),
    "at its end": (X_OF_4 / np.abs(X_OF_4).max() * np.finfo(np.float32).max, Y_OF_2, None),
    "texts": ([["a"] * 4] * 12, Y_OF_2, None),
    "one column as a vector": (X_OF_4[:, 0], Y_OF_2, None),
    "three dimensions": (X_OF_4[:, None], Y_OF_2, None),
    "no rows": (X_OF_4[:0], Y_OF_2[:0], None),
    "no columns": (X_OF_4[:, :0], Y_OF_2, None),
    "nothing": (None, Y_OF_2, None),
    "labels short": (X_OF_4, Y_OF_2[1:], None),
    "labels none": (X_OF_4, None, None),
    "labels one class": (X_OF_4, Y_OF_2 * 0, None),
    "labels continuous": (X_OF_4, X_OF_4[:, 0], None),
    "labels nan": (X_OF_4, np.where(Y_OF_2, np.nan, 1), None),
    "labels several": (X_OF_4, np.stack([Y_OF_2, Y_OF_2 + 1, Y_OF_2 + 2], 1), None),
    "weights short": (X_OF_4, Y_OF_2, np.ones(3)),
    "weights negative": (X_OF_4, Y_OF_2, -np.ones(12)),
    "weights nan": (X_OF_4, Y_OF_2, np.full(12, np.nan)),
    "weights all zero": (X_OF_4, Y_OF_2, np.zeros(12)),
    "weights leave one class": (X_OF_4, Y_OF_2, 1.0 * Y_OF_2),
}


@pytest.mark.parametrize(("name", "value"), SPOILT)
def test_a_bad_value_of_the_selector_is_refused_by_the_name_of_its_parameter(name, value):
    params = {"layer_sizes": 2, "cache": None, name: value}
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        SalientNeuronSelector(**params).fit(X_OF_4, Y_OF_2)


@pytest.mark.parametrize(("X", "y", "sample_weight"), SPOILT_DATA.values(), ids=SPOILT_DATA)
def test_bad_data_of_the_selector_is_refused(X, y, sample_weight):
    with pytest.raises((TypeError, ValueError), match=r"\S+ \S+ \S+"):
        SalientNeuronSelector(layer_sizes=None).fit(X, y, sample_weight)


@st.composite
def labelled(draw):
    """Draw activations, labels of any kind, and weights."""
    n_rows = draw(st.integers(2, 24))
    shape = (n_rows, draw(st.sampled_from([2, 4, 6])))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.bool_]))
    width = 8 * np.dtype(dtype).itemsize
    values = {"elements": {"allow_nan": False, "allow_infinity": False}} if width > 8 else {}
    X = draw(arrays(dtype, shape, **values))
    if draw(st.booleans()):  # something that can be learnt
        X = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape).astype(dtype)
    classes = draw(
        st.sampled_from([[0, 1], [-1, 1], ["a", "b"], [True, False], [0, 1, 2], list("abcde")])
    )
    y = np.array(classes)[draw(arrays(np.int8, n_rows, elements=st.integers(0, len(classes) - 1)))]
    if draw(st.integers(0, 4)) == 0:
        y = draw(arrays(np.int8, (n_rows, 3), elements=st.integers(0, 1)))
    weights = st.floats(0, 1e3, width=32)
    return X, y, draw(st.none() | arrays(np.float64, n_rows, elements=weights))


@fuzz
@given(
    data=labelled(),
    params=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in GOOD.items()}),
)
def test_any_numbers_give_a_finite_salience_that_is_kept_or_an_error_that_says_why(data, params):
    X, y, sample_weight = data
    selector = SalientNeuronSelector(**params)
    with warnings.catch_warnings():
        # Advice is fine. A division by zero is not.
        warnings.simplefilter("ignore", UserWarning)
        try:
            selected = selector.fit(X, y, sample_weight).transform(X)
        except ValueError as error:
            assert any(said in str(error) for said in NOT_FOR_PROBES), error
            return
    support, salience = selector.get_support(), selector.salience_
    assert np.isfinite(selector.coef_).all() and np.isfinite(salience).all()
    assert (salience >= 0).all() and support.any()
    assert ((selector.layer_scores_ >= 0) & (selector.layer_scores_ <= 1)).all()
    np.testing.assert_array_equal(selected, X[:, support])
    if params["criterion"] == "salience":
        for columns in selector.layer_columns_:
            held = salience[columns][support[columns]].sum()
            assert held >= (1 - selector.sparsity) * salience[columns].sum() * (1 - 1e-6)


# What random data may lack. (Labels that are all the same, and so on.)
NOT_FOR_PROBES = ["has one class", "as large as", "one non-zero number", "none is left to fit"]
