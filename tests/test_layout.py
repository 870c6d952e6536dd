"""Columns are named, found again, and never carried along wrongly."""

import copy
import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import KFold, train_test_split
from sklearn.preprocessing import StandardScaler

from skspin._layout import ActivationArray, Layout, Segment, layout_of

LAYOUT = Layout(
    (
        Segment(None, 0, "hidden", "mean", 3),
        Segment(None, 0, "hidden", "max", 3),
        Segment(None, 1, "hidden", "mean", 3),
        Segment(None, 1, "hidden", "max", 3),
        Segment(None, 1, "mlp", "mean", 4),
        Segment(None, 1, "mlp", "max", 4),
    )
)


@pytest.fixture
def X():
    values = np.arange(5 * LAYOUT.n_columns, dtype=np.float32).reshape(5, -1)
    return ActivationArray(values, LAYOUT)


def test_names_say_layer_site_pooling_and_neuron():
    names = LAYOUT.feature_names()
    assert len(names) == LAYOUT.n_columns == 20
    assert names[0] == "layer0_hidden_mean_0"
    assert names[5] == "layer0_hidden_max_2"
    assert names[-1] == "layer1_mlp_max_3"


def test_a_probe_sees_all_poolings_of_one_layer_and_site():
    layers = [(layer.name, layer.columns) for layer in LAYOUT.layers()]
    assert layers == [
        ("layer0_hidden", slice(0, 6)),
        ("layer1_hidden", slice(6, 12)),
        ("layer1_mlp", slice(12, 20)),
    ]


def test_two_stacks_are_told_apart_by_name():
    both = Layout(tuple(Segment(s, 1, "mlp", "mean", 2) for s in ("encoder", "decoder")))
    assert both.feature_names().tolist() == [
        "encoder_layer1_mlp_mean_0",
        "encoder_layer1_mlp_mean_1",
        "decoder_layer1_mlp_mean_0",
        "decoder_layer1_mlp_mean_1",
    ]
    assert Layout.from_feature_names(both.feature_names()) == both
    assert [layer.name for layer in both.layers()] == ["encoder_layer1_mlp", "decoder_layer1_mlp"]


def test_a_layout_is_found_again_from_its_names():
    assert Layout.from_feature_names(LAYOUT.feature_names()) == LAYOUT


def test_kept_columns_keep_their_names():
    support = np.zeros(20, dtype=bool)
    support[[1, 13, 15]] = True
    kept = LAYOUT.keep(support)
    assert kept.feature_names().tolist() == LAYOUT.feature_names()[support].tolist()
    assert kept.n_columns == 3
    assert LAYOUT.keep(np.ones(20, dtype=bool)) == LAYOUT


@pytest.mark.parametrize("names", [["x0", "x1"], [0, 1], [], ["layer0_hidden_mean_0", "age"]])
def test_other_names_carry_no_layout(names):
    assert Layout.from_feature_names(names) is None


ROWS = {
    "slice": lambda X: X[1:4],
    "index": lambda X: X[[3, 0, 0]],
    "mask": lambda X: X[np.array([True, False, True, False, True])],
    "rows and all columns": lambda X: X[[0, 2], :],
    "rows and ellipsis": lambda X: X[[0, 2], ...],
    "take": lambda X: np.take(X, [2, 1], axis=0),
    "copy": lambda X: X.copy(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda X: pickle.loads(pickle.dumps(X)),
    "train_test_split": lambda X: train_test_split(X, random_state=0)[1],
    "cross-validation": lambda X: X[next(KFold(5).split(X))[0]],
}


@pytest.mark.parametrize("choose", ROWS.values(), ids=ROWS)
def test_choosing_rows_keeps_the_layout(X, choose):
    rows = choose(X)
    assert rows.layout == LAYOUT
    np.testing.assert_array_equal(np.asarray(rows), choose(np.asarray(X)))


OTHERS = {
    "columns": lambda X: X[:, :5],
    "permuted columns": lambda X: X[:, ::-1],
    "rows and columns": lambda X: X[[0, 1], 2:],
    "one row": lambda X: X[0],
    "2-D mask": lambda X: X[np.asarray(X) > 3],
    "transpose": lambda X: X.T,
    "arithmetic": lambda X: X * 2,
    "negation": lambda X: -X,
    "scaler": lambda X: StandardScaler().fit_transform(X),
    "hstack": lambda X: np.hstack([X, X]),
    "new axis": lambda X: X[None],
    "take columns": lambda X: np.take(X, [1, 0], axis=1),
    "take flat": lambda X: np.take(X, [1, 0]),
    "sum": lambda X: X.sum(axis=0),
    "reshape": lambda X: X.reshape(20, 5),
    "astype": lambda X: X.astype(np.float64),
    "sorted": lambda X: np.sort(X, axis=1),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_whatever_may_change_columns_or_values_drops_the_layout(X, change):
    changed = change(X)
    assert layout_of(changed) is None
    np.testing.assert_array_equal(np.asarray(changed), change(np.asarray(X)))


def test_a_number_is_a_number(X):
    assert type(X[1, 2]) is np.float32
    assert type(X.sum()) is np.float32


def test_joblib_memory_gives_the_layout_back(X, tmp_path):
    identity = joblib.Memory(tmp_path, verbose=0).cache(lambda value: value)
    assert identity(X).layout == LAYOUT
    assert identity(X).layout == LAYOUT
    joblib.dump(X, tmp_path / "X.joblib")
    assert joblib.load(tmp_path / "X.joblib").layout == LAYOUT


def test_a_frame_carries_its_layout_in_its_column_names(X):
    frame = pd.DataFrame(np.asarray(X), columns=LAYOUT.feature_names())
    assert layout_of(frame) == LAYOUT
    assert layout_of(frame.iloc[:2]) == LAYOUT
    assert layout_of(frame.add_prefix("x")) is None
    halved = layout_of(frame.iloc[:, ::2])
    assert halved.feature_names().tolist() == LAYOUT.feature_names()[::2].tolist()
