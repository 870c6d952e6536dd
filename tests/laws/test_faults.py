"""What can go wrong around a running transformer, and what then still holds."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from skspin import LLMActivationTransformer, open_store
from skspin.datasets import demo_model

TEXTS = [f"text {i} " + "word " * (i % 20) for i in range(60)]


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return {
        "model": BertModel(config).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(demo_model()),
    }


@pytest.fixture
def folder(tiny, tmp_path):
    for part in tiny.values():
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def transformer(model, **params):
    return LLMActivationTransformer(model, **{"dtype": "float32", "cache": None, **params})


def run_python(code, *, seconds=60, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | environment,
    )


@pytest.fixture
def interruptible():
    """A process that a shell starts in the background ignores Ctrl-C, and Python with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_what_was_computed_and_the_model_usable(tiny, tmp_path):
    model, n_texts = tiny["model"], []

    def count(module, args, kwargs):
        n_texts.append(len(kwargs["input_ids"]))

    def interrupt(module, args, kwargs):
        if len(n_texts) == 4:
            signal.raise_signal(signal.SIGINT)

    fitted = LLMActivationTransformer(**tiny, cache=tmp_path, batch_tokens=64).fit(TEXTS)
    LLMActivationTransformer(**tiny, cache=None).fit_transform(TEXTS[:1])  # tries the model once
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
    fresh = LLMActivationTransformer(**tiny, cache=None).fit_transform(TEXTS)
    np.testing.assert_allclose(X, fresh, atol=1e-5)


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_jumps_changes_nothing(folder, tmp_path, monkeypatch, years):
    fitted = transformer(folder, cache=tmp_path / "store").fit(TEXTS)
    expected = fitted.transform(TEXTS[:30])
    jump, now, now_ns = years * 365 * 86_400, time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + jump * 10**9)
    again = fitted.transform(TEXTS)
    np.testing.assert_array_equal(again[:30], expected)
    np.testing.assert_allclose(again, transformer(folder).fit_transform(TEXTS), atol=1e-5)


def test_weights_that_change_are_noticed_whatever_the_clock(folder):
    fitted = transformer(folder).fit(TEXTS)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, (0, 0))
    with pytest.raises(ValueError, match="fingerprint"):
        fitted.transform(TEXTS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_the_model_was_used_does_not_hang(folder):
    run = run_python(
        f"""
        import joblib, numpy as np
        from skspin import LLMActivationTransformer
        texts = [f"text {{i}} " + "word " * 60 for i in range(60)]
        fitted = LLMActivationTransformer({str(folder)!r}, dtype="float32", cache=None).fit(texts)
        here = fitted.transform(texts)  # starts the threads that a fork leaves behind
        with joblib.parallel_config(backend="multiprocessing", n_jobs=2):
            there = joblib.Parallel()(joblib.delayed(fitted.transform)(texts) for _ in range(2))
        print([np.allclose(X, here, atol=1e-5) for X in there])
        """
    )
    assert run.stdout.strip() == "[True, True]", run.stderr


def test_threads_may_share_an_estimator(folder, tmp_path):
    expected = transformer(folder).fit_transform(TEXTS)
    fitted = transformer(folder, cache=tmp_path / "store", batch_tokens=128).fit(TEXTS)
    orders = [np.random.default_rng(seed).permutation(len(TEXTS)) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda order: fitted.transform([TEXTS[i] for i in order]), orders))
    for order, X in zip(orders, outputs, strict=True):
        np.testing.assert_allclose(X, expected[order], atol=1e-5)


def test_a_store_removed_in_use_costs_a_warning_and_no_row(tiny, tmp_path):
    expected = LLMActivationTransformer(**tiny, cache=None).fit_transform(TEXTS)
    store, n_batches = tmp_path / "store", []
    fitted = LLMActivationTransformer(**tiny, cache=store, batch_tokens=64).fit(TEXTS)
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
    assert open_store(store).info().entries == 3 * len(set(TEXTS))


def test_a_process_that_is_killed_is_resumed_where_it_was(folder, tmp_path):
    code = """
        import os, signal, sys, time, numpy as np, torch
        from skspin import LLMActivationTransformer
        from skspin._model import batches
        texts = [f"text {i} " + "word " * (i % 20) for i in range(60)]
        texts += texts[:5]
        n_computed, most, run = [], int(sys.argv[2]), batches._try_batch

        def counting(backbone, windows, *others):
            if sum(n_computed) > most:
                os.kill(os.getpid(), signal.SIGKILL)
            n_computed.append(len(windows))
            time.sleep(0.1)  # a model that takes its time
            return run(backbone, windows, *others)

        batches._try_batch = counting
        torch.set_num_threads(1)  # one batch at a time
        transformer = LLMActivationTransformer(
            sys.argv[1], dtype="float32", batch_tokens=64, cache="store", output_folder="output"
        )
        X = transformer.fit_transform(texts)
        print(sum(n_computed), X.base.filename if hasattr(X.base, "filename") else "")
    """

    def start(most):
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder), str(most)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    killed = start(20)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (part,) = (tmp_path / "output").iterdir()
    assert part.suffix == ".part"
    n_done = open_store(tmp_path / "store").info().entries // 3  # hidden states of three layers
    assert 0 < n_done < 40
    resumed = start(1000)
    assert int(resumed.stdout.split()[0]) == 60 - n_done, resumed.stderr
    (file,) = (tmp_path / "output").glob("*.npy")
    expected = transformer(folder).fit_transform(TEXTS)
    np.testing.assert_allclose(np.load(file), np.concatenate([expected, expected[:5]]), atol=1e-5)


def hub_cache(
    home, folder, name="models--some--tiny-bert", commit="0123456789abcdef" * 2 + "0" * 8
):
    """Lay out a folder as the hub's cache does."""
    snapshot = home / "hub" / name / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    refs = home / "hub" / name / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return commit


@pytest.fixture
def silent_hub():
    """Serve an address that takes connections and never answers."""
    connections = []

    def accept():
        while True:
            try:
                connections.append(server.accept()[0])
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
    for connection in connections:
        connection.close()


ASK_TWICE = """
    import time, torch, transformers
    from skspin import LLMActivationTransformer
    start = time.perf_counter()
    for name in ("some/tiny-bert", "some/other-bert"):
        try:
            fitted = LLMActivationTransformer(name, dtype="float32", cache=None).fit(["a"])
            print(fitted.revision_, fitted.transform(["a", "b"]).shape)
        except ValueError as error:
            print(error)
    print(time.perf_counter() - start)
"""


def test_a_hub_that_never_answers_is_given_up_within_seconds(folder, tmp_path, silent_hub):
    endpoint, connections = silent_hub
    commit = hub_cache(tmp_path / "hf", folder)
    hub = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    run = run_python(ASK_TWICE, seconds=180, **hub)
    cached, missing, seconds = run.stdout.strip().split("\n")
    assert cached == f"{commit} (2, 48)", run.stderr
    assert "some/other-bert" in missing and "offline mode, HF_HUB_OFFLINE=1" in missing
    assert connections and float(seconds) < 60
