"""Probes reach the minimum that an independent oracle finds, and say how near they are."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from skspin._probes import solve_probes

TOL = 1e-3


def objective(Z, t, s, C, coef, intercept, penalty="l1"):
    """The objective as written in the documentation, in float64."""
    loss = C * (s @ np.logaddexp(0, -t * (Z @ coef + intercept)))
    return loss + (np.abs(coef).sum() if penalty == "l1" else coef @ coef / 2)


def lowest_objective(Z, t, s, C, penalty="l1"):
    """Minimise with L-BFGS-B over positive and negative parts of the weights."""
    d = Z.shape[1]

    def value_and_gradient(v):
        w = v[:d] - v[d:-1]
        margins = t * (Z @ w + v[-1])
        slope = -C * s * t * np.exp(-np.logaddexp(0, margins))
        gradient = Z.T @ slope
        if penalty == "l1":
            value, own = v[:-1].sum(), np.ones(2 * d)
            gradient = np.r_[gradient, -gradient] + own
        else:
            value, gradient = w @ w / 2, np.r_[gradient + w, -gradient - w]
        return C * (s @ np.logaddexp(0, -margins)) + value, np.r_[gradient, slope.sum()]

    bounds = [(0, None)] * (2 * d) + [(None, None)]
    options = {"maxiter": 3000, "maxfun": 3000, "ftol": 1e-15, "gtol": 1e-10}
    return minimize(
        value_and_gradient,
        np.zeros(2 * d + 1),
        jac=True,
        bounds=bounds,
        method="L-BFGS-B",
        options=options,
    ).fun


def relative_gap(Z, t, s, C, coef, intercept, penalty="l1"):
    """Bound the distance from the minimum by a dual point, in float64."""
    p = np.exp(-np.logaddexp(0, t * (Z @ coef + intercept)))
    gradient = -Z.T @ (C * s * t * p)
    theta = p / max(1, np.abs(gradient).max()) if penalty == "l1" else p
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.nan_to_num(theta * np.log(theta) + (1 - theta) * np.log1p(-theta))
    dual = -C * (s @ terms) - (0 if penalty == "l1" else gradient @ gradient / 2)
    primal = objective(Z, t, s, C, coef, intercept, penalty)
    return (primal - max(dual, 0)) / primal


@st.composite
def problem_sets(draw):
    """Three problems on the same columns, with all that makes such problems hard."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d = draw(st.integers(4, 50)), draw(st.integers(1, 30))
    X = rng.normal(size=(n, d)) * draw(st.sampled_from([0.01, 1.0, 100.0]))
    X += draw(st.sampled_from([0.0, 3.0])) * X.std()
    if draw(st.booleans()):
        X[:, -1] = X[:, 0]
    if draw(st.booleans()):
        X[:, d // 2] = 7.0
    X = X.astype(np.float32)
    labels = draw(st.sampled_from(["separable", "noisy", "imbalanced"]))
    direction = (X - X.mean(axis=0)) @ rng.normal(size=(d, 3))
    noise = rng.normal(size=direction.shape) * direction.std() if labels == "noisy" else 0
    targets = np.where(direction + noise > 0, 1, -1)
    if labels == "imbalanced":
        targets[:] = -1
        targets[rng.integers(n, size=3), range(3)] = 1
    C = 10.0 ** np.array(draw(st.tuples(*[st.floats(-3, 3)] * 3)))
    weights = rng.random((n, 3)) * (rng.random((n, 3)) < 0.7) if draw(st.booleans()) else None
    mean = X.mean(axis=0, dtype=np.float64)
    scale = X.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6 * (1 + np.abs(mean))] = 1
    return X, targets, C, weights, mean, scale


def each_problem(X, targets, C, weights, mean, scale):
    weights = np.ones(targets.shape) if weights is None else weights
    Z = (X.astype(np.float64) - mean) / scale
    for p in range(targets.shape[1]):
        if len(set(targets[weights[:, p] > 0, p])) == 2:
            yield p, (Z, targets[:, p], weights[:, p], C[p])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem_sets(), st.sampled_from(["l1", "l1", "l1", "l2"]))
