"""Labels become two-sided problems with the right weights, and a fair validation part."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from sklearn.exceptions import DataConversionWarning
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import MultiLabelBinarizer
from sklearn.utils.class_weight import compute_class_weight

from skspin import SalientNeuronSelector
from skspin._probes import encode_targets, validation_rows


@pytest.mark.parametrize(
    ("y", "classes", "signs", "strata"),
    [
        (["no", "yes", "no"], ["no", "yes"], [[-1], [1], [-1]], [0, 1, 0]),
        ([2, 0, 1], [0, 1, 2], [[-1, -1, 1], [1, -1, -1], [-1, 1, -1]], [2, 0, 1]),
        ([[1, 0], [1, 1], [1, 0]], [0, 1], [[1, -1], [1, 1], [1, -1]], [0, 1, 0]),
    ],
    ids=["binary", "several classes", "several labels"],
)
def test_labels_become_problems(y, classes, signs, strata):
    targets = encode_targets(np.array(y))
    assert targets.classes.tolist() == classes
    assert targets.signs.tolist() == signs
    assert targets.strata.tolist() == strata


def test_class_weights_multiply_sample_weights():
    y = np.array([0, 0, 0, 1])
    targets = encode_targets(y, np.array([1, 2, 3, 4]), "balanced")
    rows = np.repeat(y, [1, 2, 3, 4])  # what the weights stand for
    balance = compute_class_weight("balanced", classes=np.array([0, 1]), y=rows)
    np.testing.assert_allclose(targets.weights[:, 0], balance[y] * [1, 2, 3, 4])
    np.testing.assert_allclose(targets.row_weights, [1, 2, 3, 4])
    given = encode_targets(y, np.array([1, 2, 3, 4]), {0: 5, 1: 2}).weights
    assert given[:, 0].tolist() == [5, 10, 15, 8]


def test_a_text_without_weight_is_not_there():
    y, weight = np.array([2, 0, 1, 0]), np.array([0, 1.0, 2, 1])
    targets, without = encode_targets(y, weight), encode_targets(y[1:], weight[1:])
    assert targets.rows.tolist() == [1, 2, 3]
    for name in ("classes", "signs", "weights", "row_weights", "strata"):
        np.testing.assert_array_equal(getattr(targets, name), getattr(without, name))


def test_each_label_is_balanced_by_itself():
    y = np.array([[1, 1], [0, 1], [0, 1], [0, 0]])
    weights = encode_targets(y, None, "balanced").weights
    np.testing.assert_allclose(weights[:, 0], [2, 2 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(weights[:, 1], [2 / 3, 2 / 3, 2 / 3, 2])


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(4), "one class"),
        (np.array(["x"] * 4), r"one class \('x'\).*Add texts of another class"),
        (np.array([["a", "b"], ["b", "c"], ["a", "c"]]), r"one selector per.*MultiLabelBinarizer"),
        (np.array([0.5, 1.5, 2.5]), "Unknown label type"),
        (np.array([[0, 2], [1, 1], [2, 0]]), "one column of classes or a multilabel indicator"),
        (np.array([[-1, 1], [1, 1], [1, -1]]), r"indicator of \[-1, 1\]; allowed are 0 and 1"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        encode_targets(y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a", "b", None, "a"], r"y\[2\] is None, but must be a label"),
        (np.array(["a", "b", np.nan, "a"], dtype=object), r"y\[2\] is nan, but must be a label"),
        (pd.Series(["a", pd.NA, "b", "a"], dtype="string"), r"y\[1\] is <NA>, but must be a label"),
        (pl.Series(["a", None, "b", "a"]), r"y\[1\] is None, but must be a label"),
        (np.array([1, 1, "b", 1], dtype=object), r"y\[2\] is 'b', but y\[0\] is 1; .* be all str"),
        ([["a", "b"], ["b"], ["c"], []], r"y\[0\] is \['a', 'b'\],.*pass.*MultiLabelBinarizer"),
        ([{"a"}, {"b"}, {"a", "b"}, {"b"}], r"y\[0\] is {'a'},.*pass.*MultiLabelBinarizer"),
        (pa.array([["a"], ["b", "c"], ["a"], []]), r"y\[0\] is array\(.*MultiLabelBinarizer"),
    ],
)
def test_rows_without_exactly_one_label_are_refused_by_number(y, message):
    with pytest.raises(ValueError, match=message):
        SalientNeuronSelector(layer_sizes=2).fit(np.eye(4), y)


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


def test_classes_that_weigh_nothing_are_scored_all_the_same():
    targets = encode_targets(np.array([0, 0, 1]), None, {0: 0, 1: 1})
    assert targets.score(np.array([[-1.0], [1.0]]), np.array([0, 1])) == 0.5


@given(
    st.lists(st.integers(0, 5), min_size=12, max_size=60).filter(lambda y: len(set(y)) > 1),
    st.integers(1, 3),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_every_stratum_gives_its_share_of_distinct_rows_to_within_one(y, n_copies, fraction, seed):
    is_left = np.ceil(len(y) * fraction) < len(y)
    y, X = np.tile(y, n_copies), np.tile(np.arange(len(y)), n_copies)[:, None] / 7
    targets = encode_targets(y)
    if not is_left:
        with pytest.raises(ValueError, match=r"none is left to fit a probe to\. Use a smaller one"):
            validation_rows(X, targets, fraction, np.random.RandomState(seed))
        return
    rows = validation_rows(X, targets, fraction, np.random.RandomState(seed))
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert 1 <= len(rows) < len(y)
    assert (np.bincount((X[rows, 0] * 7).round().astype(int)) % n_copies == 0).all()
    for label in set(y):
        taken, there = (y[rows] == label).sum(), (y == label).sum()
        assert abs(taken - fraction * there) <= n_copies * (1 + 1e-9)


def test_rows_that_differ_anywhere_are_distinct_and_rows_that_do_not_are_not():
    X = np.zeros((8, 100), dtype=np.float32)
    X[:4, 0] = X[4:, 0] = 1, 2, 3, 4
    y = np.arange(8) % 2
    held_out = [
        validation_rows(layout(X), encode_targets(y), 0.5, np.random.RandomState(0)).tolist()
        for layout in (np.ascontiguousarray, np.asfortranarray)
    ]
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 4 and {row % 4 for row in held_out[0]} == {*held_out[0][:2]}
    signed = np.where(np.arange(8)[:, None] < 4, 1, -1) * X  # -0.0 is 0.0
    signed[:, 0] = X[:, 0]
    rows = validation_rows(signed, encode_targets(y), 0.5, np.random.RandomState(0))
    assert rows.tolist() == held_out[0]


# Every container of y gives what its plain form gives.

rng = np.random.default_rng(0)
X_OF_20 = rng.normal(size=(90, 20)).astype(np.float32)
NAMES = np.where(X_OF_20[:, 0] + rng.normal(size=90) > 0, "yes", "no")
BITS = (NAMES == "yes").astype(int)
THREE = X_OF_20[:, :3].argmax(axis=1)
SEVERAL = (X_OF_20[:, :3] + rng.normal(size=(90, 3)) > 0).astype(int)


def fitted(y):
    selector = SalientNeuronSelector(layer_sizes=10, C=[0.05, 0.5], cache=None)
    return selector.fit(X_OF_20, y)


COLUMNS = {
    "array": (BITS[:, None], BITS),
    "list of lists": (BITS[:, None].tolist(), BITS),
    "frame": (pd.DataFrame({"label": BITS}), BITS),
    "frame of str": (pd.DataFrame({"label": NAMES}), NAMES),
    "frame of categories": (pd.DataFrame({"label": pd.Categorical(NAMES)}), NAMES),
    "frame of nullable ints": (pd.DataFrame({"label": pd.array(BITS, dtype="Int64")}), BITS),
    "objects": (NAMES.astype(object)[:, None], NAMES),
    "polars": (pl.DataFrame({"label": BITS}), BITS),
    "pyarrow": (pa.table({"label": BITS}), BITS),
    "sparse": (sparse.csr_array(BITS[:, None]), BITS),
    "three classes": (THREE[:, None], THREE),
}
OTHERS = {
    "list": (NAMES.tolist(), NAMES),
    "list of arrays without axes": ([np.array(bit) for bit in BITS], BITS),
    "Series": (pd.Series(NAMES, index=range(90, 0, -1)), NAMES),
    "categories": (pd.Series(pd.Categorical(NAMES)), NAMES),
    "nullable strings": (pd.Series(NAMES, dtype="string"), NAMES),
    "nullable ints": (pd.Series(BITS, dtype="Int64"), BITS),
    "polars": (pl.Series(BITS), BITS),
    "pyarrow": (pa.array(BITS), BITS),
    **{
        f"labels, {kind}": (getattr(sparse, kind)(SEVERAL), SEVERAL)
        for form in ("csr", "csc", "coo", "lil", "dok", "bsr")
        for kind in (f"{form}_matrix", f"{form}_array")
    },
    "labels, floats": (sparse.csc_array(SEVERAL.astype(float)), SEVERAL),
    "labels, bools": (sparse.csr_array(SEVERAL > 0), SEVERAL),
    "labels, MultiLabelBinarizer": (
        MultiLabelBinarizer(sparse_output=True).fit_transform(map(np.flatnonzero, SEVERAL)),
        SEVERAL,
    ),
    "labels, list of lists": (SEVERAL.tolist(), SEVERAL),
    "labels, frame": (pd.DataFrame(SEVERAL), SEVERAL),
    "labels, sparse frame": (
        pd.DataFrame.sparse.from_spmatrix(sparse.csr_matrix(SEVERAL)),
        SEVERAL,
    ),
    "labels, polars": (pl.DataFrame(SEVERAL), SEVERAL),
}


@pytest.mark.parametrize(("y", "plain"), OTHERS.values(), ids=OTHERS)
def test_every_container_of_labels_does_what_an_array_does(y, plain):
    selector, expected = fitted(y), fitted(plain)
    for name in ("classes_", "coef_", "layer_scores_", "C_", "support_"):
        np.testing.assert_array_equal(getattr(selector, name), getattr(expected, name))


@pytest.mark.parametrize(("y", "plain"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_of_labels_is_raveled_with_a_warning(y, plain):
    with pytest.warns(DataConversionWarning, match="column-vector y was passed") as caught:
        selector = fitted(y)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(selector.classes_, np.unique(plain))
    np.testing.assert_array_equal(selector.coef_, fitted(plain).coef_)
