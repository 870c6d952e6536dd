"""Labels become two-sided problems with the right weights, and a fair validation part."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from skspin._probes import encode_targets, validation_rows


def test_binary_labels_make_one_problem():
    targets = encode_targets(np.array(["no", "yes", "no"]))
    assert targets.classes.tolist() == ["no", "yes"]
    assert targets.signs.tolist() == [[-1], [1], [-1]]


def test_several_classes_make_one_problem_each():
    targets = encode_targets(np.array([2, 0, 1]))
    assert targets.signs.tolist() == [[-1, -1, 1], [1, -1, -1], [-1, 1, -1]]


def test_a_multilabel_indicator_makes_one_problem_per_label():
    targets = encode_targets(np.array([[1, 0], [1, 1], [0, 0], [1, 0]]))
    assert targets.signs.tolist() == [[1, -1], [1, 1], [-1, -1], [1, -1]]
    assert targets.strata[0] == targets.strata[3]
    assert len(set(targets.strata)) == 3


def test_class_weights_multiply_sample_weights():
    y = np.array([0, 0, 0, 1])
    targets = encode_targets(y, np.array([1.0, 2, 3, 4]), "balanced")
    balance = np.array([4 / 6, 4 / 6, 4 / 6, 2])  # n / (n_classes * n_in_class)
    np.testing.assert_allclose(targets.weights[:, 0], balance * [1, 2, 3, 4])
    np.testing.assert_allclose(targets.row_weights, [1, 2, 3, 4])


def test_each_label_is_balanced_by_itself():
    y = np.array([[1, 1], [0, 1], [0, 1], [0, 0]])
    weights = encode_targets(y, None, "balanced").weights
    np.testing.assert_allclose(weights[:, 0], [2, 2 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(weights[:, 1], [2 / 3, 2 / 3, 2 / 3, 2])


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(4), "one class"),
        (np.array([0.5, 1.5, 2.5]), "Unknown label type"),
        (np.array([[0, 2], [1, 1], [2, 0]]), "one column of classes or a multilabel indicator"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        encode_targets(y)


def test_one_dict_of_class_weights_per_label():
    y = np.array([[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="1 dicts for 2 labels"):
        encode_targets(y, None, [{0: 1, 1: 2}])
    weights = encode_targets(y, None, [{0: 1, 1: 2}, {0: 3, 1: 4}]).weights
    assert weights.tolist() == [[2, 3], [1, 4]]


def test_score_is_weighted_accuracy():
    rng = np.random.default_rng(0)
    y, weight, decision = rng.integers(0, 3, 50), rng.uniform(1, 2, 50), rng.normal(size=(50, 3))
    expected = accuracy_score(y, decision.argmax(axis=1), sample_weight=weight)
    assert encode_targets(y, weight).score(decision, np.arange(50)) == pytest.approx(expected)


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=60).map(np.array),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_every_stratum_gives_its_share_to_within_one_row(strata, fraction, seed):
    rows = validation_rows(strata, fraction, np.random.RandomState(seed))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert 1 <= len(rows) <= len(strata)
    for stratum in np.unique(strata):
        taken, there = (strata[rows] == stratum).sum(), (strata == stratum).sum()
        assert abs(taken - fraction * there) <= 1 + 1e-9
