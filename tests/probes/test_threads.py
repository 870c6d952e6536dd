"""Threads of our own leave BLAS as they found it and keep to its limits."""

import threading

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from skspin._probes.solver import solve_probes
from skspin._probes.threads import Threads, own_threads


def blas_threads():
    parts = ThreadpoolController().select(user_api="blas").info()
    return {part["filepath"]: part["num_threads"] for part in parts}


def test_blas_has_one_thread_meanwhile_and_gets_its_own_back():
    before = blas_threads()
    with own_threads():
        assert set(blas_threads().values()) <= {1}
    assert blas_threads() == before


def test_blas_gets_its_threads_back_after_an_error():
    before = blas_threads()
    with pytest.raises(RuntimeError), own_threads():
        raise RuntimeError
    assert blas_threads() == before


def test_blas_gets_its_threads_back_when_the_last_of_several_is_done():
    before = blas_threads()
    first, second = own_threads(), own_threads()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(blas_threads().values()) <= {1}
    second.__exit__(None, None, None)
    assert blas_threads() == before


def test_a_limit_on_blas_is_a_limit_on_us():
    with threadpool_limits(1, user_api="blas"), own_threads() as threads:
        assert threads.n_threads == 1


@pytest.fixture
def two_threads():
    with threadpool_limits(2, user_api="blas"), own_threads() as threads:
        yield threads


def test_results_come_in_the_order_of_arguments(two_threads):
    assert two_threads.map(pow, range(9), [2] * 9) == [n**2 for n in range(9)]


def test_errors_reach_the_caller(two_threads):
    with pytest.raises(ZeroDivisionError):
        two_threads.map(lambda n: 1 / n, [1, 0, 1])


def test_work_within_work_stays_on_its_thread(two_threads):
    def names(_):
        inner = two_threads.map(lambda _: threading.current_thread().name, range(4))
        return {threading.current_thread().name, *inner}

    assert all(len(found) == 1 for found in two_threads.map(names, range(4)))


@pytest.mark.parametrize("n_rows", [0, 1, 9, 1000])
def test_stretches_cover_all_rows_once(n_rows):
    stretches = Threads(3).split(n_rows, smallest=5)
    rows = [row for stretch in stretches for row in range(stretch.start, stretch.stop)]
    assert rows == list(range(n_rows))


def test_solutions_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3000, 30)).astype(np.float32)
    targets = np.where(X[:, :3] + rng.normal(size=(3000, 3)) > 0, 1, -1)
    found = []
    for n_threads in (1, 2, 4):
        with threadpool_limits(n_threads, user_api="blas"):
            found.append(solve_probes(X, targets, C=0.01, tol=1e-8).coef)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)
