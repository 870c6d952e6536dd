"""Batches side by side on a CPU's cores: the same rows, and the caller's threads as they were."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from bert_files import tiny
from extracted_rows import TEXTS, layout_of, recipe_of, rows_of, watching

from skspin import LLMActivationTransformer
from skspin._model import extract

N_THREADS = 3
MANY = [f"{i} " + "w " * (i % 40) for i in range(1500)]


@pytest.fixture(autouse=True)
def threads():
    """Let torch have so many threads, and see that it has them afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(N_THREADS)
    yield
    after = torch.get_num_threads()
    in_new_threads = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
    torch.set_num_threads(before)
    assert after == in_new_threads == N_THREADS
    assert not core_threads()


def core_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("skspin-core")]


@pytest.fixture
def recipe(tokenizer):
    return recipe_of(tiny(), tokenizer, batch_tokens=600)


def test_rows_are_those_of_one_batch_after_another(recipe):
    rows = rows_of(recipe, MANY)
    torch.set_num_threads(1)
    alone = rows_of(recipe, MANY)
    torch.set_num_threads(N_THREADS)
    np.testing.assert_allclose(rows, alone, atol=1e-5)


def test_each_core_has_a_batch_of_its_own_and_both_ways_are_tried(recipe):
    """No batch goes on until as many are there, so it would break if there were fewer."""
    meeting, used = threading.Barrier(N_THREADS), []

    def see(ids):
        n_threads = torch.get_num_threads()
        used.append((n_threads, ids.numel()))
        if n_threads == 1 and len(used) <= N_THREADS:
            meeting.wait(timeout=60)

    with watching(recipe.source.model, see):
        rows_of(recipe, MANY)
    shared = [n_tokens for n_threads, n_tokens in used if n_threads == N_THREADS]
    single = [n_tokens for n_threads, n_tokens in used if n_threads == 1]
    assert len(shared) + len(single) == len(used)
    assert max(single) <= 600 // N_THREADS < max(shared) <= 600


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's list of threads")
def test_no_thread_is_left_for_the_system_either_when_a_call_returns(recipe):
    """A process that is forked while a thread ends, in MKL, would hang."""
    rows_of(recipe, MANY[:40])  # starts the threads that torch keeps
    before = set(os.listdir("/proc/self/task"))
    for _ in range(50):
        rows_of(recipe, MANY[:40])
        assert set(os.listdir("/proc/self/task")) <= before


def test_few_texts_are_shared_out(recipe):
    seen = []
    with watching(recipe.source.model, lambda ids: seen.append(ids.numel())):
        rows_of(recipe, ["w " * 60] * 9)
    assert seen == [3 * 62] * N_THREADS


def test_an_error_in_one_batch_is_the_callers_and_ends_the_others(recipe):
    fault = RuntimeError("a fault of the model")

    def see(ids):
        raise fault

    with watching(recipe.source.model, see), pytest.raises(RuntimeError) as raised:
        rows_of(recipe, MANY)
    assert raised.value is fault


def test_a_caller_who_leaves_early_leaves_nothing_running(recipe):
    with closing(extract(recipe, MANY[:60], layout_of())) as rows:
        next(rows)
        assert core_threads()


def test_a_batch_that_does_not_fit_beside_others_is_halved_or_runs_alone(recipe):
    """What is short of memory here is all that runs at a time."""
    expected, running, lock = rows_of(recipe, TEXTS * 20), [], threading.Lock()

    def enter(module, args):
        with lock:
            running.append(args[0].numel())
            if sum(running) > 40:
                running.pop()
                raise MemoryError

    def leave(module, args, output):
        with lock:
            running.pop()

    embeddings = recipe.source.model.embeddings
    handles = [
        embeddings.word_embeddings.register_forward_pre_hook(enter),
        embeddings.LayerNorm.register_forward_hook(leave),
    ]
    rows = rows_of(recipe, TEXTS * 20)
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_estimators_in_two_threads(tokenizer):
    transformers = [
        LLMActivationTransformer(tiny(), tokenizer=tokenizer, cache=None, batch_tokens=600)
        for _ in range(2)
    ]
    expected = transformers[0].fit_transform(MANY)
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda t: t.fit_transform(MANY), transformers):
            np.testing.assert_allclose(rows, expected, atol=1e-5)
