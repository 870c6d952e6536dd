"""Activations that are tensors: fitted and selected where they are, by scikit-learn's dispatch."""

import os
import subprocess
import sys

import pytest
import scipy
import torch

if tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 14):
    pytest.skip("scikit-learn dispatches from SciPy 1.14 on", allow_module_level=True)

# SciPy has to be told of the array API before it is imported, so this runs in its own process.
PROGRAM = """
import sys
import numpy as np, torch
from sklearn import config_context
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from skspin import SalientNeuronSelector

def selector(**params):
    return SalientNeuronSelector(layer_sizes=30, tol=1e-6, cache=None, **params)

device = sys.argv[1]
rng = np.random.default_rng(0)
X = rng.normal(3, 2, size=(300, 90)).astype(np.float32)
X[:20] = X[20:40]  # copies stay together
y = np.digitize(X[:, 3] - X[:, 50] + rng.normal(size=300) / 3, [-1, 1])
tensor, labels = torch.tensor(X, device=device), torch.tensor(y, device=device)
weights = rng.integers(0, 3, size=300)
cases = [
    ({}, y, labels, None),
    ({"C": (0.01, 0.1), "class_weight": "balanced"}, y > 0, labels > 0, None),
    ({"standardize": False, "penalty": "l2"}, y, y, None),
    ({"max_layer": 1}, y, labels, weights),
]
expected = [selector(**p).fit(X, own, sample_weight=w) for p, own, _, w in cases]

copied = []
def watch(name):
    whole = getattr(torch.Tensor, name)
    def changed(self, *args, **kwargs):
        copied.append(self.nbytes)
        return whole(self, *args, **kwargs)
    setattr(torch.Tensor, name, changed)
for name in ("numpy", "cpu", "tolist", "__array__"):
    watch(name)
with config_context(array_api_dispatch=True):
    for (params, _, own, w), on_host in zip(cases, expected, strict=True):
        found = selector(**params).fit(tensor, own, sample_weight=w)
        for name in ("coef_", "salience_", "layer_scores_", "C_"):
            learnt, wanted = getattr(found, name), getattr(on_host, name)
            np.testing.assert_allclose(learnt, wanted, atol=1e-3, err_msg=name)
        np.testing.assert_array_equal(found.support_, on_host.support_)
        selected = found.transform(tensor)
        assert selected.device == tensor.device and selected.dtype == tensor.dtype
# 32 of 90 columns tell copies of a row; a product is of 300 rows and a few problems.
assert max(copied) <= 32 * tensor.nbytes // 90
np.testing.assert_array_equal(selected.cpu().numpy(), on_host.transform(X))

double = selector().fit(X.astype(np.float64), y)
with config_context(array_api_dispatch=True):
    np.testing.assert_allclose(selector().fit(tensor.double(), y).coef_, double.coef_, atol=1e-3)

def pipeline():
    return make_pipeline(selector(), StandardScaler(), RidgeClassifier(solver="svd"))

if get_tags(RidgeClassifier(solver="svd")).array_api_support:
    expected = pipeline().fit(X, y).predict(X)
    with config_context(array_api_dispatch=True):
        fitted = pipeline().fit(tensor, labels)
        predicted = fitted.predict(tensor)
    assert fitted[-1].coef_.device == tensor.device
    np.testing.assert_array_equal(predicted.cpu().numpy(), expected)

if device == "cuda":
    with config_context(array_api_dispatch=True):
        try:
            selector(device="cpu").fit(tensor, y)
        except ValueError as error:
            assert "device='cpu', but X is on 'cuda:0'" in str(error), error
        else:
            raise AssertionError("a device beside that of the tensor was not refused")
"""

absent = not torch.cuda.is_available()
gpu = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(absent, reason="PyTorch finds no GPU here")],
)


@pytest.mark.parametrize("device", ["cpu", gpu])
def test_a_tensor_is_selected_from_as_the_array_is_and_stays_on_its_device(device):
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:skspin", "-c", PROGRAM, device],
        capture_output=True,
        text=True,
        env=os.environ | {"SCIPY_ARRAY_API": "1"},
    )
    assert ran.returncode == 0, ran.stderr
