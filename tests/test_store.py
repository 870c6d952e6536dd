import numpy as np
import pytest

from skspin._layout import Segment
from skspin._store import open_store

SEGMENTS = [Segment(None, layer, "hidden", "mean", 4) for layer in range(3)]


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return open_store("memory" if request.param == "memory" else tmp_path)


def rows_of(texts, segments, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(texts), sum(s.width for s in segments)), dtype=np.float32)


def test_what_was_written_is_read_in_any_order(store):
    texts = [f"text {i}" for i in range(9)] + ["\ud800", ""]
    rows = rows_of(texts, SEGMENTS)
    store.write("order", texts, SEGMENTS, rows)
    order = np.random.default_rng(1).permutation(len(texts))
    out = np.zeros_like(rows)
    found = store.read("order", [texts[i] for i in order], SEGMENTS, out)
    assert found.all()
    np.testing.assert_array_equal(out, rows[order])


def test_fewer_and_other_segments_are_served_from_what_is_there(store):
    rows = rows_of(["a"], SEGMENTS[:2])
    store.write("fewer", ["a"], SEGMENTS[:2], rows)
    out = np.zeros((2, 8), np.float32)
    found = store.read("fewer", ["a", "b"], SEGMENTS[1:], out)
    np.testing.assert_array_equal(found, [[True, False], [False, False]])
    np.testing.assert_array_equal(out[0, :4], rows[0, 4:])
    assert not store.read("another context", ["a"], SEGMENTS[1:], out).any()


def test_cards_are_kept(store):
    assert store.get_card("widths") is None
    store.put_card("widths", {"layers": [4, 4]})
    assert store.get_card("widths") == {"layers": [4, 4]}


def test_no_store_keeps_nothing():
    store = open_store(None)
    store.write("c", ["a"], SEGMENTS, rows_of(["a"], SEGMENTS))
    store.put_card("card", 1)
    assert store.get_card("card") is None
    assert not store.read("c", ["a"], SEGMENTS, np.zeros((1, 12), np.float32)).any()
