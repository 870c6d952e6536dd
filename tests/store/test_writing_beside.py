"""Rows are summed up and written beside the model's passes: in order, bounded, and none is lost."""

import os
import threading

import numpy as np
import pytest
from store_rows import LAYOUT, TEXTS, activations, as_new_process, read

from skspin._layout import Layout, Segment
from skspin._store import open_store

WIDE = Layout((Segment(None, 0, "hidden", "mean", 1 << 18),))  # a row has 1 MiB
N_WIDE = 60


def add_one_by_one(store, texts=TEXTS, layout=LAYOUT, tell=lambda n: None):
    rows = activations(texts, layout)
    out = np.full(rows.shape, np.nan, np.float32)
    for missing in store.look_up("", texts, layout, out):
        for i in range(len(texts)):
            missing.add(np.empty(0, np.intp), rows[:0])  # as batches that end no long text
            missing.add(np.array([i]), rows[i : i + 1])
            tell(i + 1)
    np.testing.assert_array_equal(out, rows)
    assert not [t for t in threading.enumerate() if t.name.startswith("skspin-store")]


@pytest.fixture
def disk(monkeypatch):
    """Let a test decide what happens when the disk is to keep a chunk's file."""

    def behave(change):
        as_it_is = os.replace

        def changed(source, target):
            change(np.load(source, mmap_mode="r")["texts"].tolist())
            as_it_is(source, target)

        monkeypatch.setattr(os, "replace", changed)

    return behave


def test_a_slow_disk_holds_nobody_up_until_two_blocks_wait(tmp_path, disk):
    ready, written, n_added = threading.Event(), [], []

    def wait(texts):
        assert ready.wait(60)
        written.append(texts)

    disk(wait)
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
    assert 0 < min(map(len, written)) and max(map(len, written)) <= 17
    assert read(as_new_process(tmp_path), texts, WIDE).all()


@pytest.mark.parametrize("error", [MemoryError, ValueError])
def test_an_error_beside_reaches_the_caller_and_loses_one_block(tmp_path, disk, error):
    errors, n_added = [error("on purpose")], [0]
    disk(lambda texts: errors and (_ for _ in ()).throw(errors.pop()))
    with pytest.raises(error, match="on purpose"):
        add_one_by_one(open_store(tmp_path), tell=n_added.append)
    found = read(as_new_process(tmp_path), TEXTS).all(axis=1)
    assert not found[0] and found[1 : n_added[-1]].all()  # the first text was a block by itself


def test_a_disk_that_fails_beside_warns_at_the_users_line(tmp_path, disk):
    errors = [OSError("on purpose")]
    disk(lambda texts: errors and (_ for _ in ()).throw(errors.pop()))
    store = open_store(tmp_path)
    with pytest.warns(UserWarning, match="Could not write to the store") as caught:
        add_one_by_one(store)
    (warning,) = caught
    assert warning.filename == __file__
    assert read(store, TEXTS).all()  # memory has taken its place
