"""A probe is solved once for the same content, and afresh for any other."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from skspin import SalientNeuronSelector
from skspin._probes import ProbeSettings, encode_targets, fit_layers, probe_cache

rng = np.random.default_rng(0)
BLOCK = rng.normal(size=(60, 8)).astype(np.float32)
Y = (BLOCK[:, 0] + rng.normal(size=60) > 0).astype(int)
VALIDATION = np.arange(0, 60, 5)
SETTINGS = ProbeSettings((0.1, 1.0), "l1", True, 1e-3, 1000, None, 2.0**-23)


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch):
    monkeypatch.setattr(probe_cache, "limit", probe_cache.limit)  # put back at the end
    probe_cache.clear()
    yield
    probe_cache.clear()


def fit(X=BLOCK, y=Y, weight=None, columns=slice(None), validation=VALIDATION, **settings):
    targets, settings = encode_targets(y, weight), replace(SETTINGS, **settings)
    (probe,) = fit_layers(X, [columns], targets, validation, settings, use_cache=True)
    return probe


def n_solved_by(*calls):
    before = probe_cache.n_solved
    for call in calls:
        fit(**call)
    return probe_cache.n_solved - before


WIDE = np.concatenate([BLOCK + 1, BLOCK, BLOCK], axis=1)
SAME = {
    "copy": {"X": BLOCK.copy()},
    "columns of a wider array": {"X": WIDE, "columns": slice(8, 16)},
    "columns by number": {"X": WIDE, "columns": np.arange(8, 16)},
    "every second row": {"X": np.repeat(BLOCK, 2, axis=0)[::2]},
    "backwards twice": {"X": BLOCK[::-1].copy()[::-1]},
    "labels of other names": {"y": np.array(["no", "yes"])[Y]},
}
OTHERS = {
    "activations": {"X": BLOCK + np.float32(1e-3)},
    "one value": {"X": np.where(np.arange(480).reshape(60, 8) == 479, np.float32(0), BLOCK)},
    "number format": {"X": BLOCK.astype(np.float64)},
    "columns": {"X": BLOCK[:, ::-1]},
    "fewer columns": {"columns": slice(0, 7)},
    "labels": {"y": 1 - Y},
    "weights": {"weight": np.linspace(1, 2, 60)},
    "validation part": {"validation": VALIDATION + 1},
    "C": {"C": (0.1,)},
    "penalty": {"penalty": "l2"},
    "standardize": {"standardize": False},
    "tol": {"tol": 1e-4},
    "max_iter": {"max_iter": 999},
    "eps": {"eps": 2.0**-52},
}


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
def test_the_same_probe_is_solved_once_and_cannot_be_changed(same):
    first = fit()
    assert fit(**same) is first
    assert probe_cache.n_solved == 1
    with pytest.raises(ValueError, match="read-only"):
        first.coef[0, 0] = 1


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_whatever_decides_a_solution_is_in_its_key(change):
    assert n_solved_by({}, change) == 2


def test_multilabel_and_exclusive_targets_of_the_same_signs_differ():
    three = np.arange(60) % 3
    assert n_solved_by({"y": three}, {"y": np.eye(3, dtype=int)[three]}) == 2


def test_files_and_fortran_order_are_found_again(tmp_path):
    np.save(tmp_path / "rows.npy", WIDE)
    on_disk = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for pair in (WIDE, on_disk), (np.asfortranarray(WIDE), np.asfortranarray(WIDE.copy())):
        assert n_solved_by(*({"X": X, "columns": slice(8, 16)} for X in pair)) == 1


def test_the_least_recently_used_is_forgotten_first():
    first, second, third = {}, {"y": 1 - Y}, {"weight": np.linspace(1, 2, 60)}
    fit(**first)
    probe_cache.limit = 2 * probe_cache.n_bytes
    assert n_solved_by(second, first, third) == 2  # the third drives the second out
    assert probe_cache.n_bytes <= probe_cache.limit
    assert n_solved_by(first, third) == 0
    assert n_solved_by(second) == 1


def test_what_is_larger_than_the_bound_is_not_kept_and_drives_out_nothing():
    fit()
    probe_cache.limit = probe_cache.n_bytes
    many = {"y": np.arange(60) % 5}
    assert n_solved_by(many, many, {}) == 2


def test_threads_may_share_it():
    probe_cache.limit = 2000
    with ThreadPoolExecutor(4) as pool:
        labels = [(Y + np.arange(60) // (10 + k % 6)) % 2 for k in range(24)]
        for y, probe in zip(labels, pool.map(lambda y: fit(y=y), labels), strict=True):
            np.testing.assert_allclose(probe.coef, fit(y=y).coef, atol=1e-6)
    assert 0 < probe_cache.n_bytes <= 2000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python's, from 3.12 on
def test_a_forked_process_finds_what_was_solved_before():
    expected = fit()
    child = os.fork()
    if child == 0:
        os._exit(0 if fit() is expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_without_a_cache_nothing_is_kept():
    selector = SalientNeuronSelector(layer_sizes=None, cache=None)
    selector.fit(BLOCK, Y).fit(BLOCK, Y)
    assert probe_cache.n_bytes == 0
