"""Probes reach the minimum that an independent oracle finds, and say how near they are."""

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from skspin._probes import solve_probes

TOL = 1e-3


@dataclass
class Problems:
    """Problems on the same columns, and what the documentation says of each, in float64."""

    X: np.ndarray
    targets: np.ndarray
    C: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    penalty: str = "l1"

    def solve(self, own=slice(None), **options):
        return solve_probes(
            self.X,
            self.targets[:, own],
            C=self.C[own],
            sample_weight=self.weights[:, own],
            mean=self.mean,
            scale=self.scale,
            penalty=self.penalty,
            **{"max_iter": 1000, **options},
        )

    def __post_init__(self):
        self.Z = (self.X.astype(np.float64) - self.mean) / self.scale

    def two_sided(self):
        """Number the problems in which both sides have weight."""
        sides = zip(self.targets.T, self.weights.T, strict=True)
        return [p for p, (t, s) in enumerate(sides) if len(set(t[s > 0])) == 2]

    def misfit(self, p, coef, intercept):
        """Compute the probability of the other sign, and the loss's gradient."""
        margins = self.targets[:, p] * (self.Z @ coef + intercept)
        misfit = np.exp(-np.logaddexp(0, margins))
        slope = -self.C[p] * self.weights[:, p] * self.targets[:, p] * misfit
        return misfit, slope

    def objective(self, p, coef, intercept):
        margins = self.targets[:, p] * (self.Z @ coef + intercept)
        loss = self.C[p] * (self.weights[:, p] @ np.logaddexp(0, -margins))
        return loss + (np.abs(coef).sum() if self.penalty == "l1" else coef @ coef / 2)

    def lowest_objective(self, p):
        """Minimise with L-BFGS-B over positive and negative parts of the weights."""
        d = self.Z.shape[1]

        def value_and_gradient(v):
            w = v[:d] - v[d:-1]
            slope = self.misfit(p, w, v[-1])[1]
            gradient = self.Z.T @ slope
            value = self.objective(p, w, v[-1])
            if self.penalty == "l1":
                value += v[:-1].sum() - np.abs(w).sum()
                gradient = np.r_[gradient, -gradient] + 1
            else:
                gradient = np.r_[gradient + w, -gradient - w]
            return value, np.r_[gradient, slope.sum()]

        return minimize(
            value_and_gradient,
            np.zeros(2 * d + 1),
            jac=True,
            bounds=[(0, None)] * (2 * d) + [(None, None)],
            method="L-BFGS-B",
            options={"maxiter": 3000, "maxfun": 3000, "ftol": 1e-15, "gtol": 1e-10},
        ).fun

    def relative_gap(self, p, coef, intercept):
        """Bound the distance from the minimum by a dual point."""
        misfit, slope = self.misfit(p, coef, intercept)
        gradient = self.Z.T @ slope
        theta = misfit / max(1, np.abs(gradient).max()) if self.penalty == "l1" else misfit
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.nan_to_num(theta * np.log(theta) + (1 - theta) * np.log1p(-theta))
        dual = -self.C[p] * (self.weights[:, p] @ terms)
        dual -= 0 if self.penalty == "l1" else gradient @ gradient / 2
        primal = self.objective(p, coef, intercept)
        return (primal - max(dual, 0)) / primal

    def check(self, found):
        """Compare what was found at the tolerance TOL to the oracles."""
        assert (found.dual_gap <= TOL).all()
        for p in self.two_sided():
            here = self.objective(p, found.coef[p], found.intercept[p])
            lowest = self.lowest_objective(p)
            assert here <= lowest * (1 + TOL)
            assert here * (1 - found.dual_gap[p]) <= lowest * (1 + 1e-9)
            gap = self.relative_gap(p, found.coef[p], found.intercept[p])
            assert found.dual_gap[p] == pytest.approx(gap, rel=1e-2, abs=1e-6)


def standardised(X, targets, C=1.0, weights=1.0, penalty="l1"):
    X = X.astype(np.float32)
    mean, scale = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6 * (1 + np.abs(mean))] = 1
    weights = np.broadcast_to(weights, targets.shape)
    C = np.broadcast_to(C, targets.shape[1])
    return Problems(X, targets, C, weights, mean, scale, penalty)


