"""A folder of chunks: what is damaged in it, how it is kept, and what makes room."""

import os
import shutil
import stat
import warnings

import numpy as np
import pytest
from store_rows import LAYOUT, TEXTS, activations, as_new_process, chunks, flip, read, write

from skspin import LLMActivationTransformer
from skspin._layout import Layout, Segment
from skspin._store import open_store
from skspin.datasets import demo_model

FIRST = Layout(LAYOUT.segments[:1])
ROW_BYTES = 48 * 4


def write_one_chunk(folder, texts=TEXTS):
    """Store texts so that they are in one file, whose rows are at its end."""
    out = np.empty((len(texts), 48), np.float32)
    for missing in open_store(folder).look_up("", texts, LAYOUT, out):
        missing.add(np.arange(len(texts)), activations(missing.texts))
    (path,) = chunks(folder)
    return path


def test_a_chunk_is_a_numpy_file_without_pickles(tmp_path):
    path = write_one_chunk(tmp_path)
    record = np.load(path, mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(record["rows"], activations(TEXTS))
    assert record["rows"].ctypes.data % 8 == 0


# Damage


@pytest.mark.parametrize("layout", [LAYOUT, FIRST], ids=["all columns", "others"])
def test_a_damaged_row_is_missing_and_replaced_here_and_elsewhere(tmp_path, layout):
    flip(write_one_chunk(tmp_path), -33 * ROW_BYTES + 4 * 40)  # of text 7, in the last segment
    folder = shutil.copytree(tmp_path, tmp_path / "copy")
    store = open_store(folder)
    with pytest.warns(UserWarning, match="1 texts.*damaged.*computed again") as caught:
        found = read(store, TEXTS, layout)
        np.testing.assert_array_equal(read(store, TEXTS, layout), found)
    assert len(caught) == 1
    np.testing.assert_array_equal(np.flatnonzero(~found.all(axis=1)), [7])
    assert not read(as_new_process(folder), TEXTS[7:8]).any()  # and nobody is warned again
    write(store, TEXTS)
    assert read(store, TEXTS).all() and read(as_new_process(folder), TEXTS).all()


def test_a_damaged_row_is_not_copied_over_one_that_was_found(tmp_path):
    write(open_store(tmp_path), TEXTS, FIRST)
    sound = chunks(tmp_path)
    write(open_store(tmp_path / "other"), TEXTS)
    for path in chunks(tmp_path / "other"):
        flip(path, -1)
        shutil.copy(path, sound[0].parent)
    store = as_new_process(tmp_path)
    with pytest.warns(UserWarning, match="damaged"):
        found = read(store, TEXTS)  # and checks what was found
    assert found[:, 0].all() and not found.all()


def test_every_bit_of_a_chunk_may_be_wrong(tmp_path):
    texts = TEXTS[:3]
    path = write_one_chunk(tmp_path, texts)
    size = os.path.getsize(path)
    places = [*range(size - 3 * ROW_BYTES), *range(size - 3 * ROW_BYTES, size, 41)]
    for i, at in enumerate(places):
        copy = tmp_path / f"copy {i}"
        os.makedirs(copy / path.relative_to(tmp_path).parent)
        shutil.copy(path, copy / path.relative_to(tmp_path))
        flip(copy / path.relative_to(tmp_path), at, 1 << i % 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(open_store(copy), texts).all(axis=1)
            assert found.sum() in (0, 2, 3), at  # 3: a few bits of NumPy's header say nothing
            write(open_store(copy), texts)
        assert read(open_store(copy), texts).all() and read(as_new_process(copy), texts).all()
        shutil.rmtree(copy)


@pytest.mark.parametrize("n_bytes", [-5, -10 * ROW_BYTES, -38 * ROW_BYTES, 100, 0, 1])
def test_a_chunk_that_was_cut_off_or_has_grown_is_computed_again(tmp_path, n_bytes):
    path = write_one_chunk(tmp_path)
    sizes = os.path.getsize(path)
    os.truncate(path, n_bytes if n_bytes in (0, 1) else sizes + n_bytes)
    for store in (open_store(tmp_path), as_new_process(tmp_path)):  # one has mapped it before
        with pytest.warns(UserWarning, match="computed again") as caught:
            assert not read(store, TEXTS).any() and not read(store, TEXTS).any()
        assert len(caught) == 1
        write(store, TEXTS)
        assert read(store, TEXTS).all()
        shutil.copytree(tmp_path, tmp_path.parent / "kept", dirs_exist_ok=True)
    assert read(as_new_process(tmp_path), TEXTS).all()


def test_a_row_is_never_taken_for_another_text_or_model(tmp_path):
    write_one_chunk(tmp_path / "a")
    other = write_one_chunk(tmp_path / "b", TEXTS[::-1])
    (path,) = chunks(shutil.copytree(tmp_path / "a", tmp_path / "c"))
    store = open_store(tmp_path / "c")
    assert read(store, TEXTS).all()
    path.write_bytes(other.read_bytes())  # while it is mapped
    with pytest.warns(UserWarning, match="40 texts.*damaged"):
        assert not read(store, TEXTS).any()
    write(open_store(tmp_path / "d"), TEXTS, key="another model")
    shutil.copy(chunks(tmp_path / "d")[0], other)
    store = as_new_process(tmp_path / "b")
    with pytest.warns(UserWarning, match="computed again"):
        assert not read(store, TEXTS).any()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_row_that_was_stored_twice_is_found_when_one_is_gone(tmp_path, gone):
    write_one_chunk(tmp_path / "a")
    write_one_chunk(tmp_path / "b", TEXTS[10:])
    shutil.copy(chunks(tmp_path / "b")[0], chunks(tmp_path / "a")[0].parent)
    folder = shutil.copytree(tmp_path / "a", tmp_path / "c")
    store = open_store(folder)
    assert read(store, TEXTS).all() and store.info().entries == 3 * len(TEXTS)
    sorted(chunks(folder), key=os.path.getsize)[gone].unlink()
    assert read(store, TEXTS[10:]).all()


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"name": "shape"}', None])
def test_damaged_metadata_are_missing(tmp_path, damaged):
    open_store(tmp_path).put_metadata("shape", {"widths": [4]})
    (path,) = tmp_path.glob("skspin-*/metadata/*.json")
    path.write_text(path.read_text().replace("4", "5") if damaged is None else damaged)
    store = as_new_process(tmp_path)
    with pytest.warns(UserWarning, match="made again"):
        assert store.get_metadata("shape") is None
    store.put_metadata("shape", 1)
    assert store.get_metadata("shape") == 1


# The folder


def test_the_folder_is_readable_by_its_owner_alone(tmp_path):
    write(open_store(tmp_path / "new" / "store"), TEXTS)
    for path in [tmp_path / "new" / "store", *tmp_path.glob("new/store/skspin-*/**")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_what_is_not_its_own_is_left_alone(tmp_path):
    home = write_one_chunk(tmp_path).parents[1]
    before = tmp_path / "skspin-1" / "shelves"  # the format before this one
    before.mkdir(parents=True)
    foreign = [tmp_path, home, home / "chunks", home / "metadata", before]
    for folder in foreign:
        (folder / "rows.npy").write_text("a user's")
    store = open_store(tmp_path)
    assert read(store, TEXTS).all()
    store.limit = 0
    store.clear()
    assert not chunks(tmp_path)[1:]
    assert all((folder / "rows.npy").read_text() == "a user's" for folder in foreign)


@pytest.mark.parametrize("name", ["a b", "Übung 日本", "memory", "%41", "-", "x" * 200])
def test_a_folder_may_have_any_name(tmp_path, name):
    for folder in (tmp_path / name, str(tmp_path / name)):
        write(open_store(folder), TEXTS)
        assert (tmp_path / name).is_dir() and open_store(folder).info().entries == 3 * len(TEXTS)
    shutil.move(tmp_path / name, tmp_path / "moved")
    assert read(open_store(tmp_path / "moved"), TEXTS).all()


def test_a_link_that_is_turned_leads_to_the_other_store(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    write(open_store(tmp_path / "link"), ["1"])
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert not read(open_store(tmp_path / "link"), ["1"]).any()
    assert read(open_store(tmp_path / "one"), ["1"]).all()


def test_two_folders_share_nothing(tmp_path):
    one, other = (open_store(tmp_path / name) for name in ("one", "other"))
    write(one, TEXTS)
    assert not read(other, TEXTS).any()
    write(other, TEXTS)
    one.clear()
    assert read(other, TEXTS).all() and not read(one, TEXTS).any()


def test_the_bound_is_kept_in_the_folder_for_all(tmp_path):
    assert open_store(tmp_path).limit == shutil.disk_usage(tmp_path).total // 4
    open_store(tmp_path).limit = 12_345
    store = as_new_process(tmp_path)
    assert store.limit == 12_345
    store.clear()
    assert store.limit == 12_345


@pytest.mark.parametrize("years", [-50, 50])
def test_a_clock_that_was_wrong_does_not_change_what_makes_room(tmp_path, years):
    store = open_store(tmp_path)
    store.limit = 15 * 2400  # bytes; a chunk of eight texts has nearly 2,400
    for start in range(0, 64, 8):
        write_texts(store, [f"text {i}" for i in range(start, start + 8)])
    # Two chunks were used, in this order, when the clock was wrong.
    for later, path in enumerate(chunks(tmp_path)[:2]):
        time = path.stat().st_mtime + years * 365 * 86_400 + later
        os.utime(path, (time, time))
    store = as_new_process(tmp_path)
    read(store, ["text 24"])
    for start in range(1000, 1096, 8):
        write_texts(store, [f"text {i}" for i in range(start, start + 8)])
    assert not read(store, [f"text {i}" for i in range(64)]).all()
    assert read(store, ["text 24"]).all()
    assert store.info().n_bytes <= store.limit


def write_texts(store, texts):
    out = np.empty((len(texts), 48), np.float32)
    for missing in store.look_up("", texts, LAYOUT, out):
        missing.add(np.arange(len(texts)), activations(missing.texts))


def test_texts_that_come_one_by_one_leave_few_files_and_are_all_there(tmp_path):
    store, texts = open_store(tmp_path), [f"text {i}" for i in range(700)]
    for text in texts:
        write(store, [text])
    assert len(chunks(tmp_path)) < 40
    assert store.info().entries == 3 * len(texts)
    assert read(store, texts).all() and read(as_new_process(tmp_path), texts).all()


def test_damaged_rows_do_not_survive_a_merger(tmp_path):
    store = open_store(tmp_path)
    for text in TEXTS[:15]:
        write(store, [text])
    for path in chunks(tmp_path)[:2]:
        flip(path, -1)
    store = as_new_process(tmp_path)
    with pytest.warns(UserWarning, match="2 texts.*damaged.*computed again") as caught:
        for text in TEXTS[20:]:
            write(store, [text])
    lost = ~read(store, TEXTS).all(axis=1)
    assert len(caught) == 1
    assert lost[:15].sum() == 2 and lost[15:20].all() and not lost[20:].any()
    write(store, TEXTS)
    assert read(store, TEXTS).all()


def test_a_large_call_leaves_chunks_fine_enough_to_make_room_by(tmp_path):
    wide = Layout((Segment(None, 0, "hidden", "mean", 10_000),))
    store, texts = open_store(tmp_path), [str(i) for i in range(64)]
    store.limit = 64 * 42_000
    out = np.ones((64, 10_000), np.float32)
    for missing in store.look_up("", texts, wide, out):
        missing.add(np.arange(64), out)
    assert store.info().entries > 56
    assert max(os.path.getsize(path) for path in chunks(tmp_path)) < store.limit / 14


# Through the estimator


def test_where_there_is_a_file_there_is_one_warning_and_memory(tmp_path):
    def transformer():
        model = LLMActivationTransformer(demo_model(), layers=0, dtype="float32")
        return model.set_params(cache=tmp_path / "file").fit(TEXTS[:3])

    (tmp_path / "file").touch()
    open_store("memory").clear()
    with pytest.warns(UserWarning, match="Could not make the store") as caught:
        for _ in range(3):
            assert np.isfinite(transformer().transform(TEXTS[:3])).all()
            assert open_store(tmp_path / "file").info().entries == 0
            assert open_store("memory").info().entries == 3
    assert len(caught) == 1
    (tmp_path / "file").unlink()  # and once it is out of the way, there is a store
    (tmp_path / "file").mkdir()
    transformer().transform(TEXTS[:3])
    assert open_store(tmp_path / "file").info().entries == 3
