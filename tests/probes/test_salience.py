"""The selection rules, against brute force and by hand."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skspin._probes import CRITERIA, SALIENCES

smallest_covering_set, largest_share = CRITERIA["salience"], CRITERIA["count"]

saliences = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).map(np.array)
sparsities = st.floats(0, 1, exclude_max=True)


@given(saliences, sparsities)
def test_no_smaller_set_covers_the_share(salience, sparsity):
    keep = smallest_covering_set(salience, sparsity)
    goal = (1 - sparsity) * salience.sum() * (1 - 1e-12)
    assert salience[keep].sum() >= goal * (1 - 1e-12)
    if salience.any():
        best_of_fewer = max(
            (sum(subset) for subset in combinations(salience, keep.sum() - 1)), default=0
        )
        assert best_of_fewer <= goal * (1 + 1e-9) + 1e-300


def test_covering_set_is_known_by_hand():
    salience = np.array([1.0, 5.0, 0.0, 3.0, 1.0])  # shares 0.1, 0.5, 0, 0.3, 0.1
    assert smallest_covering_set(salience, 0.5).tolist() == [False, True, False, False, False]
    assert smallest_covering_set(salience, 0.2).tolist() == [False, True, False, True, False]
    assert smallest_covering_set(salience, 0.1).tolist() == [True, True, False, True, False]
    assert smallest_covering_set(salience, 0.0).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("n", range(1, 60))
def test_equal_shares_do_not_miss_their_goal_by_a_rounding(n):
    for kept in range(1, n + 1):
        keep = smallest_covering_set(np.full(n, 0.1), 1 - kept / n)
        assert keep.tolist() == [True] * kept + [False] * (n - kept)


@pytest.mark.parametrize(("n", "sparsity", "kept"), [(10, 0.9, 1), (100, 0.29, 71), (3, 0.5, 2)])
def test_count_rule_drops_its_share_of_neurons(n, sparsity, kept):
    salience = np.arange(1.0, n + 1)
    keep = largest_share(salience, sparsity)
    assert np.flatnonzero(keep).tolist() == list(range(n - kept, n))


@pytest.mark.parametrize("rule", [smallest_covering_set, largest_share])
def test_ties_go_to_the_lower_column(rule):
    assert rule(np.ones(4), 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("rule", [smallest_covering_set, largest_share])
def test_a_layer_without_salience_gives_no_neuron(rule):
    assert not rule(np.zeros(3), 0.5).any()


@given(saliences, sparsities, sparsities)
def test_more_sparsity_never_keeps_other_neurons(salience, one, other):
    low, high = sorted([one, other])
    for rule in (smallest_covering_set, largest_share):
        assert not (rule(salience, high) & ~rule(salience, low)).any()


def test_salience_sums_over_classes():
    coef = np.array([[1.0, -2.0], [3.0, 0.0]])
    assert SALIENCES["squared"](coef).tolist() == [10.0, 4.0]
    assert SALIENCES["absolute"](coef).tolist() == [4.0, 2.0]
