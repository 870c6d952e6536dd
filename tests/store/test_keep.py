import threading
import tracemalloc
from collections import OrderedDict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from skspin._store.keep import ENTRY_OVERHEAD, Keep

KEYS = [bytes([i]) for i in range(6)]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["get", "put", "limit"]), st.sampled_from(KEYS), st.integers(0, 900))
)


@given(ACTIONS)
def test_it_forgets_what_was_used_longest_ago_and_no_more_than_it_must(actions):
    keep, limit = Keep(4000), 4000
    expected = OrderedDict()  # sizes
    for action, key, number in actions:
        if action == "get":
            assert keep.get(key) == expected.get(key)
            if key in expected:
                expected.move_to_end(key)
        elif action == "put":
            keep.put(key, number, number)
            expected.pop(key, None)
            if number + ENTRY_OVERHEAD <= limit:
                expected[key] = number
        else:
            keep.limit = limit = 5 * number
        while sum(size + ENTRY_OVERHEAD for size in expected.values()) > limit:
            expected.popitem(last=False)
        assert keep.keys() == list(expected)
        assert keep.n_bytes == sum(size + ENTRY_OVERHEAD for size in expected.values())


def test_what_is_larger_than_the_bound_is_not_kept_and_drives_out_nothing():
    keep = Keep(2000)
    keep.put(b"small", 1, 10)
    keep.put(b"large", 2, 5000)
    assert keep.get(b"large") is None
    assert keep.get(b"small") == 1


def test_the_bytes_counted_are_at_least_those_taken():
    keep = Keep(10**9)
    tracemalloc.start()
    for i in range(5000):
        keep.put(i.to_bytes(48, "big"), np.zeros(384, np.float32), 4 * 384)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.9 * keep.n_bytes < taken <= keep.n_bytes


def test_keys_with_a_prefix_can_be_forgotten_alone():
    keep = Keep(10**6)
    for key in (b"a1", b"a2", b"b1"):
        keep.put(key, key, 1)
    keep.clear(b"a")
    assert keep.keys() == [b"b1"]
    assert keep.n_bytes == 1 + ENTRY_OVERHEAD


def test_threads_may_share_it():
    keep = Keep(20 * (ENTRY_OVERHEAD + 8))

    def work(seed):
        for i in np.random.default_rng(seed).integers(0, 40, 3000).tolist():
            keep.put(bytes([i]), i, 8)
            assert keep.get(bytes([i])) in (i, None)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keep.keys()) == 20
    assert keep.n_bytes == keep.limit