def test_objective_is_within_tol_of_the_minimum_and_the_gap_is_true(problems, penalty):
    X, targets, C, weights, mean, scale = problems
    found = solve_probes(
        X, targets, C=C, sample_weight=weights, mean=mean, scale=scale, penalty=penalty, tol=TOL
    )
    assert (found.dual_gap <= TOL).all()
    for p, problem in each_problem(*problems):
        here = objective(*problem, found.coef[p], found.intercept[p], penalty)
        lowest = lowest_objective(*problem, penalty)
        assert here <= lowest * (1 + TOL)
        assert here * (1 - found.dual_gap[p]) <= lowest * (1 + 1e-9)
        gap = relative_gap(*problem, found.coef[p], found.intercept[p], penalty)
        assert found.dual_gap[p] == pytest.approx(gap, rel=1e-2, abs=1e-6)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem_sets())
def test_support_agrees_where_optimality_is_strict(problems):
    X, targets, C, weights, mean, scale = problems
    options = {"mean": mean, "scale": scale, "tol": 1e-8}
    found = solve_probes(X, targets, C=C, sample_weight=weights, **options)
    for p, (Z, t, s, c) in each_problem(*problems):
        margins = t * (Z @ found.coef[p] + found.intercept[p])
        slack = 1 - np.abs(Z.T @ (c * s * t * np.exp(-np.logaddexp(0, margins))))
        assert (found.coef[p][slack > 1e-3] == 0).all()
        np.testing.assert_allclose(slack[found.coef[p] != 0], 0, atol=1e-3)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem_sets())
def test_other_problems_change_nothing(problems):
    X, targets, C, weights, mean, scale = problems
    options = {"mean": mean, "scale": scale, "tol": 1e-9}
    together = solve_probes(X, targets, C=C, sample_weight=weights, **options)
    for p, problem in each_problem(*problems):
        own = slice(p, p + 1)
        alone = solve_probes(
            X,
            targets[:, own],
            C=C[own],
            sample_weight=None if weights is None else weights[:, own],
            **options,
        )
        # Duplicate columns share their weight as they like; what rows get is unique.
        Z = problem[0]
        np.testing.assert_allclose(
            Z @ together.coef[p] + together.intercept[p],
            Z @ alone.coef[0] + alone.intercept[0],
            rtol=1e-3,
            atol=1e-3,
        )


def two_classes(n=300, d=40, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)).astype(np.float32)
    return X, np.where(X[:, :3].sum(axis=1) + rng.normal(size=n) > 0, 1, -1)[:, None]


@pytest.mark.parametrize("C", [0.001, 0.1, 10.0])
def test_l2_agrees_with_logistic_regression(C):
    X, targets = two_classes()
    found = solve_probes(X, targets, C=C, penalty="l2", tol=1e-9)
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10)
    model.fit(X.astype(np.float64), targets[:, 0])
    np.testing.assert_allclose(found.coef, model.coef_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.intercept, model.intercept_, rtol=1e-4, atol=1e-6)


def test_a_row_of_weight_zero_is_no_row():
    X, targets = two_classes()
    weights = np.r_[np.ones(200), np.zeros(100)]
    by_weight = solve_probes(X, targets, C=0.1, sample_weight=weights, tol=1e-8)
    by_rows = solve_probes(X[:200], targets[:200], C=0.1, tol=1e-8)
    np.testing.assert_allclose(by_weight.coef, by_rows.coef, atol=1e-6)


def test_a_weight_of_two_is_two_rows():
    X, targets = two_classes()
    by_weight = solve_probes(X, targets, C=0.1, sample_weight=np.full(300, 2.0), tol=1e-8)
    twice = solve_probes(np.r_[X, X], np.r_[targets, targets], C=0.1, tol=1e-8)
    np.testing.assert_allclose(by_weight.coef, twice.coef, atol=1e-6)


def test_standardising_in_passing_is_standardising_before():
    X, targets = two_classes()
    X = X * np.linspace(0.1, 50, 40, dtype=np.float32) + np.float32(20)
    mean, scale = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
    before = X.copy()
    found = solve_probes(X, targets, C=0.1, mean=mean, scale=scale, tol=1e-6)
    Z = ((X - mean) / scale).astype(np.float32)
    np.testing.assert_allclose(
        found.coef, solve_probes(Z, targets, C=0.1, tol=1e-6).coef, atol=1e-4
    )
    np.testing.assert_array_equal(X, before)


def test_gap_is_true_where_float32_is_not_enough():
    X, targets = two_classes()
    X = X * np.float32(1e-3) + np.float32(1000)  # a column has a dozen values left
    mean, scale = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
    found = solve_probes(X, targets, C=10.0, mean=mean, scale=scale, tol=1e-6)
    Z = (X.astype(np.float64) - mean) / scale
    gap = relative_gap(Z, targets[:, 0], np.ones(300), 10.0, found.coef[0], found.intercept[0])
    assert gap <= 1e-6


