"""The solver's threads leave BLAS as they found it and keep to its limits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from skspin._probes import solve_probes

rng = np.random.default_rng(0)
X = rng.normal(size=(3000, 30)).astype(np.float32)
TARGETS = np.where(X[:, :3] + rng.normal(size=(3000, 3)) > 0, 1, -1)


BLAS = ThreadpoolController().select(user_api="blas")


def blas_threads():
    return {library["num_threads"] for library in BLAS.info()}


def solve(C=0.01, tol=1e-8):
    return solve_probes(X, TARGETS, C=C, tol=tol, max_iter=1000).coef


@pytest.fixture
def two_threads():
    """Let BLAS have two threads, without a "with", in which only this thread may change that."""

    def let_have(n_threads):
        setter = threading.Thread(target=BLAS.limit, kwargs={"limits": n_threads})
        setter.start()
        setter.join()

    before = BLAS.info()[0]["num_threads"]
    let_have(2)
    yield
    let_have(before)


def test_blas_has_one_thread_meanwhile_and_its_own_after_the_last_of_several(two_threads):
    solve()  # in this thread, which is still there when others begin
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            runs, meanwhile = [pool.submit(solve, C) for C in np.geomspace(0.01, 1, 5)], []
            while not all(run.done() for run in runs):
                meanwhile.append(blas_threads())
            assert {1} in meanwhile
            assert blas_threads() == {2}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_blas_gets_its_threads_back_after_an_error():
    with threadpool_limits(2, user_api="blas"):
        with pytest.raises(ValueError, match="not finite"):
            solve_probes(np.full_like(X, np.nan), TARGETS, C=1.0)
        assert blas_threads() == {2}


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_limit_on_blas_is_a_limit_here(n_threads, monkeypatch):
    started, start = [], threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: started.append(thread) or start(thread)
    )
    with threadpool_limits(n_threads, user_api="blas"):
        solve()
    assert len(started) == (0 if n_threads == 1 else n_threads)


def test_solutions_do_not_depend_on_the_number_of_threads():
    found = []
    for n_threads in (1, 2, 4):  # with 2, problems and rows are both shared out
        with threadpool_limits(n_threads, user_api="blas"):
            found.append(solve())
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)
