"""Laws that hold for every store, in memory or in a folder."""

import subprocess
import sys
import threading
import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from store_rows import activations, look_up, read, write

from skspin._layout import Layout, Segment
from skspin._store import StoreInfo, open_store

SEGMENTS = [
    Segment(None, layer, site, pooling, width)
    for layer in range(2)
    for site, width in (("hidden", 4), ("mlp", 6))
    for pooling in ("mean", "max")
]
ALL = Layout(tuple(SEGMENTS))
WIDE = Layout((Segment(None, 0, "hidden", "mean", 1000),))
TEXTS = [*(f"text {i}" for i in range(8)), "", "\0", "é", "e\u0301", "\ud800", "\udc00", "a", "a "]


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    store = open_store("memory" if request.param == "memory" else tmp_path)
    store.clear()
    limit = store.limit
    yield store
    store.clear()
    store.limit = limit


def layout_of(numbers):
    return Layout(tuple(SEGMENTS[j] for j in numbers))


# Looking up


def test_texts_that_look_alike_are_different_texts(store):
    for text in TEXTS:
        assert not read(store, [text], ALL).any()
        write(store, [text], ALL)


EVERYTHING = list(range(len(SEGMENTS)))
SHUFFLED = [TEXTS[i] for i in np.random.default_rng(0).integers(0, len(TEXTS), 100)]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from(["a", "b"]),
            st.lists(st.sampled_from(TEXTS), max_size=6),
            st.lists(st.sampled_from(range(len(SEGMENTS))), min_size=1, unique=True),
        ),
        max_size=12,
    )
)
@example([(True, "a", TEXTS[:5], [0, 1]), (True, "a", TEXTS[3:9], [4]),
          (True, "a", SHUFFLED, EVERYTHING), (False, "a", SHUFFLED[::-1], EVERYTHING),
          (False, "a", TEXTS, [5, 6, 7]), (False, "a", TEXTS, EVERYTHING[::-1]),
          (False, "b", TEXTS, EVERYTHING)])  # fmt: skip
def test_a_store_behaves_as_a_set_of_keys_texts_and_segments(store, calls):
    store.clear()
    stored = set()
    for compute, key, texts, numbers in calls:
        lacked = look_up(store, texts, layout_of(numbers), key, compute=compute)
        expected = [[(key, text, j) not in stored for j in numbers] for text in texts]
        np.testing.assert_array_equal(lacked, np.reshape(expected, lacked.shape))
        if compute:
            stored |= {(key, text, j) for text in texts for j in numbers}
    assert store.info().entries == len(stored)


def test_chosen_neurons_are_served_from_more_and_else_stored_as_they_are(store):
    def choose(*neurons):
        return Layout((replace(SEGMENTS[2], neurons=neurons), SEGMENTS[0]))

    write(store, TEXTS[:5], layout_of([2, 0]))
    write(store, TEXTS[5:8], choose(1, 3, 4))
    for neurons in ((1, 3, 4), (1, 4), (3,)):
        np.testing.assert_array_equal(
            read(store, TEXTS[:9], choose(*neurons)).all(axis=1), [True] * 8 + [False]
        )
    lacked = look_up(store, TEXTS[:8], choose(1, 2), compute=False)
    np.testing.assert_array_equal(lacked[:, 0], [False] * 5 + [True] * 3)
    assert not lacked[:, 1].any()
    assert not read(store, TEXTS[5:8], layout_of([2]))[:, 0].any()  # some are not all
    # What the caller is to compute are the neurons that it wants.
    (missing,) = store.look_up("", ["new"], choose(0, 5), np.empty((1, 6), np.float32))
    assert missing.layout == choose(0, 5)


def test_arrays_of_the_caller_are_copied_and_may_be_cut_out_of_larger_ones(store):
    wide = np.zeros((2 * len(TEXTS), 60), np.float32)
    out, values = wide[::2, 7:47], activations(TEXTS, ALL)
    for missing in store.look_up("", TEXTS, ALL, out):
        missing.add(np.arange(len(values)), values)
    values[:], out[:] = -1, -2
    look_up(store, TEXTS[::-1], ALL, compute=False, out=out)
    assert not wide[:, :7].any() and not wide[:, 47:].any() and not wide[1::2].any()
    out[:] = -3
    assert read(store, TEXTS, ALL).all()