def test_a_problem_that_is_given_up_says_so():
    X, targets = two_classes()
    found = solve_probes(X, targets, C=1.0, max_iter=1)
    assert found.dual_gap[0] > TOL
    assert found.n_iter[0] == 1


def test_below_the_smallest_useful_C_all_weights_are_zero():
    X, targets = two_classes()
    found = solve_probes(X, targets, C=1e-4)
    assert not found.coef.any()
    share = (targets > 0).mean()
    np.testing.assert_allclose(found.intercept, np.log(share / (1 - share)))


@pytest.mark.parametrize("side", [1, -1])
def test_one_side_is_fitted_by_the_intercept_alone(side):
    X, targets = two_classes()
    found = solve_probes(X, targets, C=1.0, sample_weight=(targets[:, 0] == side).astype(float))
    assert found.intercept[0] == side * np.inf
    assert not found.coef.any()
    assert found.dual_gap[0] == 0


def test_no_weight_at_all_is_solved_by_zero():
    X, targets = two_classes()
    found = solve_probes(X, targets, C=1.0, sample_weight=np.zeros(300))
    assert not found.coef.any()
    assert found.intercept[0] == 0


def test_columns_of_a_wide_array_on_disk_are_read_as_they_are(tmp_path):
    X, targets = two_classes()
    wide = np.memmap(tmp_path / "wide", dtype=np.float32, mode="w+", shape=(300, 80))
    wide[:, 20:60] = X
    on_disk = solve_probes(wide[:, 20:60], targets, C=0.1)
    np.testing.assert_allclose(on_disk.coef, solve_probes(X, targets, C=0.1).coef, atol=1e-6)


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_torch_finds_what_numpy_finds(penalty):
    pytest.importorskip("torch")
    X, targets = two_classes()
    mean, scale = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
    options = {"C": 0.3, "penalty": penalty, "mean": mean, "scale": scale, "tol": 1e-6}
    weights = np.r_[np.ones(200), np.zeros(100)]
    by_numpy = solve_probes(X, targets, sample_weight=weights, **options)
    by_torch = solve_probes(X, targets, sample_weight=weights, device="cpu", **options)
    np.testing.assert_allclose(by_torch.coef, by_numpy.coef, atol=1e-4)
    assert (by_torch.dual_gap <= 1e-6).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"C": [0.1, 0.2]}, "one for each of the 1 problems"),
        ({"C": -1.0}, "positive number"),
        ({"penalty": "elastic"}, "penalty='elastic' must be one of"),
        ({"sample_weight": np.full(300, -1.0)}, "not negative"),
        ({"sample_weight": np.ones(3)}, "sample_weight has shape"),
        ({"scale": np.zeros(40)}, "inf leaves a column out"),
        ({"targets": np.zeros((300, 1))}, r"\+1 or -1"),
        ({"targets": np.ones(300)}, "n_texts, n_problems"),
    ],
)
def test_what_cannot_be_solved_is_refused(change, message):
    X, targets = two_classes()
    with pytest.raises(ValueError, match=message):
        solve_probes(X, **{"targets": targets, "C": 0.1, **change})


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_values_that_are_not_finite_are_refused():
    X, targets = two_classes()
    X[3, 5] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        solve_probes(X, targets, C=0.1)


# Shapes and numbers that real activations seldom have


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def coin_flips(n, n_problems=1):
    return np.where(np.random.default_rng(1).random((n, n_problems)) < 0.5, -1, 1)


def first_column_decides(X):
    return np.where(X[:, :1] > 0, 1, -1)


def one_of_many(n):
    return np.where(np.arange(n) == 0, 1, -1)[:, None]


SQUARE = normal(60, 20)
SHAPES = {
    "two rows": (normal(2, 5), np.array([[1], [-1]])),
    "one column": (normal(50, 1), coin_flips(50)),
    "constant": (np.full((40, 6), 3.3), coin_flips(40)),
    "unrelated": (SQUARE, coin_flips(60)),
    "separable": (SQUARE, first_column_decides(SQUARE)),
    "a hundred columns per row": (normal(5, 500), coin_flips(5)),
    "repeated rows": (np.repeat(normal(5, 8), 20, axis=0), coin_flips(100)),
    "repeated columns": (np.repeat(normal(50, 4), 6, axis=1), coin_flips(50)),
    "one positive row": (normal(200, 10), one_of_many(200)),
    "one huge row": (np.where(np.arange(100)[:, None] == 3, 1e6, normal(100, 5)), coin_flips(100)),
    "far from zero": (normal(100, 5) + 1e4, coin_flips(100)),
}


