"""A probe is solved once for the same content, and afresh for any other."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import skspin._probes.kept as kept_probes
from skspin import SalientNeuronSelector
from skspin._probes.layer import ProbeSettings
from skspin._probes.targets import encode_targets
from skspin._store.keep import Keep

rng = np.random.default_rng(0)
BLOCK = rng.normal(size=(60, 8)).astype(np.float32)
Y = (BLOCK[:, 0] + rng.normal(size=60) > 0).astype(int)
VALIDATION = np.arange(0, 60, 5)
SETTINGS = ProbeSettings((0.1, 1.0), "l1", True, 1e-3, 1000, None)


@pytest.fixture
def fits(monkeypatch):
    """Count the fits while doing them."""
    counted = []
    fit = kept_probes.fit_layer_probe
    monkeypatch.setattr(
        kept_probes, "fit_layer_probe", lambda *args: counted.append(args) or fit(*args)
    )
    kept_probes.forget_probes()
    yield counted
    kept_probes.forget_probes()


def recall(block=BLOCK, y=Y, weight=None, validation=VALIDATION, settings=SETTINGS):
    targets = encode_targets(y, weight)
    return kept_probes.recall_or_fit_layer_probe(block, targets, validation, settings)


def test_the_same_probe_is_solved_once(fits):
    first = recall()
    assert recall(BLOCK.copy(), Y.copy()) is first
    assert len(fits) == 1


OTHERS = {
    "activations": {"block": BLOCK + np.float32(1e-3)},
    "columns": {"block": BLOCK[:, ::-1]},
    "labels": {"y": 1 - Y},
    "weights": {"weight": np.linspace(1, 2, 60)},
    "validation part": {"validation": VALIDATION + 1},
    "C": {"settings": replace(SETTINGS, C=(0.1,))},
    "penalty": {"settings": replace(SETTINGS, penalty="l2")},
    "standardize": {"settings": replace(SETTINGS, standardize=False)},
    "tol": {"settings": replace(SETTINGS, tol=1e-4)},
    "max_iter": {"settings": replace(SETTINGS, max_iter=999)},
    "eps": {"settings": replace(SETTINGS, eps=2.0**-52)},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_whatever_decides_a_solution_is_in_its_key(fits, change):
    recall()
    recall(**change)
    assert len(fits) == 2


def test_the_least_recently_used_is_forgotten_first(fits, monkeypatch):
    recall()
    monkeypatch.setattr(kept_probes, "_KEPT", Keep(2 * kept_probes._KEPT.n_bytes))
    recall()
    recall(y=1 - Y)
    recall()
    recall(weight=np.linspace(1, 2, 60))  # the third: 1 - Y has to go
    del fits[:]
    recall()
    assert len(fits) == 0
    recall(y=1 - Y)
    assert len(fits) == 1


def test_a_search_over_sparsity_solves_six_probes_not_fifty_one(fits):
    pipeline = make_pipeline(SalientNeuronSelector(layer_sizes=None, C=1.0), LogisticRegression())
    sparsities = np.linspace(0, 0.9, 10)
    grid = {"salientneuronselector__sparsity": sparsities}
    GridSearchCV(pipeline, grid, cv=5).fit(BLOCK, Y)
    assert len(fits) == 6


def test_without_a_cache_nothing_is_kept(fits):
    selector = SalientNeuronSelector(layer_sizes=None, cache=None)
    selector.fit(BLOCK, Y).fit(BLOCK, Y)
    assert not kept_probes._KEPT.keys()
