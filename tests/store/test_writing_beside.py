"""Rows are summed up and written beside the model's passes: in order, bounded, and none is lost."""

import threading

import numpy as np
import pytest
from store_rows import LAYOUT, TEXTS, activations, as_new_process, read

from skspin._layout import Layout, Segment
from skspin._store import open_store
from skspin._store.folder import Folder

WIDE = Layout((Segment(None, 0, "hidden", "mean", 1 << 18),))  # a row has 1 MiB
N_WIDE = 60


def add_one_by_one(store, texts=TEXTS, layout=LAYOUT, tell=lambda n: None):
    rows = activations(texts, layout)
    out = np.full(rows.shape, np.nan, np.float32)
    for missing in store.look_up("", texts, layout, out):
        for i in range(len(texts)):
            missing.add(np.array([i]), rows[i : i + 1])
            tell(i + 1)
    np.testing.assert_array_equal(out, rows)


def storing_threads():
    return [t for t in threading.enumerate() if t.name.startswith("skspin-store")]


@pytest.fixture
def put(monkeypatch):
    """Let a test decide what happens when a chunk is written."""

    def use(change):
        as_it_is = Folder.put

        def changed(folder, chunk):
            change(chunk)
            as_it_is(folder, chunk)

        monkeypatch.setattr(Folder, "put", changed)

    return use


def test_blocks_without_a_text_are_nothing_to_store(tmp_path, put):
    """As of a long text in windows: most batches end none."""
    written = []
    put(lambda chunk: written.append(len(chunk.digests)))
    rows, out = activations(TEXTS), np.empty((len(TEXTS), LAYOUT.n_columns), np.float32)
    for missing in open_store(tmp_path).look_up("", TEXTS, LAYOUT, out):
        for i in range(len(TEXTS)):
            missing.add(np.empty(0, np.intp), rows[:0])
            missing.add(np.array([i]), rows[i : i + 1])
    np.testing.assert_array_equal(out, rows)
    assert written and 0 not in written


def test_a_slow_disk_holds_nobody_up_until_two_blocks_wait(tmp_path, put):
    ready, written, n_added = threading.Event(), [], []

    def wait(chunk):
        assert ready.wait(60)
        written.append(chunk.digests)

    put(wait)
    store = open_store(tmp_path)
    texts = [f"wide {i}" for i in range(N_WIDE)]
    caller = threading.Thread(target=add_one_by_one, args=(store, texts, WIDE, n_added.append))
    caller.start()
    while len(n_added) < 16:
        caller.join(0.01)
    caller.join(0.3)
    assert caller.is_alive() and len(n_added) == 16  # 1 is being written, and 16 MiB wait
    ready.set()
    caller.join(60)
    assert n_added[-1] == N_WIDE
    digests = [digest for chunk in written for digest in chunk]
    assert len(digests) == N_WIDE == len(set(digests))
    assert max(map(len, written)) <= 17
    assert read(as_new_process(tmp_path), texts, WIDE).all()
    assert not storing_threads()


@pytest.mark.parametrize("error", [MemoryError, ValueError])
def test_an_error_beside_reaches_the_caller_and_loses_one_block(tmp_path, put, error):
    errors = [error("on purpose")]
    put(lambda chunk: errors and (_ for _ in ()).throw(errors.pop()))
    n_added = [0]
    with pytest.raises(error, match="on purpose"):
        add_one_by_one(open_store(tmp_path), tell=n_added.append)
    assert not storing_threads()
    found = read(as_new_process(tmp_path), TEXTS).all(axis=1)
    assert not found[0] and found[1 : n_added[-1]].all()  # the first text was a block by itself


def test_a_disk_that_fails_beside_warns_at_the_users_line(tmp_path, put):
    errors = [OSError("on purpose")]
    put(lambda chunk: errors and (_ for _ in ()).throw(errors.pop()))
    store = open_store(tmp_path)
    with pytest.warns(UserWarning, match="Could not write to the store") as caught:
        add_one_by_one(store)
    (warning,) = caught
    assert warning.filename == __file__
    assert read(store, TEXTS).all()  # memory has taken its place


@pytest.mark.parametrize("n_added", [1, 2, 39])
def test_an_interrupt_loses_nothing_that_was_added(tmp_path, n_added):
    def interrupt(n):
        if n == n_added:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_one_by_one(open_store(tmp_path), tell=interrupt)
    assert not storing_threads()
    found = read(as_new_process(tmp_path), TEXTS).all(axis=1)
    np.testing.assert_array_equal(found, np.arange(len(TEXTS)) < n_added)