def standardised(X):
    X = X.astype(np.float32)
    mean, scale = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6 * np.abs(mean)] = 1
    return X, mean, scale


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize("C", [1e-8, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_solved_at_every_cost(shape, C, penalty):
    X, targets = SHAPES[shape]
    X, mean, scale = standardised(X)
    found = solve_probes(X, targets, C=C, mean=mean, scale=scale, penalty=penalty, max_iter=1000)
    Z = (X.astype(np.float64) - mean) / scale
    problem = Z, targets[:, 0], np.ones(len(X)), C
    here = objective(*problem, found.coef[0], found.intercept[0], penalty)
    assert found.dual_gap[0] <= TOL
    assert here <= lowest_objective(*problem, penalty) * (1 + TOL)


@pytest.mark.parametrize("C", [10.0, 1000.0])
def test_columns_of_low_rank_are_solved_at_large_costs(C):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1500, 20)) @ rng.normal(size=(20, 200))
    X += 1e-3 * rng.normal(size=X.shape)
    targets = np.where(X[:, :1] + 5 * rng.normal(size=(1500, 1)) > 0, 1, -1)
    X, mean, scale = standardised(X)
    found = solve_probes(X, targets, C=C, mean=mean, scale=scale, max_iter=1000)
    Z = (X.astype(np.float64) - mean) / scale
    weights = np.ones(len(X))
    gap = relative_gap(Z, targets[:, 0], weights, C, found.coef[0], found.intercept[0])
    assert gap <= TOL
    assert found.n_iter[0] < 100


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_scales_that_float32_cannot_square_change_nothing(penalty):
    targets = coin_flips(200)
    found = []
    for scale in (1.0, 1e30):
        X, mean, spread = standardised(normal(200, 25) * np.geomspace(1, scale, 25))
        options = {"C": 0.3, "mean": mean, "scale": spread, "penalty": penalty, "tol": 1e-6}
        found.append(solve_probes(X, targets, **options))
        assert (found[-1].dual_gap <= 1e-6).all()
    np.testing.assert_allclose(found[1].coef, found[0].coef, atol=1e-3)


@pytest.mark.parametrize("weight", [1e-300, 1e-12, 1e8])
def test_tiny_and_huge_weights_are_solved(weight):
    weights = np.full(100, weight)
    X, targets = normal(100, 8).astype(np.float32), coin_flips(100)
    found = solve_probes(X, targets, C=1.0, sample_weight=weights)
    assert found.dual_gap[0] <= TOL
    assert np.isfinite(found.coef).all() and np.isfinite(found.intercept).all()


def test_five_hundred_problems_are_each_solved_as_if_alone():
    X, targets = normal(80, 30).astype(np.float32), coin_flips(80, 500)
    C = 10.0 ** np.random.default_rng(2).uniform(-4, 2, 500)
    together = solve_probes(X, targets, C=C, tol=1e-9)
    assert (together.dual_gap <= 1e-9).all()
    for p in (0, 250, 499):
        alone = solve_probes(X, targets[:, [p]], C=C[p], tol=1e-9)
        np.testing.assert_allclose(together.coef[p], alone.coef[0], atol=1e-3)


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda X: X.astype(np.float16),
        lambda X: X.astype(np.float64),
        np.asfortranarray,
        lambda X: np.repeat(X, 2, axis=0)[::2],
        lambda X: X[::-1][::-1],
    ],
    ids=["float16", "float64", "Fortran", "every second row", "backwards"],
)
def test_how_activations_lie_in_memory_does_not_matter(lay_out):
    X = normal(80, 30).astype(np.float16).astype(np.float32)  # what float16 holds, too
    targets = coin_flips(80)
    as_they_are = solve_probes(X, targets, C=0.3)
    np.testing.assert_array_equal(solve_probes(lay_out(X), targets, C=0.3).coef, as_they_are.coef)


def test_a_problem_of_one_side_does_not_disturb_others():
    X, sides = normal(100, 5).astype(np.float32), coin_flips(100)
    weights = np.hstack([sides > 0, np.ones((100, 1))]).astype(float)
    found = solve_probes(X, np.hstack([sides, sides]), C=0.1, sample_weight=weights)
    alone = solve_probes(X, sides, C=0.1)
    assert found.intercept[0] == np.inf and not found.coef[0].any()
    np.testing.assert_allclose(found.coef[1], alone.coef[0], atol=1e-6)
