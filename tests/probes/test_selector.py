"""What the selector promises, on planted neurons and against scikit-learn's own estimators."""

import pickle

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import sklearn
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skspin import SalientNeuronSelector
from skspin._layout import ActivationArray, Layout, Segment

LAYOUT = Layout(
    tuple(
        Segment(None, layer, "hidden", pool, 10) for layer in range(3) for pool in ("mean", "max")
    )
)  # 3 layers of 20 columns


def planted(n_classes=2, n=400, columns=(7, 25, 47), seed=0):
    """Noise of 60 columns on uneven scales, in which a few columns know the class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    X = rng.normal(size=(n, LAYOUT.n_columns))
    for k, column in enumerate(columns):
        X[:, column] += 3 * (y == k % n_classes)
    X *= 10.0 ** rng.uniform(-2, 2, X.shape[1])
    return ActivationArray(X.astype(np.float32), LAYOUT), y


@pytest.mark.parametrize("n_classes", [2, 3])
def test_planted_neurons_are_found(n_classes):
    X, y = planted(n_classes)
    selector = SalientNeuronSelector(sparsity=0.6, C=0.05).fit(X, y)
    assert {7, 25, 47} <= set(selector.get_support(indices=True))
    assert selector.coef_.shape == (1 if n_classes == 2 else n_classes, X.shape[1])


def test_shuffled_labels_are_not_predictive():
    X, y = planted()
    y = np.random.default_rng(1).permutation(y)
    selector = SalientNeuronSelector(C=0.05).fit(X, y)
    assert selector.layer_scores_.max() < 0.65


def test_layer_scores_tell_the_layer_that_knows():
    X, y = planted(columns=(25,))
    selector = SalientNeuronSelector(C=0.05).fit(X, y)
    assert selector.layer_names_ == ["layer0_hidden", "layer1_hidden", "layer2_hidden"]
    assert selector.layer_scores_.argmax() == 1
    assert selector.layer_scores_[1] > 0.85


@pytest.mark.parametrize("shape", [(700, 300), (6, 5), (6, 40_000)])
def test_columns_are_standardised_as_scikit_learn_does(shape):
    rng = np.random.default_rng(0)
    X = rng.normal(rng.normal(size=shape[1]) * 3, rng.uniform(0.1, 10, shape[1]), shape)
    X[0] *= 100  # an outlier
    y, weight = rng.permutation(np.arange(len(X)) % 2), rng.uniform(0.5, 2, len(X))
    X = X.astype(np.float32)
    Z = StandardScaler().fit(X.astype(np.float64), sample_weight=weight).transform(X)
    selector = SalientNeuronSelector(layer_sizes=None, C=1.0, tol=1e-8, cache=None)
    coef = selector.fit(X, y, weight).coef_
    expected = selector.set_params(standardize=False).fit(Z, y, weight).coef_
    np.testing.assert_allclose(coef, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_torch_selects_what_numpy_selects(penalty):
    X, y = planted(3)
    settings = {"C": 0.3, "penalty": penalty, "tol": 1e-6, "cache": None}
    by_numpy = SalientNeuronSelector(**settings).fit(X, y)
    by_torch = SalientNeuronSelector(**settings, device="cpu").fit(X, y)
    np.testing.assert_array_equal(by_torch.support_, by_numpy.support_)
    np.testing.assert_allclose(by_torch.coef_, by_numpy.coef_, atol=1e-4)
    assert by_torch.dual_gap_.max() <= 1e-6


@pytest.mark.parametrize(("salience", "power"), [("squared", 2), ("absolute", 1)])
def test_each_layer_keeps_the_fewest_neurons_that_hold_its_share(salience, power):
    X, y = planted(3)
    selector = SalientNeuronSelector(sparsity=0.3, C=1.0, salience=salience).fit(X, y)
    np.testing.assert_allclose(selector.salience_, (abs(selector.coef_) ** power).sum(axis=0))
    for number, columns in enumerate([slice(0, 20), slice(20, 40), slice(40, 60)]):
        own, kept = selector.salience_[columns], selector.support_[columns]
        assert own[kept].sum() >= 0.7 * own.sum() * (1 - 1e-9)
        assert own[kept].sum() - own[kept].min() < 0.7 * own.sum()
        assert own[kept].min() >= own[~kept].max()
        assert selector.n_selected_[number] == kept.sum()
    assert selector.sparsity_ == pytest.approx(1 - selector.support_.mean())


def test_count_rule_keeps_the_same_number_in_each_layer():
    selector = SalientNeuronSelector(0.75, criterion="count", penalty="l2", C=1.0)
    assert selector.fit(*planted()).n_selected_.tolist() == [5, 5, 5]
    assert selector.sparsity_ == pytest.approx(0.75)


def test_max_layer_uses_the_first_layers_only():
    X, y = planted()
    every = SalientNeuronSelector().fit(X, y)
    first = SalientNeuronSelector(max_layer=1).fit(X, y)
    np.testing.assert_array_equal(first.support_[:40], every.support_[:40])
    assert not first.support_[40:].any()
    assert len(first.layer_scores_) == 2
    with pytest.raises(ValueError, match="max_layer=0 leaves no layer: the first in X is layer 1"):
        SalientNeuronSelector(max_layer=0).fit(
            ActivationArray(np.asarray(X)[:, :4], Layout((Segment(None, 1, "mlp", "mean", 4),))), y
        )


@pytest.mark.parametrize("sizes", [20, [20, 20, 20], np.array([20, 20, 20])])
def test_layer_sizes_of_a_plain_array_do_what_the_layout_does(sizes):
    X, y = planted()
    carried = SalientNeuronSelector().fit(X, y)
    told = SalientNeuronSelector(layer_sizes=sizes).fit(np.asarray(X), y)
    np.testing.assert_array_equal(told.support_, carried.support_)


def as_frame(X, order=slice(None), library=pd.DataFrame):
    names = LAYOUT.feature_names()[order]
    return library({name: X[:, LAYOUT.feature_names() == name][:, 0] for name in names})


@pytest.mark.parametrize("library", [pd.DataFrame, pl.DataFrame, pa.table])
def test_a_frame_knows_its_layers_by_name(library):
    X, y = planted()
    X = np.asarray(X)
    frame = as_frame(X, library=library)
    selector = SalientNeuronSelector().fit(frame, y)
    array = SalientNeuronSelector().fit(ActivationArray(X, LAYOUT), y)
    np.testing.assert_array_equal(selector.support_, array.support_)
    assert selector.layer_names_ == array.layer_names_
    names = LAYOUT.feature_names()[selector.support_].tolist()
    assert selector.get_feature_names_out().tolist() == names
    if library is pd.DataFrame:
        selector.set_output(transform="pandas")
        assert selector.transform(frame).columns.tolist() == names


ORDERS = {
    "backwards": np.arange(60)[::-1],
    "interleaved": np.arange(60).reshape(6, 10).T.ravel(),
    "shuffled": np.random.default_rng(0).permutation(60),
}


@pytest.mark.parametrize("criterion", ["salience", "count"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_order_of_columns_changes_nothing(order, criterion):
    X, y = planted(3)
    sorted_, settings = as_frame(np.asarray(X)), {"criterion": criterion, "penalty": "l2"}
    known = SalientNeuronSelector(**settings).fit(sorted_, y)
    found = SalientNeuronSelector(**settings).fit(sorted_.iloc[:, order], y)
    assert found.layer_names_ == known.layer_names_
    for name in ("layer_scores_", "C_", "n_selected_", "dual_gap_"):
        np.testing.assert_array_equal(getattr(found, name), getattr(known, name))
    for name in ("coef_", "salience_", "support_"):
        np.testing.assert_array_equal(getattr(found, name), getattr(known, name)[..., order])
    for there, here in zip(found.layer_columns_, known.layer_columns_, strict=True):
        np.testing.assert_array_equal(order[there], here)
    unpickled = pickle.loads(pickle.dumps(found))
    for there, here in zip(unpickled.layer_columns_, found.layer_columns_, strict=True):
        assert there.dtype.kind == here.dtype.kind == "i"
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("seen", ["array", "frame"])
@pytest.mark.parametrize("given", ["array", "frame"])
def test_activations_of_another_layout_are_refused(seen, given):
    X, y = planted()
    selector = SalientNeuronSelector().fit(X if seen == "array" else as_frame(np.asarray(X)), y)
    other = ActivationArray(np.asarray(X), Layout(LAYOUT.segments[::-1]))
    if given == "frame":
        other = pd.DataFrame(np.asarray(X), columns=other.layout.feature_names())
    message = "0 is 'layer2_hidden_max_0', but was 'layer0_hidden_mean_0'.*fit it again"
    if seen == given == "frame":
        message = "feature names should match"  # scikit-learn's own words
    with pytest.raises(ValueError, match=message):
        selector.transform(other)


def test_a_plain_array_is_taken_at_its_word():
    X, y = planted()
    plain = np.asarray(X)
    told = SalientNeuronSelector(layer_sizes=20).fit(plain, y)
    np.testing.assert_array_equal(told.transform(X), told.transform(plain))
    known = SalientNeuronSelector().fit(X, y)
    np.testing.assert_array_equal(known.transform(plain), known.transform(X))


def test_an_array_without_layers_is_one_layer_with_a_warning():
    X, y = planted()
    scaled = StandardScaler().fit_transform(X)
    with pytest.warns(UserWarning, match="carries no layers.*layer_sizes"):
        warned = SalientNeuronSelector().fit(scaled, y)
    told = SalientNeuronSelector(layer_sizes=None).fit(scaled, y)
    assert warned.layer_names_ == told.layer_names_ and len(told.layer_names_) == 1


@pytest.mark.parametrize("sizes", [7, [20, 20], [20, 20, 21]])
def test_layer_sizes_must_add_up(sizes):
    X, y = planted()
    with pytest.raises(ValueError, match="columns, but X has 60"):
        SalientNeuronSelector(layer_sizes=sizes).fit(X, y)


def test_of_several_C_each_layer_takes_the_best_on_the_validation_part():
    X, y = planted(columns=(7,))
    several = SalientNeuronSelector(C=[0.02, 0.05, 10.0]).fit(X, y)
    single = {C: SalientNeuronSelector(C=C).fit(X, y) for C in (0.02, 0.05, 10.0)}
    for layer in range(3):
        scores = {C: selector.layer_scores_[layer] for C, selector in single.items()}
        assert several.layer_scores_[layer] == max(scores.values())
        assert several.C_[layer] == min(C for C in scores if scores[C] == max(scores.values()))
        columns = slice(20 * layer, 20 * layer + 20)
        chosen = single[several.C_[layer]]
        np.testing.assert_allclose(several.coef_[:, columns], chosen.coef_[:, columns], atol=5e-3)


def test_neurons_of_every_label_are_found_and_a_label_that_never_varies_is_left_out():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (400, 3)) * [1, 1, 0]
    X = rng.normal(size=(400, 40)).astype(np.float32)
    X[:, [3, 30]] += 3 * y[:, :2]
    selector = SalientNeuronSelector(0.5, C=0.05, layer_sizes=20).fit(X, y)
    assert selector.get_support(indices=True).tolist() == [3, 30]
    assert selector.coef_.shape == (3, 40) and not selector.coef_[2].any()
    assert selector.classes_.tolist() == [0, 1, 2]


def test_sample_weights_are_routed_through_a_pipeline():
    X, y = planted()
    weight = np.where(np.arange(len(y)) < 200, 1.0, 0.0)
    with sklearn.config_context(enable_metadata_routing=True):
        selector = SalientNeuronSelector().set_fit_request(sample_weight=True)
        head = LogisticRegression().set_fit_request(sample_weight=False)
        pipeline = make_pipeline(selector, head).fit(X, y, sample_weight=weight)
    direct = SalientNeuronSelector().fit(X, y, sample_weight=weight)
    np.testing.assert_array_equal(pipeline[0].support_, direct.support_)


NOISE = 0.1 * np.random.default_rng(0).normal(size=400)
SPOILT = {
    "constant": lambda y: 5.0,
    "zero": lambda y: 0.0,
    "constant and large": lambda y: -1e6,
    "rounding": lambda y: np.where(y == 1, 5.0, np.nextafter(np.float32(5), np.float32(6))),
    "dead": lambda y: 1e-31 * NOISE,
    "nearly dead": lambda y: 1e-5 * (y + NOISE),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_column_without_digits_to_tell_is_never_salient(name):
    X, y = planted()
    X = np.array(X)
    X[:, 21] = SPOILT[name](y)
    selector = SalientNeuronSelector(0.0, C=10.0, layer_sizes=20).fit(X, y)
    assert selector.salience_[21] == 0
    assert np.isfinite(selector.coef_).all() and selector.dual_gap_.max() <= 1e-3
    if name == "nearly dead":  # in float64 there are digits enough to tell
        assert selector.fit(X.astype(np.float64), y).salience_[21] > 0


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("shift", [1e6, -1e9])
def test_float64_columns_may_be_far_from_zero(shift, standardize):
    X, y = planted()
    X = np.array(X, dtype=np.float64)
    selector = SalientNeuronSelector(0.0, C=1.0, layer_sizes=20, standardize=standardize)
    expected = selector.fit(X, y).coef_
    np.testing.assert_allclose(selector.fit(X + shift, y).coef_, expected, atol=1e-4)


@pytest.mark.parametrize("change", [pl.DataFrame, np.ndarray.tolist, lambda X: X.astype(">f8")])
def test_float64_in_any_container_keeps_its_digits(change):
    X, y = planted()
    X = np.array(X, dtype=np.float64) + 1e7
    selector = SalientNeuronSelector(layer_sizes=20)
    expected = selector.fit(X, y).coef_
    np.testing.assert_allclose(selector.fit(change(X), y).coef_, expected, atol=1e-5)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_a_large_constant_is_no_signal_without_standardising(penalty):
    X, y = planted()
    X = np.array(X)
    X[:, 0] = 1e5
    selector = SalientNeuronSelector(
        0.0, C=100.0, penalty=penalty, layer_sizes=None, standardize=False
    )
    assert selector.fit(X, y).dual_gap_.max() <= 1e-3
    assert not selector.coef_[0, 0]


def test_a_row_is_left_to_fit_probes_to():
    X, y = np.random.default_rng(0).normal(size=(10, 3)), np.arange(10) % 2
    with pytest.raises(ValueError, match="validation_fraction=0.95 holds out all 10.* smaller"):
        SalientNeuronSelector(layer_sizes=None, validation_fraction=0.95).fit(X, y)


def test_one_column_is_selected_where_no_probe_has_weight():
    X, y = planted()
    with pytest.warns(UserWarning, match="No probe puts weight on any column.*larger C"):
        selector = SalientNeuronSelector(C=1e-7).fit(X, y)
    assert selector.get_support(indices=True).tolist() == [0]


def test_a_layer_whose_probe_is_all_zero_gives_no_neuron():
    X, y = planted(columns=(7,))
    selector = SalientNeuronSelector(C=0.015).fit(X, y)
    assert selector.n_selected_.tolist() == [1, 0, 0]


def test_selected_columns_come_out_as_they_went_in():
    X, y = planted()
    selector = SalientNeuronSelector().fit(X, y)
    kept = selector.transform(X)
    np.testing.assert_array_equal(kept, np.asarray(X)[:, selector.support_])
    assert kept.dtype == np.float32
    back = selector.inverse_transform(kept)
    np.testing.assert_array_equal(back[:, selector.support_], kept)
    assert not back[:, ~selector.support_].any()
    names = selector.get_feature_names_out(LAYOUT.feature_names())
    assert names.tolist() == LAYOUT.feature_names()[selector.support_].tolist()


def test_a_refit_forgets_the_fit_before():
    X, y = planted()
    selector = SalientNeuronSelector().fit(X, y)
    Z, z = make_classification(n_features=12, random_state=0)
    selector.set_params(layer_sizes=None).fit(Z, z)
    fresh = clone(selector).fit(Z, z)
    assert vars(selector).keys() == vars(fresh).keys()
    np.testing.assert_array_equal(selector.support_, fresh.support_)


def test_what_did_not_converge_is_named():
    X, y = planted()
    with pytest.warns(ConvergenceWarning, match="layer0_hidden.*Increase max_iter"):
        SalientNeuronSelector(C=1e4, tol=1e-12, max_iter=2).fit(X, y)
    with pytest.warns(
        ConvergenceWarning, match="Increase tol, or lower C"
    ):  # more steps don't help
        SalientNeuronSelector(C=1e4, tol=1e-15).fit(X, y)


def test_cross_validation_on_activations_knows_their_layers():
    X, y = planted()
    pipeline = make_pipeline(SalientNeuronSelector(), StandardScaler(), LogisticRegression())
    search = GridSearchCV(pipeline, {"salientneuronselector__max_layer": [0, 1, 2]}, cv=3)
    search.fit(X, y)
    assert len(search.best_estimator_[0].layer_names_) >= 2
    assert search.best_score_ > 0.95
