"""The selection rules, against brute force and by hand."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skspin._probes import CRITERIA, most_salient

saliences = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).map(np.array)
sparsities = st.floats(0, 1, exclude_max=True)


@given(saliences, sparsities)
def test_no_smaller_set_covers_the_share(salience, sparsity):
    keep = most_salient(salience, sparsity, "salience")
    goal = (1 - sparsity) * salience.sum() * (1 - 1e-12)
    assert salience[keep].sum() >= goal * (1 - 1e-12)
    if salience.any():
        best_of_fewer = max(
            (sum(subset) for subset in combinations(salience, keep.sum() - 1)), default=0
        )
        assert best_of_fewer <= goal * (1 + 1e-9) + 1e-300


@given(saliences, sparsities, sparsities)
def test_more_sparsity_never_keeps_other_neurons(salience, one, other):
    low, high = sorted([one, other])
    for criterion in CRITERIA:
        kept = most_salient(salience, high, criterion)
        assert not (kept & ~most_salient(salience, low, criterion)).any()


@pytest.mark.parametrize(
    ("criterion", "salience", "sparsity", "kept"),
    [
        ("count", [1.0, 3.0, 1.0], 1 - 1e-10, [1]),
        ("salience", [1.0, 5.0, 0.0, 3.0, 1.0], 0.5, [1]),  # shares 0.1, 0.5, 0, 0.3, 0.1
        ("salience", [1.0, 5.0, 0.0, 3.0, 1.0], 0.2, [1, 3]),
        ("salience", [1.0, 5.0, 0.0, 3.0, 1.0], 0.1, [0, 1, 3]),  # ties go to the lower column
        ("salience", [1.0, 5.0, 0.0, 3.0, 1.0], 0.0, [0, 1, 3, 4]),
        ("salience", [1.0] * 4, 0.5, [0, 1]),
        ("salience", [0.0] * 3, 0.5, []),
        ("count", [1.0] * 4, 0.5, [0, 1]),
        ("count", [0.0] * 3, 0.5, []),
        ("count", range(1, 11), 0.9, [9]),
        ("count", range(1, 101), 0.29, list(range(29, 100))),  # 0.29 * 100 is below 29
        ("count", range(1, 4), 0.5, [1, 2]),
    ],
)
def test_selection_is_known_by_hand(criterion, salience, sparsity, kept):
    keep = most_salient(np.array(salience, dtype=float), sparsity, criterion)
    assert np.flatnonzero(keep).tolist() == kept


def test_equal_shares_do_not_miss_their_goal_by_a_rounding():
    for n in range(1, 60):
        for kept in range(1, n + 1):
            keep = most_salient(np.full(n, 0.1), 1 - kept / n, "salience")
            assert keep.tolist() == [True] * kept + [False] * (n - kept)
