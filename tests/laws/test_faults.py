"""What can go wrong around a running transformer, and what then still holds."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from tiny_models import save_parts, tiny_reader

from skspin import LLMActivationTransformer, open_store
from skspin._model import batches
from skspin._model.registry import forget_models

TEXTS = [f"text {i} " + "word " * (i % 20) for i in range(60)]


@pytest.fixture
def tiny():
    return tiny_reader(max_position_embeddings=512)


@pytest.fixture
def folder(tiny, tmp_path):
    yield save_parts(tiny, tmp_path / "model")
    forget_models()


@pytest.fixture
def expected(tiny):
    return transformer(**tiny).fit_transform(TEXTS)


def transformer(model, **params):
    return LLMActivationTransformer(model, **{"dtype": "float32", "cache": None, **params})


def forks(test):
    """Let a test fork the process."""
    test = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")(test)


@pytest.fixture
def interruptible():
    """A process that a shell starts in the background ignores Ctrl-C, and Python with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_what_was_computed_and_the_model_usable(tiny, tmp_path, expected):
    model, n_texts = tiny["model"], []

    def count(module, args, kwargs):
        n_texts.append(len(kwargs["input_ids"]))

    def interrupt(module, args, kwargs):
        if len(n_texts) == 4:
            signal.raise_signal(signal.SIGINT)

    fitted = transformer(**tiny, cache=tmp_path, batch_tokens=256).fit(TEXTS)
    counting = model.register_forward_pre_hook(count, with_kwargs=True)
    interrupting = model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        fitted.transform(TEXTS)
    interrupting.remove()
    lost, done = n_texts[3], sum(n_texts[:3])
    n_texts.clear()
    X = fitted.transform(TEXTS)
    assert sum(n_texts) == len(TEXTS) - done and lost > 0
    counting.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    np.testing.assert_allclose(X, expected, atol=1e-5)


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_jumps_changes_nothing(folder, tmp_path, monkeypatch, years, expected):
    fitted = transformer(folder, cache=tmp_path / "store").fit(TEXTS)
    before = fitted.transform(TEXTS[:30])
    jump, now, now_ns = years * 365 * 86_400, time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + jump * 10**9)
    again = fitted.transform(TEXTS)
    np.testing.assert_array_equal(again[:30], before)
    np.testing.assert_allclose(again, expected, atol=1e-5)


@forks
def test_a_fork_after_the_model_was_used_does_not_hang(folder, expected):
    fitted = transformer(folder).fit(TEXTS)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fitted.transform(TEXTS)  # starts the threads that a fork leaves behind
        with joblib.parallel_config(backend="multiprocessing", n_jobs=2):
            works = (joblib.delayed(fitted.transform)(TEXTS) for _ in range(2))
            there = joblib.Parallel(timeout=100)(works)
    finally:
        torch.set_num_threads(n_threads)
    for X in there:
        np.testing.assert_allclose(X, expected, atol=1e-5)


def test_threads_may_share_an_estimator(folder, tmp_path, expected):
    fitted = transformer(folder, cache=tmp_path / "store", batch_tokens=512).fit(TEXTS)
    orders = [np.random.default_rng(seed).permutation(len(TEXTS)) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda order: fitted.transform([TEXTS[i] for i in order]), orders))
    for order, X in zip(orders, outputs, strict=True):
        np.testing.assert_allclose(X, expected[order], atol=1e-5)


def test_a_store_removed_in_use_costs_a_warning_and_no_row(tiny, tmp_path, expected):
    store, n_batches = tmp_path / "store", []
    fitted = transformer(**tiny, cache=store, batch_tokens=256).fit(TEXTS)
    fitted.transform(TEXTS[:10])

    def remove(*args):
        n_batches.append(1)
        if len(n_batches) == 3:
            shutil.rmtree(store)

    removing = tiny["model"].register_forward_pre_hook(remove)
    with pytest.warns(UserWarning, match="Could not .* the store.*results stay the same") as warned:
        X = fitted.transform(TEXTS)
    removing.remove()
    assert len(warned) == 1 and len(n_batches) > 5
    np.testing.assert_allclose(X, expected, atol=1e-5)
    # The next call begins a new store.
    np.testing.assert_allclose(fitted.transform(TEXTS), expected, atol=1e-5)
    assert open_store(store).info().entries == 2 * len(set(TEXTS))


@forks
def test_a_process_that_is_killed_is_resumed_where_it_was(folder, tmp_path, monkeypatch, expected):
    n_computed, most, run = [], 20, batches.try_batch

    def counting(backbone, windows, *others):
        if sum(n_computed) > most:
            os.kill(os.getpid(), signal.SIGKILL)
        n_computed.append(len(windows))
        time.sleep(0.1)  # a model that takes its time
        return run(backbone, windows, *others)

    def compute():
        places = {"cache": tmp_path / "store", "output_folder": tmp_path / "output"}
        return transformer(folder, batch_tokens=256, **places).fit_transform(TEXTS + TEXTS[:5])

    monkeypatch.setattr(batches, "try_batch", counting)
    child = multiprocessing.get_context("fork").Process(target=compute, daemon=True)
    child.start()
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL
    (part,) = (tmp_path / "output").iterdir()
    assert part.suffix == ".part"
    n_done = open_store(tmp_path / "store").info().entries // 2  # hidden states of two layers
    assert 0 < n_done < 40
    most = 1000
    X = compute()
    assert sum(n_computed) == 60 - n_done
    (file,) = (tmp_path / "output").glob("*.npy")
    np.testing.assert_array_equal(np.load(file), X)
    np.testing.assert_allclose(X, np.concatenate([expected, expected[:5]]), atol=1e-5)


ASK_TWICE = """
import time, torch, transformers
from skspin import LLMActivationTransformer
for name in ("some/tiny-bert", "some/other-bert"):
    start = time.perf_counter()
    try:
        fitted = LLMActivationTransformer(name, dtype="float32", cache=None).fit(["a"])
        print(fitted.revision_, fitted.transform(["a", "b"]).shape)
    except ValueError as error:
        print(error)
    print(time.perf_counter() - start)
"""


def test_a_hub_that_never_answers_is_given_up_within_seconds(folder, tmp_path):
    commit = "0123456789abcdef" * 2 + "0" * 8
    repository = tmp_path / "hf/hub/models--some--tiny-bert"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hub = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url}
        run = subprocess.run(
            [sys.executable, "-c", ASK_TWICE], capture_output=True, text=True, env=os.environ | hub
        )
        silent.settimeout(0)
        silent.accept()[0].close()  # it was asked
    cached, first, missing, second = run.stdout.strip().split("\n")
    assert cached == f"{commit} (2, 48)", run.stderr
    assert "some/other-bert" in missing and "offline mode, HF_HUB_OFFLINE=1" in missing
    assert float(first) < 30 and float(second) < 30