def test_values_are_kept_to_the_bit(store):
    rows = np.array([[np.nan, -0.0, np.inf, 1e-45]], np.float32)
    for _ in range(2):
        out = np.zeros_like(rows)
        for missing in store.look_up("", ["a"], layout_of([0]), out):
            missing.add(np.array([0]), rows)
        np.testing.assert_array_equal(out.view(np.int32), rows.view(np.int32))


@pytest.mark.parametrize("n_added", [1, 2, 15])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_what_was_added_before_the_caller_fails_is_stored(store, failure, n_added):
    out = np.empty((len(TEXTS), ALL.n_columns), np.float32)
    with pytest.raises(failure):
        for missing in store.look_up("", TEXTS, ALL, out):
            for i in range(n_added):
                missing.add(np.array([i]), activations(missing.texts[i : i + 1], ALL))
            raise failure
    assert not [t for t in threading.enumerate() if t.name.startswith("skspin-store")]
    np.testing.assert_array_equal(read(store, TEXTS, ALL)[:, 0], np.arange(len(TEXTS)) < n_added)


# Metadata, counts, bounds


def test_metadata_are_kept_and_replaced(store):
    assert store.get_metadata("shape") is None
    for document in ({"widths": [4, 6], "é": None}, [1.5, "\ud800"], 3):
        store.put_metadata("shape", document)
        assert store.get_metadata("shape") == document
    assert store.get_metadata("other") is None
    store.put_metadata("\udcff", 1)  # a name of a file may be no text
    assert store.get_metadata("\udcff") == 1


def test_info_counts_entries_bytes_and_models(store):
    write(store, TEXTS[:3], layout_of([0, 1]), key="a", model="first")
    write(store, TEXTS[:4], layout_of([2]), key="b", model="second")
    info = store.info()
    assert info.entries == 10
    assert info.models == {"first": 6, "second": 4}
    n_values = 3 * 8 + 4 * 6
    assert 4 * n_values < info.n_bytes <= info.limit == store.limit


def test_clear_forgets_everything(store):
    write(store, TEXTS, ALL)
    store.put_metadata("shape", 1)
    store.clear()
    assert not read(store, TEXTS, ALL).any()
    assert store.get_metadata("shape") is None
    assert store.info() == StoreInfo(limit=store.limit)
    write(store, TEXTS, ALL)
    assert read(store, TEXTS, ALL).all()


def test_a_store_stays_in_its_bound_and_keeps_what_was_used_last(store):
    texts = [f"text {i}" for i in range(200)]
    store.limit = 400_000
    for i, text in enumerate(texts):
        write(store, [text], WIDE)
        assert read(store, texts[:1], WIDE).all(), i
        assert store.info().n_bytes <= store.limit
    found = read(store, texts, WIDE)[:, 0]
    kept = int(found.sum())
    assert kept > 50
    assert found[0] and found[-kept + 12 :].all()  # with the first are a few from its chunk
    store.limit = 100_000
    assert 0 < store.info().n_bytes <= 100_000
    store.limit = 1000  # less than a row
    write(store, ["one more"], WIDE)
    assert store.info().entries == 0


@pytest.mark.parametrize("excess", [-1, 0])
def test_the_bound_holds_to_the_byte(store, excess):
    write(store, ["1"], WIDE)
    one = store.info().n_bytes
    store.clear()
    store.limit = one + excess
    for text in ("1", "2"):
        write(store, [text], WIDE)
        assert store.info().entries == (excess == 0)
    np.testing.assert_array_equal(read(store, ["1", "2"], WIDE)[:, 0], [False, excess == 0])


def test_what_is_larger_than_the_bound_is_not_kept_and_drives_out_nothing(store):
    write(store, TEXTS[:4], layout_of([0]))
    store.limit = 3000
    write(store, ["large"], WIDE)
    assert read(store, TEXTS[:4], layout_of([0])).all()
    assert not read(store, ["large"], WIDE).any()


@pytest.mark.parametrize("at_once", [1, 100])
def test_a_call_with_more_than_fits_keeps_some_of_it(store, at_once):
    store.limit = 200_000  # 45 rows, of which 1 / 16 is thrown out at a time
    texts, values = [f"text {i}" for i in range(100)], np.ones((100, 1000), np.float32)
    for missing in store.look_up("", texts, WIDE, np.empty_like(values)):
        for start in range(0, 100, at_once):
            missing.add(np.arange(start, start + at_once), values[:at_once])
    assert 0.85 * store.limit < store.info().n_bytes <= store.limit


