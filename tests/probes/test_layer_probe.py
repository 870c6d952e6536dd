from __future__ import annotations

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from skspin._probes.layer import _mean_and_scale

FLOAT32 = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("shape", [(700, 300), (2, 5), (3, 40_000)])
def test_columns_are_measured_as_scikit_learn_does(shape):
    rng = np.random.default_rng(0)
    X = rng.normal(rng.normal(size=shape[1]) * 3, rng.uniform(0.1, 10, shape[1]), shape)
    X = X.astype(np.float32)
    X[0] *= 100  # an outlier
    weights = rng.uniform(0.5, 2, len(X))
    expected = StandardScaler().fit(X.astype(np.float64), sample_weight=weights)
    mean, scale = _mean_and_scale(X, weights, FLOAT32)
    np.testing.assert_allclose(mean, expected.mean_, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(scale, expected.scale_, rtol=1e-9)


def test_columns_that_do_not_vary_keep_their_scale():
    X = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    X[:, 1] = 0.1  # constant
    X[:, 2] = 1 + 1e-7 * X[:, 2]  # but for rounding
    X[:, 3] *= 1e-33  # dead
    X[:, 4] *= 1e-6  # nearly dead: the rounding of what the others are computed from
    mean, scale = _mean_and_scale(X, np.ones(500), FLOAT32)
    assert (scale[1:5] == 1).all() and (scale[[0, 5]] != 1).all()
    finer = _mean_and_scale(X, np.ones(500), float(np.finfo(np.float64).eps))[1]
    assert finer[4] < 1e-5
