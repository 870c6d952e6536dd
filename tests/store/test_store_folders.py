"""Which folder is meant, whatever it is called, and what happens where there can be none."""

import os
import threading
import warnings

import numpy as np
import pytest

from skspin import LLMActivationTransformer
from skspin._layout import Segment
from skspin._model.frozen import FrozenModel
from skspin._store import open_store
from skspin._store.disk import DiskStore
from skspin._store.keep import Keep
from skspin._store.memory import MemoryStore
from skspin.datasets import demo_model

TEXTS = ["A fine film.", "A waste of time.", "Quite so."]
SEGMENT = Segment(None, 0, "hidden", "mean", 1000)


def transformer(cache):
    return LLMActivationTransformer(demo_model(), layers=0, dtype="float32", cache=cache).fit(TEXTS)


@pytest.fixture
def n_computed(monkeypatch):
    """Count the texts that go through the model."""
    computed = []
    extract = FrozenModel.extract

    def counting(self, texts, segments, truncation):
        computed.extend(texts)
        return extract(self, texts, segments, truncation)

    monkeypatch.setattr(FrozenModel, "extract", counting)
    return lambda: len(computed)


def rows_of(texts):
    return np.array([np.full(1000, float(text)) for text in texts], np.float32)


def write(store, texts):
    store.write("", texts, [SEGMENT], rows_of(texts))


def read(store, texts):
    """Say which texts are there, and check their rows."""
    out = np.empty((len(texts), 1000), np.float32)
    found = store.read("", texts, [SEGMENT], out)[:, 0]
    np.testing.assert_array_equal(out[found], rows_of(texts)[found])
    return found


@pytest.mark.parametrize("name", ["a b", "Übung 日本", "memory", "%41", "-", "x" * 200])
def test_a_folder_may_have_any_name(tmp_path, name, n_computed):
    expected = transformer(tmp_path / name).transform(TEXTS)
    assert (tmp_path / name).is_dir()
    anew = DiskStore(str(tmp_path / name), MemoryStore(Keep(10**8)))
    assert anew.info().entries == len(TEXTS)
    np.testing.assert_array_equal(transformer(str(tmp_path / name)).transform(TEXTS), expected)
    assert n_computed() == len(TEXTS)


def test_one_folder_has_one_store_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["real", "link", "./real/", "~/real", tmp_path / "link" / ".." / "real"]
    assert len({id(open_store(name)) for name in names}) == 1


def test_a_link_that_is_turned_leads_to_the_other_store(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    write(open_store(tmp_path / "link"), ["1"])
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert not read(open_store(tmp_path / "link"), ["1"]).any()
    assert read(open_store(tmp_path / "one"), ["1"]).all()


def test_two_folders_share_nothing(tmp_path, n_computed):
    first, second = (transformer(tmp_path / name) for name in ("one", "other"))
    np.testing.assert_array_equal(first.transform(TEXTS), second.transform(TEXTS))
    assert n_computed() == 2 * len(TEXTS)
    open_store(tmp_path / "one").clear()
    second.transform(TEXTS)
    assert n_computed() == 2 * len(TEXTS)
    first.transform(TEXTS)
    assert n_computed() == 3 * len(TEXTS)


def test_where_there_is_a_file_there_is_one_warning_and_memory(tmp_path, n_computed):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="Could not make the store") as caught:
        for _ in range(3):
            assert np.isfinite(transformer(tmp_path / "file").transform(TEXTS)).all()
    assert len(caught) == 1
    assert n_computed() == len(TEXTS)
    (tmp_path / "file").unlink()  # and once it is out of the way, there is a store
    transformer(tmp_path / "file").transform(TEXTS)
    (tmp_path / "file").mkdir(exist_ok=True)
    transformer(tmp_path / "file").transform(TEXTS)
    assert open_store(tmp_path / "file").info().entries == len(TEXTS)


@pytest.mark.parametrize("excess", [-1, 0])
def test_the_bound_holds_to_the_byte(tmp_path, excess):
    store = open_store(tmp_path)
    write(store, ["1"])
    one = store.info().n_bytes
    store.clear()
    store.limit = one + excess
    store._front.clear()
    write(store, ["1"])
    assert store.info().entries == (1 if excess == 0 else 0)
    write(store, ["2"])
    info = store.info()
    assert info.n_bytes <= store.limit and info.entries == (1 if excess == 0 else 0)
    store._front.clear()
    if excess == 0:
        np.testing.assert_array_equal(read(store, ["1", "2"]), [False, True])


def test_threads_read_what_is_right_while_others_make_room(tmp_path):
    store = DiskStore(str(tmp_path), MemoryStore(Keep(0)))
    store.limit = 30 * 4024  # 30 of 100 texts
    texts = [str(i) for i in range(100)]
    n_found, failures, stop = [], [], threading.Event()

    def attempt(step, seed):
        rng = np.random.default_rng(seed)
        try:
            while not stop.is_set():
                step([texts[i] for i in rng.permutation(100)[:10]])
        except BaseException as failure:
            failures.append(failure)

    steps = [lambda some: write(store, some), lambda some: n_found.append(read(store, some).sum())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=attempt, args=(steps[i % 2], i)) for i in range(4)]
        for thread in threads:
            thread.start()
        while sum(n_found[:]) < 300 and all(thread.is_alive() for thread in threads):
            threads[0].join(0.01)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert 0 < sum(n_found) < 10 * len(n_found)
    assert store.info().n_bytes <= store.limit


def test_every_bit_of_a_store_may_be_wrong(tmp_path):
    texts = [str(i) for i in range(3)]
    write(open_store(tmp_path), texts)
    (rows,) = tmp_path.glob("*/shelves/*.rows")
    (index,) = tmp_path.glob("*/shelves/*.texts")
    places = [(index, at) for at in range(os.path.getsize(index))]
    places += [(rows, at) for at in range(0, os.path.getsize(rows), 997)]
    for path, at in places:
        sound = path.read_bytes()
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(DiskStore(str(tmp_path), MemoryStore(Keep(0))), texts)
        assert found.sum() in (0, 2), (path, at)
        path.write_bytes(sound)
    assert read(DiskStore(str(tmp_path), MemoryStore(Keep(0))), texts).all()