@pytest.mark.parametrize("limit", ["2GB", -1, float("inf"), float("nan"), None])
def test_a_bound_that_is_no_number_of_bytes_is_refused(store, limit):
    with pytest.raises(ValueError, match="number of bytes"):
        store.limit = limit


@pytest.mark.parametrize("n_texts", [1, 50])
def test_the_bytes_counted_in_memory_are_at_least_those_taken(n_texts):
    store = open_store("memory")
    store.clear()
    layout = Layout((Segment(None, 0, "hidden", "mean", 384),))
    row, out = np.zeros((n_texts, 384), np.float32), np.empty((n_texts, 384), np.float32)
    write(store, TEXTS, layout)  # what is made once
    store.clear()
    tracemalloc.start()
    for i in range(1000 // n_texts):
        for missing in store.look_up("", [f"{i} {k}" for k in range(n_texts)], layout, out):
            missing.add(np.arange(n_texts), row)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    counted = store.info().n_bytes
    store.clear()
    assert 0.9 * counted < taken <= counted


# Threads


def in_threads(*steps):
    """Run steps in threads until one of them fails or all are done."""
    failures = []

    def run(step):
        try:
            with warnings.catch_warnings():
                step()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_threads_may_share_a_store(store):
    texts = [f"text {i}" for i in range(300)]

    def work(seed):
        order = np.random.default_rng(seed).permutation(len(texts))
        for start in range(0, len(texts), 6):
            some = [texts[i] for i in order[start : start + 6]]
            write(store, some, ALL)
            assert read(store, some, ALL).all()

    in_threads(*(lambda seed=seed: work(seed) for seed in range(4)))
    assert read(store, texts, ALL).all()
    assert store.info().entries == len(texts) * len(SEGMENTS)


def test_threads_read_what_is_right_while_others_make_room(store):
    store.limit = 30 * 4300  # 30 of 100 texts
    texts, n_found, rounds = [f"text {i}" for i in range(100)], [], 150

    def work(seed, step):
        rng = np.random.default_rng(seed)
        for _ in range(rounds):
            step([texts[i] for i in rng.permutation(100)[:10]])

    def count_found(some):
        n_found.append(read(store, some, WIDE).sum())  # checks the rows

    steps = [lambda some: write(store, some, WIDE), count_found]
    in_threads(*(lambda i=i: work(i, steps[i % 2]) for i in range(4)))
    assert 0 < sum(n_found) < 10 * len(n_found)
    assert store.info().n_bytes <= store.limit


def test_the_limit_holds_after_threads_wrote_at_once(store):
    store.limit = 30 * 4300  # 30 texts
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns within a step, too
    try:
        for turn in range(100):
            barrier = threading.Barrier(4)

            def work(seed, turn=turn, barrier=barrier):
                barrier.wait()
                write(store, [f"text {turn} {seed} {i}" for i in range(10)], WIDE)

            in_threads(*(lambda seed=seed: work(seed) for seed in range(4)))
            assert store.info().n_bytes <= store.limit
    finally:
        sys.setswitchinterval(interval)


# Opening


def test_no_store_keeps_nothing():
    store = open_store(None)
    write(store, TEXTS, ALL)
    store.put_metadata("shape", 1)
    assert open_store(None).get_metadata("shape") is None
    assert not read(store, TEXTS, ALL).any()
    assert store.info() == StoreInfo()


def test_one_folder_has_one_store_however_it_is_written(tmp_path, monkeypatch):
    assert open_store("memory") is open_store("memory")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["real", "link", "./real/", "~/real", tmp_path / "link" / ".." / "real"]
    assert len({id(open_store(name)) for name in names}) == 1


@pytest.mark.parametrize("cache", [3, True, ["memory"]])
def test_what_is_no_store_is_refused(cache):
    with pytest.raises(TypeError, match="'memory', a folder or None"):
        open_store(cache)
    with pytest.raises(ValueError, match="names no folder"):
        open_store("")


def test_memory_goes_back_to_the_system():
    code = """
import numpy as np, psutil
from skspin._layout import Layout, Segment
from skspin._store import open_store
store, layout = open_store(), Layout((Segment(None, 0, "hidden", "mean", 2000),))
out, used = np.ones((50, 2000), np.float32), psutil.Process().memory_info
before = used().rss
for i in range(100):
    for missing in store.look_up("", [f"{i} {k}" for k in range(50)], layout, out):
        missing.add(np.arange(50), np.ones((50, 2000), np.float32))
full = used().rss - before
store.clear()
assert full > 35e6 > 4 * (used().rss - before), (full, used().rss - before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
