"""Columns are named, found again, and never carried along wrongly."""

import copy
import pickle

import joblib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import KFold, train_test_split
from sklearn.preprocessing import StandardScaler

from skspin._layout import ActivationArray, Layout, Segment, find_layers, layout_of

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


def find(names):
    return find_layers("auto", None, list(names), len(names), None)


def as_lists(layers):
    return {layer.name: layer.columns.tolist() for layer in layers}


def test_names_say_layer_and_site_and_a_probe_sees_all_poolings_of_both():
    names = LAYOUT.feature_names()
    assert len(names) == LAYOUT.n_columns == 20
    assert names[0] == "layer0_hidden_mean_0"
    assert names[5] == "layer0_hidden_max_2"
    assert names[-1] == "layer1_mlp_max_3"
    expected = {
        "layer0_hidden": [*range(6)],
        "layer1_hidden": [*range(6, 12)],
        "layer1_mlp": [*range(12, 20)],
    }
    assert as_lists(LAYOUT.layers()) == expected
    assert as_lists(find(names)) == expected


def test_two_stacks_are_told_apart_by_name():
    both = Layout(tuple(Segment(s, 1, "mlp", "mean", 2) for s in ("encoder", "decoder")))
    names = [f"{stack}_layer1_mlp_mean_{i}" for stack in ("encoder", "decoder") for i in range(2)]
    assert both.feature_names().tolist() == names
    expected = {"encoder_layer1_mlp": [0, 1], "decoder_layer1_mlp": [2, 3]}
    assert as_lists(both.layers()) == as_lists(find(names)) == expected
    assert list(as_lists(find(names[::-1]))) == list(expected)  # the encoder first, as ever


@given(st.permutations(range(LAYOUT.n_columns)))
def test_a_layer_is_named_by_its_columns_wherever_they_stand(order):
    names = LAYOUT.feature_names()
    for found, known in zip(find(names[order]), LAYOUT.layers(), strict=True):
        assert found.name == known.name
        assert names[order][found.columns].tolist() == names[known.columns].tolist()
    chosen = order[:9]
    for found in find(names[chosen]):
        assert {n.rsplit("_", 2)[0] for n in names[chosen][found.columns]} == {found.name}


def prefixed(**branches):
    return [f"{prefix}__{name}" for prefix, names in branches.items() for name in names]


MEAN, MAX = (
    [f"layer{i}_hidden_{pool}_{j}" for i in range(2) for j in range(3)] for pool in ("mean", "max")
)
ONE_MODEL = {"layer0_hidden": [0, 1, 2, 6, 7, 8], "layer1_hidden": [3, 4, 5, 9, 10, 11]}
TWO_MODELS = {
    "a__layer0_hidden": [0, 1, 2],
    "a__layer1_hidden": [3, 4, 5],
    "b__layer0_hidden": [6, 7, 8],
    "b__layer1_hidden": [9, 10, 11],
}
PREFIXED = {
    "one prefix": (prefixed(text=MEAN + MAX), ONE_MODEL),
    "two poolings": (prefixed(a=MEAN, b=MAX), ONE_MODEL),
    "prefix within prefix": (prefixed(union=prefixed(a=MEAN, b=MAX)), ONE_MODEL),
    "two poolings in another order": (
        prefixed(b=MAX, a=MEAN),
        {"layer0_hidden": [6, 7, 8, 0, 1, 2], "layer1_hidden": [9, 10, 11, 3, 4, 5]},
    ),
    "two models": (prefixed(a=MEAN, b=MEAN), TWO_MODELS),
    "two widths": (
        prefixed(a=MEAN, b=[*MAX, "layer0_hidden_max_3"]),
        TWO_MODELS | {"b__layer0_hidden": [6, 7, 8, 12]},
    ),
}


@pytest.mark.parametrize(("names", "expected"), PREFIXED.values(), ids=PREFIXED)
def test_prefixes_tell_models_apart_where_names_without_them_do_not(names, expected):
    assert as_lists(find(names)) == expected


NAMELESS = {
    "some": (["text__layer0_hidden_mean_0", "numbers__age"], "1 of its 2.*'numbers__age'"),
    "all": (["x0", "x1"], "2 of its 2 columns, such as 'x0'"),
    "no frame": (None, "a plain array, as a scaler, a ColumnTransformer or a FeatureUnion makes"),
}


@pytest.mark.parametrize(("names", "reason"), NAMELESS.values(), ids=NAMELESS)
def test_what_carries_no_layers_is_one_layer_with_a_warning_that_says_why(names, reason):
    with pytest.warns(UserWarning, match=f"carries no layers.*{reason}.*layer_sizes=768"):
        (layer,) = find_layers("auto", None, names, 2, None)
    assert layer.columns.tolist() == [0, 1]