@st.composite
def problem_sets(draw, penalties=("l1",)):
    """Three problems on the same columns, with all that makes such problems hard."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d = draw(st.integers(4, 50)), draw(st.integers(1, 30))
    X = rng.normal(size=(n, d)) * draw(st.sampled_from([0.01, 1.0, 100.0]))
    X += draw(st.sampled_from([0.0, 3.0])) * X.std()
    if draw(st.booleans()):
        X[:, -1] = X[:, 0]
    if draw(st.booleans()):
        X[:, d // 2] = 7.0
    labels = draw(st.sampled_from(["separable", "noisy", "imbalanced"]))
    direction = (X - X.mean(axis=0)) @ rng.normal(size=(d, 3))
    noise = rng.normal(size=direction.shape) * direction.std() if labels == "noisy" else 0
    targets = np.where(direction + noise > 0, 1, -1)
    if labels == "imbalanced":
        targets[:] = -1
        targets[rng.integers(n, size=3), range(3)] = 1
    C = 10.0 ** np.array(draw(st.tuples(*[st.floats(-3, 3)] * 3)))
    weights = rng.random((n, 3)) * (rng.random((n, 3)) < 0.7) if draw(st.booleans()) else 1.0
    return standardised(X, targets, C, weights, draw(st.sampled_from(penalties)))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem_sets(penalties=["l1", "l1", "l1", "l2"]))
def test_objective_is_within_tol_of_the_minimum_and_the_gap_is_true(problems):
    before = problems.X.copy()
    found = problems.solve(tol=TOL)
    problems.check(found)
    expected = problems.Z @ found.coef.T + found.intercept
    np.testing.assert_allclose(found.decisions.T, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(problems.X, before)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem_sets())
def test_a_support_is_optimal_and_other_problems_change_nothing(problems):
    together = problems.solve(tol=1e-9)
    for p in problems.two_sided():
        alone = problems.solve(slice(p, p + 1), tol=1e-9)
        # Duplicate columns share their weight as they like; what rows get is unique.
        np.testing.assert_allclose(together.decisions[p], alone.decisions[0], rtol=1e-3, atol=1e-3)
        slope = problems.misfit(p, together.coef[p], together.intercept[p])[1]
        slack = 1 - np.abs(problems.Z.T @ slope)
        assert (together.coef[p][slack > 1e-3] == 0).all()
        np.testing.assert_allclose(slack[together.coef[p] != 0], 0, atol=1e-3)


# Shapes and numbers that real activations seldom have


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def coin_flips(n, n_problems=1):
    return np.where(np.random.default_rng(1).random((n, n_problems)) < 0.5, -1, 1)


def first_column_decides(X, noise=0):
    return np.where(X[:, :1] + noise * coin_flips(len(X)) > 0, 1, -1)


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


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_solved_at_every_cost(shape, penalty):
    X, targets = SHAPES[shape]
    costs = np.array([1e-8, 1e-3, 1.0, 1e3, 1e6])
    problems = standardised(X, np.repeat(targets, 5, axis=1), costs, penalty=penalty)
    problems.check(problems.solve(tol=TOL))


@pytest.mark.parametrize(
    ("make_X", "C", "tol"),
    [
        (lambda: normal(1500, 20) @ normal(20, 200) + 1e-3 * normal(1500, 200), 10.0, TOL),
        (lambda: normal(1500, 20) @ normal(20, 200) + 1e-3 * normal(1500, 200), 1000.0, TOL),
        (lambda: normal(300, 40) * 1e-3 + 1000, 10.0, 1e-6),
    ],
    ids=["low rank", "low rank, large cost", "a dozen values left in float32"],
)
def test_gap_is_true_where_float32_is_not_enough(make_X, C, tol):
    X = make_X()
    problems = standardised(X, first_column_decides(X - X.mean(axis=0), X[:, :1].std()), C)
    found = problems.solve(tol=tol, max_iter=100)
    assert problems.relative_gap(0, found.coef[0], found.intercept[0]) <= tol


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_scales_that_float32_cannot_square_change_nothing(penalty):
    found = []
    for scale in (1.0, 1e30):
        X = normal(200, 25) * np.geomspace(1, scale, 25)
        problems = standardised(X, coin_flips(200), 0.3, penalty=penalty)
        found.append(problems.solve(tol=1e-6))
        assert (found[-1].dual_gap <= 1e-6).all()
    np.testing.assert_allclose(found[1].coef, found[0].coef, atol=1e-3)


def test_the_l2_penalty_is_solved_on_nearly_dependent_columns_of_many_scales():
    rng = np.random.default_rng(0)
    X = normal(200, 60) @ normal(60, 190) + 1e-3 * normal(200, 190)
    X = (X * 10.0 ** rng.uniform(-3, 3, 190)).astype(np.float32)
    targets = first_column_decides(X - X.mean(axis=0), X[:, :1].std())
    C, mean = np.array([2e3]), X.mean(axis=0, dtype=float)
    problems = Problems(X, targets, C, np.ones((200, 1)), mean, np.ones(190), "l2")
    problems.check(problems.solve(tol=TOL))


def test_a_wide_layer_needs_no_matrix_of_its_columns_with_the_l2_penalty():
    n_columns = 4000
    problems = standardised(normal(100, n_columns), coin_flips(100), 0.01, penalty="l2")
    problems.solve()  # what is made once
    tracemalloc.start()
    found = problems.solve()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.dual_gap[0] <= TOL
    assert peak < n_columns**2  # bytes; the matrix would take four times as many


@pytest.mark.parametrize("weight", [1e-300, 1e-12, 1e8])
def test_tiny_and_huge_weights_are_solved(weight):
    found = standardised(normal(100, 8), coin_flips(100), weights=weight).solve()
    assert found.dual_gap[0] <= TOL
    assert np.isfinite(found.coef).all() and np.isfinite(found.intercept).all()


def test_five_hundred_problems_are_each_solved_as_if_alone():
    C = 10.0 ** np.random.default_rng(2).uniform(-4, 2, 500)
    problems = standardised(normal(80, 30), coin_flips(80, 500), C)
    together = problems.solve(tol=1e-9)
    assert (together.dual_gap <= 1e-9).all()
    for p in (0, 250, 499):
        alone = problems.solve(slice(p, p + 1), tol=1e-9)
        np.testing.assert_allclose(together.coef[p], alone.coef[0], atol=1e-3)


def test_one_side_is_fitted_by_the_intercept_alone_and_disturbs_no_other_problem():
    sides = coin_flips(100)
    weights = np.hstack([sides > 0, sides < 0, np.zeros((100, 1)), np.ones((100, 1))])
    problems = standardised(normal(100, 5), np.repeat(sides, 4, axis=1), 0.1, weights)
    found = problems.solve()
    assert found.intercept[:3].tolist() == [np.inf, -np.inf, 0]
    assert found.decisions[:3, 0].tolist() == [np.inf, -np.inf, 0]
    assert not found.coef[:3].any() and not found.dual_gap[:3].any()
    alone = problems.solve(slice(3, 4))
    np.testing.assert_allclose(found.coef[3], alone.coef[0], atol=1e-6)


def test_below_the_smallest_useful_C_all_weights_are_zero():
    targets = one_of_many(100)
    found = standardised(normal(100, 40), targets, 1e-4).solve()
    assert not found.coef.any()
    np.testing.assert_allclose(found.intercept, np.log(1 / 99))


def test_a_problem_that_is_given_up_says_so():
    found = standardised(SQUARE, first_column_decides(SQUARE)).solve(max_iter=1)
    assert found.dual_gap[0] > TOL
    assert found.n_iter[0] == 1


def on_disk(X):
    wide = np.memmap(on_disk.folder / "wide", dtype=X.dtype, mode="w+", shape=(80, 90))
    wide[:, 20:50] = X
    return wide[:, 20:50]


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda X: X.astype(np.float16),
        lambda X: X.astype(np.float64),
        np.asfortranarray,
        lambda X: np.repeat(X, 2, axis=0)[::2],
        lambda X: X[::-1][::-1],
        on_disk,
    ],
    ids=["float16", "float64", "Fortran", "every second row", "backwards", "columns on disk"],
)
def test_how_activations_lie_in_memory_does_not_matter(lay_out, tmp_path):
    on_disk.folder = tmp_path
    X = normal(80, 30).astype(np.float16).astype(np.float32)  # what float16 holds, too
    targets = coin_flips(80)
    as_they_are = solve_probes(X, targets, C=0.3)
    np.testing.assert_array_equal(solve_probes(lay_out(X), targets, C=0.3).coef, as_they_are.coef)
