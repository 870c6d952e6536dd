"""Laws that hold for every store; what concerns disks and processes is in test_store_on_disk.py."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skspin._layout import Layout, Segment
from skspin._store import StoreInfo, open_store

SEGMENTS = [
    Segment(None, layer, site, pooling, width)
    for layer in range(2)
    for site, width in (("hidden", 4), ("mlp", 6))
    for pooling in ("mean", "max")
]
TEXTS = [*(f"text {i}" for i in range(8)), "", "\0", "é", "e\u0301", "\ud800", "\udc00"]


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    store = open_store("memory" if request.param == "memory" else tmp_path)
    store.clear()
    limit = store.limit
    yield store
    store.clear()
    store.limit = limit


def activations(texts, segments, context=""):
    """What a model would give: another number for each context, text, segment and neuron."""
    rows = [
        [
            hash((context, text, s.key, neuron)) % 2**20
            for s in segments
            for neuron in range(s.width)
        ]
        for text in texts
    ]
    return np.array(rows, np.float32).reshape(len(texts), sum(s.width for s in segments))


def write(store, texts, segments, context="", **more):
    store.write(context, texts, segments, activations(texts, segments, context), **more)


def read(store, texts, segments, context=""):
    """Read, and check that what was found is right."""
    layout = Layout(tuple(segments))
    out = np.full((len(texts), layout.n_columns), np.nan, np.float32)
    found = store.read(context, texts, segments, out)
    expected = activations(texts, segments, context)
    for j, columns in enumerate(layout.slices):
        np.testing.assert_array_equal(out[found[:, j], columns], expected[found[:, j], columns])
    return found


def test_what_was_written_is_found_in_any_order_and_as_often_as_asked_for(store):
    write(store, TEXTS, SEGMENTS)
    order = np.random.default_rng(0).integers(0, len(TEXTS), 100)
    assert read(store, [TEXTS[i] for i in order], SEGMENTS).all()


def test_texts_that_look_alike_are_different_texts(store):
    for text in TEXTS:
        assert not read(store, [text], SEGMENTS).any()
        write(store, [text], SEGMENTS)


def test_fewer_and_reordered_segments_are_served_from_what_is_there(store):
    write(store, TEXTS, SEGMENTS)
    for segments in (SEGMENTS[:3], SEGMENTS[5:], SEGMENTS[::-1], SEGMENTS[1::3]):
        assert read(store, TEXTS, segments).all()


def test_only_what_is_missing_is_reported(store):
    write(store, TEXTS[:5], SEGMENTS[:2])
    write(store, TEXTS[3:9], SEGMENTS[4:5])
    expected = np.zeros((len(TEXTS), len(SEGMENTS)), bool)
    expected[:5, :2] = True
    expected[3:9, 4] = True
    np.testing.assert_array_equal(read(store, TEXTS, SEGMENTS), expected)


def test_another_context_finds_nothing(store):
    write(store, TEXTS, SEGMENTS, context="float32")
    assert not read(store, TEXTS, SEGMENTS, context="bfloat16").any()


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
def test_a_store_behaves_as_a_set_of_contexts_texts_and_segments(store, calls):
    store.clear()
    written = set()
    for is_write, context, texts, chosen in calls:
        segments = [SEGMENTS[j] for j in chosen]
        if is_write:
            write(store, texts, segments, context)
            written |= {(context, text, j) for text in texts for j in chosen}
        else:
            expected = [[(context, text, j) in written for j in chosen] for text in texts]
            found = read(store, texts, segments, context)
            np.testing.assert_array_equal(found, np.reshape(expected, found.shape))
    assert store.info().entries >= len(written)


def test_the_callers_array_is_copied(store):
    rows = activations(TEXTS, SEGMENTS)
    store.write("", TEXTS, SEGMENTS, rows)
    rows[:] = -1
    out = np.empty_like(rows)
    assert store.read("", TEXTS, SEGMENTS, out).all()
    out[:] = -2
    assert read(store, TEXTS, SEGMENTS).all()


def test_rows_and_out_may_be_cut_out_of_larger_arrays(store):
    wide = np.zeros((2 * len(TEXTS), 50), np.float32)
    wide[::2, 3:43] = activations(TEXTS, SEGMENTS)
    store.write("", TEXTS, SEGMENTS, wide[::2, 3:43])
    out = np.zeros((len(TEXTS), 60), np.float32)
    for order in (np.arange(len(TEXTS)), np.arange(len(TEXTS))[::-1]):
        assert store.read("", [TEXTS[i] for i in order], SEGMENTS, out[:, 7:47]).all()
        np.testing.assert_array_equal(out[:, 7:47], activations(TEXTS, SEGMENTS)[order])


def test_values_are_kept_to_the_bit(store):
    rows = np.array([[np.nan, -0.0, np.inf, 1e-45]], np.float32)
    store.write("", ["a"], SEGMENTS[:1], rows)
    out = np.zeros_like(rows)
    store.read("", ["a"], SEGMENTS[:1], out)
    np.testing.assert_array_equal(out.view(np.int32), rows.view(np.int32))


def test_cards_are_kept_and_replaced(store):
    assert store.get_metadata("shape") is None
    for document in ({"widths": [4, 6], "é": None}, [1.5, "\ud800"], 3):
        store.put_metadata("shape", document)
        assert store.get_metadata("shape") == document
    assert store.get_metadata("other") is None


def test_info_counts_entries_bytes_and_models(store):
    write(store, TEXTS[:3], SEGMENTS[:2], context="a", model="first")
    write(store, TEXTS[:4], SEGMENTS[2:3], context="b", model="second")
    info = store.info()
    assert info.entries == 10
    assert info.models == {"first": 6, "second": 4}
    n_values = 3 * 8 + 4 * 6
    assert 4 * n_values < info.n_bytes <= info.limit == store.limit


def test_clear_forgets_everything(store):
    write(store, TEXTS, SEGMENTS)
    store.put_metadata("shape", 1)
    store.clear()
    assert not read(store, TEXTS, SEGMENTS).any()
    assert store.get_metadata("shape") is None
    assert store.info() == StoreInfo(limit=store.limit)
    write(store, TEXTS, SEGMENTS)
    assert read(store, TEXTS, SEGMENTS).all()


def test_a_store_stays_in_its_bound_and_keeps_what_was_used_last(store):
    segments = [Segment(None, 0, "hidden", "mean", 1000)]
    texts = [f"text {i}" for i in range(200)]
    store.limit = 400_000
    for i, text in enumerate(texts):
        write(store, [text], segments)
        assert read(store, texts[:1], segments).all(), i
        assert store.info().n_bytes <= store.limit
    found = read(store, texts, segments)[:, 0]
    kept = int(found.sum())
    assert kept > 50
    assert found[0] and found[-kept + 6 :].all()
    store.limit = 100_000
    assert store.info().n_bytes <= 100_000
    store.limit = 1000  # less than a row
    write(store, ["one more"], segments)
    assert store.info().entries == 0


@pytest.mark.parametrize("limit", ["2GB", -1, float("inf"), float("nan"), None])
def test_a_bound_that_is_no_number_of_bytes_is_refused(store, limit):
    with pytest.raises(ValueError, match="number of bytes"):
        store.limit = limit


def test_threads_may_share_a_store(store):
    texts = [f"text {i}" for i in range(300)]
    failures = []

    def work(seed):
        try:
            order = np.random.default_rng(seed).permutation(len(texts))
            for start in range(0, len(texts), 20):
                some = [texts[i] for i in order[start : start + 20]]
                write(store, some, SEGMENTS)
                assert read(store, some, SEGMENTS).all()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert read(store, texts, SEGMENTS).all()
    assert store.info().entries == len(texts) * len(SEGMENTS)


def test_no_store_keeps_nothing():
    store = open_store(None)
    write(store, TEXTS, SEGMENTS)
    store.put_metadata("shape", 1)
    store.clear()
    assert store.get_metadata("shape") is None
    assert not read(store, TEXTS, SEGMENTS).any()
    assert store.info() == StoreInfo()


def test_clones_share_one_store(tmp_path):
    assert open_store("memory") is open_store("memory")
    assert (
        open_store(tmp_path)
        is open_store(str(tmp_path))
        is open_store(tmp_path / ".." / tmp_path.name)
    )


@pytest.mark.parametrize("cache", [3, True, ["memory"]])
def test_what_is_no_store_is_refused(cache):
    with pytest.raises(TypeError, match="'memory', a folder or None"):
        open_store(cache)


def test_memory_goes_back_to_the_system():
    code = """
import numpy as np, psutil
from skspin._layout import Segment
from skspin._store import open_store
store, segments = open_store(), [Segment(None, 0, "hidden", "mean", 2000)]
used = psutil.Process().memory_info
before = used().rss
for i in range(100):
    store.write("", [f"{i} {k}" for k in range(50)], segments, np.ones((50, 2000), np.float32))
full = used().rss - before
store.clear()
assert full > 35e6 > 4 * (used().rss - before), (full, used().rss - before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_store_loads_no_model_library():
    code = "import sys, skspin._store; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