def test_kept_columns_keep_their_names():
    support = np.zeros(20, dtype=bool)
    support[[1, 13, 15]] = True
    kept = LAYOUT.select(support)
    assert kept.feature_names().tolist() == LAYOUT.feature_names()[support].tolist()
    assert kept.n_columns == 3
    assert LAYOUT.select(np.ones(20, dtype=bool)) == LAYOUT


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
    "partitioned": lambda X: np.partition(X, 2, axis=1),
    "permuted": lambda X: np.random.default_rng(0).permuted(X, axis=1),
    "flipped": lambda X: np.flip(X, axis=1),
    "rolled": lambda X: np.roll(X, 1, axis=1),
    "view": lambda X: X.view(),
    "rounded": lambda X: np.round(X, 1),
    "running sum": lambda X: X.cumsum(axis=1),
}


@pytest.mark.parametrize("change", [*ROWS.values(), *OTHERS.values()], ids=[*ROWS, *OTHERS])
def test_only_choosing_rows_keeps_the_layout(X, change):
    changed = change(X)
    assert layout_of(changed) == (LAYOUT if change in ROWS.values() else None)
    np.testing.assert_array_equal(np.asarray(changed), change(np.asarray(X)))


def test_poolings_of_one_model_side_by_side_join_their_layouts():
    def array(pooling, width=3):
        segments = tuple(Segment(None, layer, "mlp", pooling, width) for layer in (1, 2))
        return ActivationArray(np.zeros((4, 2 * width), np.float32), Layout(segments))

    joined = np.hstack([array("mean"), array("max")])
    assert np.concatenate([array("mean"), array("max")], axis=1).layout == joined.layout
    assert layout_of(np.concatenate([array("mean"), array("max")])) is None
    assert as_lists(joined.layout.layers()) == {
        "layer1_mlp": [0, 1, 2, 6, 7, 8],
        "layer2_mlp": [3, 4, 5, 9, 10, 11],
    }
    for other in (array("mean"), array("max", 4), np.zeros((4, 1), np.float32)):
        assert layout_of(np.hstack([array("mean"), other])) is None


def write(X, key, value):
    X[key] = value


MOVED = {
    "reversed": lambda X: write(X, slice(None), np.asarray(X)[:, ::-1].copy()),
    "reversed in itself": lambda X: write(X, slice(None), X[:, ::-1]),
    "a column over another": lambda X: write(X, np.s_[:, 0], X[:, 1]),
    "two columns swapped": lambda X: write(X, np.s_[:, [0, 1]], X[:, [1, 0]]),
    "a row of other columns": lambda X: write(X, 0, X[1][::-1]),
    "rows of another layout": lambda X: write(
        X, slice(2), ActivationArray(np.asarray(X)[2:4], Layout(LAYOUT.segments[::-1]))
    ),
    "sort": lambda X: X.sort(axis=1),
    "partition": lambda X: X.partition(3, axis=1),
    "put": lambda X: X.put([0, 1], [1, 0]),
    "arithmetic into it": lambda X: np.multiply(X, 2, out=X),
    "copyto": lambda X: np.copyto(X, np.asarray(X)[:, ::-1].copy()),
    "copyto by name": lambda X: np.copyto(src=np.asarray(X)[:, ::-1].copy(), dst=X),
    "concatenate": lambda X: np.concatenate([np.asarray(X)[:, ::-1]], 1, X),
    "putmask": lambda X: np.putmask(X, X > 3, np.asarray(X)[:, ::-1].copy()),
    "place": lambda X: np.place(X, X > 3, [1, 2]),
    "columns taken into it": lambda X: np.take(
        np.asarray(X).copy(), np.arange(X.shape[1])[::-1], axis=1, out=X, mode="clip"
    ),
    "arithmetic at places": lambda X: np.add.at(X, (0, [0, 1]), [1, 2]),
}
STILL = {
    "one value": lambda X: write(X, (3, 3), np.nan),
    "a constant column": lambda X: write(X, np.s_[:, 3], 0),
    "constant rows": lambda X: write(X, slice(2), 0),
    "rows of the same layout": lambda X: write(X, slice(2), X[2:4]),
    "rows in another order": lambda X: write(X, slice(None), X[::-1].copy()),
}


@pytest.mark.parametrize("change", [*MOVED.values(), *STILL.values()], ids=[*MOVED, *STILL])
def test_what_may_move_columns_in_place_drops_the_layout(X, change):
    expected = np.asarray(X).copy()
    change(expected)
    change(X)
    assert X.layout == (None if change in MOVED.values() else LAYOUT)
    np.testing.assert_array_equal(np.asarray(X), expected)


def test_a_number_is_a_number(X):
    assert type(X[1, 2]) is np.float32
    assert type(X.sum()) is np.float32


def test_joblib_memory_gives_the_layout_back(X, tmp_path):
    identity = joblib.Memory(tmp_path, verbose=0).cache(lambda value: value)
    assert identity(X).layout == LAYOUT
    assert identity(X).layout == LAYOUT
    joblib.dump(X, tmp_path / "X.joblib")
    assert joblib.load(tmp_path / "X.joblib").layout == LAYOUT
