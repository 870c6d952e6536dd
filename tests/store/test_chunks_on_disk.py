"""A folder of chunks: what is damaged in it, how it is kept, and what makes room."""

import os
import shutil
import stat
import warnings

import numpy as np
import pytest
from store_rows import LAYOUT, TEXTS, activations, as_new_process, chunks, flip, read, write

from skspin import LLMActivationTransformer
from skspin._layout import Layout
from skspin._store import open_store
from skspin.datasets import demo_model

FIRST = Layout(LAYOUT.segments[:1])
ROW_BYTES = 48 * 4


def write_one_chunk(folder, texts=TEXTS, key=""):
    """Store texts so that they are in one file, whose rows are at its end."""
    before = set(chunks(folder))
    out = np.empty((len(texts), 48), np.float32)
    for missing in open_store(folder).look_up(key, texts, LAYOUT, out):
        missing.add(np.arange(len(texts)), activations(missing.texts, key=key))
    (path,) = set(chunks(folder)) - before
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
    damaged = write_one_chunk(tmp_path / "other")
    flip(damaged, -1)
    shutil.copy(damaged, chunks(tmp_path)[0].parent)
    with pytest.warns(UserWarning, match="damaged"):
        found = read(as_new_process(tmp_path), TEXTS)  # and checks what was found
    assert found[:, 0].all() and not found.all()


def test_every_bit_of_a_chunk_may_be_wrong(tmp_path):
    texts = TEXTS[:3]
    path = write_one_chunk(tmp_path, texts)
    size = os.path.getsize(path)
    places = [*range(size - 3 * ROW_BYTES), *range(size - 3 * ROW_BYTES, size, 41)]
    for i, at in enumerate(places):
        copy = shutil.copytree(tmp_path, tmp_path.parent / f"copy {i}")
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
    os.truncate(path, n_bytes if n_bytes in (0, 1) else os.path.getsize(path) + n_bytes)
    for store in (open_store(tmp_path), as_new_process(tmp_path)):  # one has mapped it before
        with pytest.warns(UserWarning, match="computed again") as caught:
            assert not read(store, TEXTS).any() and not read(store, TEXTS).any()
        assert len(caught) == 1
        write(store, TEXTS)
        assert read(store, TEXTS).all()
    assert read(as_new_process(tmp_path), TEXTS).all()


def test_a_row_is_never_taken_for_another_text_or_model(tmp_path):
    one = write_one_chunk(tmp_path / "one")
    turned = write_one_chunk(tmp_path / "turned", TEXTS[::-1])
    other = write_one_chunk(tmp_path / "other", TEXTS, "another model")
    folder = shutil.copytree(tmp_path / "one", tmp_path / "copy")
    store = open_store(folder)
    assert read(store, TEXTS).all()
    chunks(folder)[0].write_bytes(turned.read_bytes())  # while it is mapped
    with pytest.warns(UserWarning, match="40 texts.*damaged"):
        assert not read(store, TEXTS).any()
    shutil.copy(other, one)
    with pytest.warns(UserWarning, match="computed again"):
        assert not read(as_new_process(tmp_path / "one"), TEXTS).any()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_row_that_was_stored_twice_is_found_when_one_is_gone(tmp_path, gone):
    write_one_chunk(tmp_path)
    shutil.copy(write_one_chunk(tmp_path / "b", TEXTS[10:]), chunks(tmp_path)[0].parent)
    store = open_store(tmp_path)
    assert read(store, TEXTS).all() and store.info().entries == 3 * len(TEXTS)
    sorted(chunks(tmp_path), key=os.path.getsize)[gone].unlink()
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


def test_two_folders_share_nothing_even_if_a_link_leads_to_one_and_then_the_other(tmp_path):
    link = tmp_path / "link"
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        assert not read(open_store(link), TEXTS).any()
        write(open_store(link), TEXTS)
    open_store(tmp_path / "one").clear()
    assert not read(open_store(tmp_path / "one"), TEXTS).any()
    assert read(open_store(tmp_path / "other"), TEXTS).all()


def test_the_bound_is_kept_in_the_folder_for_all(tmp_path):
    assert open_store(tmp_path).limit == shutil.disk_usage(tmp_path).total // 4
    open_store(tmp_path).limit = 12_345
    store = as_new_process(tmp_path)
    assert store.limit == 12_345
    store.clear()
    assert store.limit == 12_345


@pytest.mark.parametrize("years", [-50, 50])
def test_a_clock_that_was_wrong_does_not_change_what_makes_room(tmp_path, years):
    texts = [[f"text {i}" for i in range(start, start + 8)] for start in range(0, 160, 8)]
    open_store(tmp_path).limit = 15 * 2400  # bytes; a chunk of eight texts has nearly 2,400
    for eight in texts[:8]:
        write_one_chunk(tmp_path, eight)
    # Two chunks were used, in this order, when the clock was wrong.
    for later, path in enumerate(chunks(tmp_path)[:2]):
        time = path.stat().st_mtime + years * 365 * 86_400 + later
        os.utime(path, (time, time))
    folder = shutil.copytree(tmp_path, tmp_path / "copy")
    store = open_store(folder)
    read(store, ["text 24"])
    for eight in texts[8:]:
        write_one_chunk(folder, eight)
    assert not read(store, sum(texts[:8], [])).all()
    assert read(store, ["text 24"]).all()
    assert store.info().n_bytes <= store.limit


def test_texts_that_come_one_by_one_leave_few_files_and_no_damage_survives(tmp_path):
    store, texts = open_store(tmp_path), [f"text {i}" for i in range(300)]
    for text in texts[:280]:
        write(store, [text])
    assert len(chunks(tmp_path)) < 40
    assert store.info().entries == 3 * 280
    assert read(store, texts[:280]).all()
    flipped = [path for path in chunks(tmp_path) if os.path.getsize(path) < 1000][:2]
    for path in flipped:  # of one text each
        flip(path, -1)
    store = as_new_process(tmp_path)
    with pytest.warns(UserWarning, match="2 texts.*damaged.*computed again") as caught:
        for text in texts[280:]:
            write(store, [text])
    assert len(caught) == 1
    assert (~read(store, texts)).all(axis=1).sum() == len(flipped) == 2
    write(store, texts)
    assert read(store, texts).all()


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
