"""What a search costs: each text once through the model, each fold's probes once."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from joblib.externals.loky import get_reusable_executor
from reports import Report
from reviews import reviews
from sklearn.model_selection import GridSearchCV

from skspin import make_spin_pipeline, open_store
from skspin._probes import probe_cache
from skspin.datasets import demo_model

N_FOLDS = 5
SPARSITIES = np.linspace(0, 0.9, 10).tolist()
N_PROCESSES = 4


@pytest.fixture(scope="module")
def texts_and_labels():
    texts, y = reviews(25, n_classes=2)
    return texts + texts[::5], np.concatenate([y, y[::5]])  # some texts twice


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    cache = "memory" if request.param == "memory" else tmp_path / "store"
    open_store(cache).clear()
    yield cache
    open_store(cache).clear()


@pytest.fixture
def passes():
    """Count how often the model reads each row of token ids."""
    from torch.nn import Embedding
    from torch.nn.modules.module import register_module_forward_pre_hook

    counted = Counter()

    def count(module, args):
        if not isinstance(module, Embedding) or module.num_embeddings < 30_000:
            return
        if args[0][0, 0] != module.num_embeddings // 2:  # with which a model is tried when loaded
            counted.update(tuple(row[row != 0].tolist()) for row in args[0])

    handle = register_module_forward_pre_hook(count)
    yield counted
    handle.remove()


@pytest.fixture
def n_probes():
    """Count the probes that are fitted."""
    probe_cache.clear()
    yield lambda: probe_cache.n_solved
    probe_cache.clear()


def spin(cache):
    sites = {"site": ("hidden", "mlp"), "pooling": "mean", "layers": [1, 2, 4]}
    return make_spin_pipeline(demo_model(), **sites, dtype="float32", cache=cache)


def test_a_search_reads_each_distinct_text_once_and_fits_each_folds_probes_once(
    texts_and_labels, cache, passes, n_probes
):
    from transformers import AutoTokenizer

    texts, y = texts_and_labels
    search = GridSearchCV(spin(cache), {"select__sparsity": SPARSITIES}, cv=N_FOLDS).fit(texts, y)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    assert passes == Counter(tuple(tokenizer(text)["input_ids"]) for text in set(texts))
    n_layers = len(search.best_estimator_["select"].layer_names_)
    assert n_probes() == (N_FOLDS + 1) * n_layers

    search.predict(texts[::-1])
    other = {"select__sparsity": [0.33], "select__max_layer": [2, None], "classify__C": [0.01]}
    GridSearchCV(spin(cache), other, cv=N_FOLDS).fit(texts, y)
    assert set(passes.values()) == {1}
    assert n_probes() == (N_FOLDS + 1) * n_layers


def test_a_search_with_what_is_kept_scores_as_one_without(texts_and_labels, tmp_path):
    texts, y = (values[:60:2] for values in texts_and_labels)
    grid = {"select__sparsity": [0.1, 0.8]}

    def search(cache, cache_probes):
        pipeline = spin(cache).set_params(activations__layers=2, select__cache=cache_probes)
        pipeline.set_params(select__C=1.0)  # few texts, large C
        return GridSearchCV(pipeline, grid, cv=2).fit(texts, y)

    kept, anew = search(tmp_path, "memory"), search(None, None)
    for split in ("split0_test_score", "split1_test_score"):
        np.testing.assert_array_equal(kept.cv_results_[split], anew.cv_results_[split])
    decisions = [found.best_estimator_.decision_function(texts) for found in (kept, anew)]
    np.testing.assert_allclose(*decisions, atol=1e-3)


def test_a_search_in_four_processes_has_no_model_in_any(texts_and_labels, tmp_path):
    texts, y = texts_and_labels
    pipeline = spin(tmp_path / "store")
    pipeline["activations"].fit_transform(texts)
    reports = tmp_path / "reports"
    reports.mkdir()
    grid = {"select__sparsity": SPARSITIES[::3]}
    get_reusable_executor().shutdown(wait=True)  # workers of other tests may hold models
    search = GridSearchCV(
        pipeline, grid, cv=3, n_jobs=N_PROCESSES, scoring=Report(reports, N_PROCESSES), refit=False
    ).fit(texts, y)

    def reported(what):
        return np.array([search.cv_results_[f"split{fold}_test_{what}"] for fold in range(3)])

    processes = set(reported("process").ravel())
    assert len(processes) == N_PROCESSES and os.getpid() not in processes
    assert (reported("model libraries") == 0).all()
    code = (
        "import psutil, sklearn.model_selection, skspin\n"
        "skspin.make_spin_pipeline('nothing')\n"
        "print(psutil.Process().memory_full_info().uss)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    weights = os.path.getsize(Path(demo_model()) / "model.safetensors")
    assert reported("memory").max() < int(run.stdout) + weights / 2
    here = GridSearchCV(pipeline, grid, cv=3, refit=False).fit(texts, y)
    for fold in range(3):
        expected = here.cv_results_[f"split{fold}_test_score"]
        np.testing.assert_allclose(reported("score")[fold], expected)
