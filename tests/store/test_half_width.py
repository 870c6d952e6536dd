"""Rows of half the width: rounded once, the same from wherever they come, never infinite."""

import numpy as np
import pytest
from store_rows import as_new_process

from skspin import LLMActivationTransformer, open_store
from skspin._layout import Layout, Segment
from skspin.datasets import demo_model

LAYOUT = Layout((Segment(None, 0, "hidden", "mean", 3), Segment(None, 4, "mlp", "max", 5)))
TEXTS = ["A fine film.", "A waste of two hours and of a good cast.", "Quite so.", "It drags."] * 5


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    cache = "memory" if request.param == "memory" else str(tmp_path)
    open_store(cache).clear()
    yield cache
    open_store(cache).clear()


def transformer(cache, **params):
    params = {"dtype": "float32", "layers": [1, 5], "store_dtype": "float16", **params}
    return LLMActivationTransformer(demo_model(), cache=cache, **params).fit(TEXTS)


def test_a_text_has_the_same_row_kept_or_just_computed_which_is_the_rounded_one(cache):
    computed = transformer(cache).transform(TEXTS)
    assert computed.dtype == np.float32
    np.testing.assert_array_equal(transformer(cache).transform(TEXTS), computed)
    whole = transformer(None, store_dtype="float32").transform(TEXTS)
    np.testing.assert_array_equal(computed, whole.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(transformer(None).transform(TEXTS), computed)


def test_it_takes_half_the_bytes_beside_rows_of_the_full_width(cache):
    sizes = []
    for dtype in ("float16", "float32"):
        transformer(cache, store_dtype=dtype, site="mlp", pooling=("mean", "max")).transform(TEXTS)
        sizes.append(open_store(cache).info().n_bytes)
    assert sizes[0] < 0.6 * (sizes[1] - sizes[0])


@pytest.mark.parametrize("number", [65_520, -1e9])
def test_a_number_that_has_no_room_is_refused_by_layer_and_site(tmp_path, number):
    rows = np.ones((2, 8), np.float32)
    rows[1, 6] = number
    store, out = open_store(tmp_path), np.empty_like(rows)
    said = rf"store_dtype='float16'.* 65,504.*layer 4 at site 'mlp' is {abs(number):,.0f}\. Use"
    with pytest.raises(ValueError, match=said):
        for missing in store.look_up("", ["a", "b"], LAYOUT, out, dtype="float16"):
            missing.add(np.array([0]), rows[:1])
            missing.add(np.array([], int), rows[:0])  # the windows of a text that is not complete
            missing.add(np.array([1]), rows[1:])
    (missing,) = as_new_process(tmp_path).look_up("", ["a", "b"], LAYOUT, out, dtype="float16")
    assert missing.texts == ["b"]


def test_many_small_chunks_of_both_widths_are_merged_apart(tmp_path):
    store, rows = open_store(tmp_path), np.random.default_rng(0).random((50, 8), np.float32)
    out = np.empty((1, 8), np.float32)
    for i, row in enumerate(rows):
        for dtype in ("float16", "float32"):
            for missing in store.look_up("", [f"{i}"], LAYOUT, out, dtype=dtype):
                missing.add(np.array([0]), row[None])
    out = np.empty_like(rows)
    for dtype in ("float16", "float32"):
        texts = [f"{i}" for i in range(50)]
        assert not list(as_new_process(tmp_path).look_up("", texts, LAYOUT, out, dtype=dtype))
        np.testing.assert_array_equal(out, rows.astype(dtype).astype(np.float32))
