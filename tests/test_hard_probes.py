"""Probes reach the minimum on shapes and numbers that real activations seldom have."""

import numpy as np
import pytest
from test_probes import TOL, lowest_objective, objective, relative_gap

from skspin._probes import solve_probes


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
