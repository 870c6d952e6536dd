"""A folder of activations: what is damaged in it, and how it is kept."""

import errno
import os
import shutil
import stat
import warnings

import numpy as np
import pytest
from shelf_rows import (
    SEGMENTS,
    TEXTS,
    as_new_process,
    file_of,
    flip,
    read,
    write,
)

from skspin._store import open_store
from skspin._store.disk import DiskStore
from skspin._store.keep import Keep
from skspin._store.memory import MemoryStore
from skspin._store.shelves import Shelves

# Damage


def test_a_damaged_row_is_reported_missing_and_replaced(tmp_path):
    write(as_new_process(tmp_path), TEXTS)
    flip(file_of(tmp_path, "rows"), 7 * 48 * 4 + 100)
    store = as_new_process(tmp_path)
    with pytest.warns(UserWarning, match="1 texts.*damaged.*computed again"):
        found = read(store, TEXTS)
    np.testing.assert_array_equal(np.flatnonzero(~found), [7])
    write(store, TEXTS)
    assert read(store, TEXTS).all()
    assert read(as_new_process(tmp_path), TEXTS).all()


def test_a_damaged_row_is_not_served_for_some_of_its_segments_either(tmp_path):
    write(as_new_process(tmp_path), TEXTS)
    flip(file_of(tmp_path, "rows"), 7 * 48 * 4 + 4 * 40)  # in the last segment
    out = np.empty((len(TEXTS), 16), np.float32)
    with pytest.warns(UserWarning, match="damaged"):
        found = as_new_process(tmp_path).read("", TEXTS, SEGMENTS[:1], out)
    np.testing.assert_array_equal(np.flatnonzero(~found[:, 0]), [7])


@pytest.mark.parametrize("at", range(-24, 0, 5))
def test_a_damaged_text_or_checksum_costs_that_text_only(tmp_path, at):
    write(as_new_process(tmp_path), TEXTS)
    flip(file_of(tmp_path, "texts"), at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read(as_new_process(tmp_path), TEXTS)
    np.testing.assert_array_equal(np.flatnonzero(~found), [len(TEXTS) - 1])


@pytest.mark.parametrize("at", range(0, 100, 7))
def test_a_damaged_header_costs_the_shelf_and_nothing_else(tmp_path, at):
    write(as_new_process(tmp_path), TEXTS)
    flip(file_of(tmp_path, "texts"), at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = as_new_process(tmp_path)
        assert not read(store, TEXTS).any()
        write(store, TEXTS)
        assert read(as_new_process(tmp_path), TEXTS).all()


def test_rows_that_were_cut_off_are_computed_again_with_one_warning(tmp_path):
    write(as_new_process(tmp_path), TEXTS)
    store = as_new_process(tmp_path)
    assert read(store, TEXTS[:1]).all()
    os.truncate(file_of(tmp_path, "rows"), 10 * 48 * 4 + 5)
    with pytest.warns(UserWarning, match="cut off") as caught:
        found = read(store, TEXTS)
        read(store, TEXTS)
    assert len(caught) == 1
    np.testing.assert_array_equal(np.flatnonzero(found), np.arange(10))
    write(store, TEXTS[::-1])
    assert read(store, TEXTS).all()
    assert read(as_new_process(tmp_path), TEXTS).all()


def test_a_row_is_never_taken_for_another_text(tmp_path):
    patient = as_new_process(tmp_path)
    write(as_new_process(tmp_path), TEXTS)
    read(patient, TEXTS[:1])
    # While it looks away, the files are cut off and grow again by the rows of other texts.
    os.truncate(file_of(tmp_path, "rows"), 10 * 48 * 4)
    os.truncate(file_of(tmp_path, "texts"), os.path.getsize(file_of(tmp_path, "texts")) - 30 * 24)
    write(as_new_process(tmp_path), [f"another {i}" for i in range(60)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read(patient, TEXTS)[:10].all()
        assert not read(patient, TEXTS)[10:].any()


def test_a_torn_end_is_written_over(tmp_path):
    write(as_new_process(tmp_path), TEXTS[:5])
    for kind, torn in (("rows", b"x" * 1000), ("texts", b"x" * 23)):
        with open(file_of(tmp_path, kind), "ab") as file:
            file.write(torn)
    store = as_new_process(tmp_path)
    assert read(store, TEXTS[:5]).all()
    write(store, TEXTS)
    assert read(as_new_process(tmp_path), TEXTS).all()
    assert os.path.getsize(file_of(tmp_path, "rows")) == len(TEXTS) * 48 * 4


def test_a_damaged_card_is_missing(tmp_path):
    as_new_process(tmp_path).put_metadata("shape", {"widths": [4]})
    (path,) = tmp_path.glob("skspin-1/cards/*.json")
    for damaged in ("", "{", "[]", '{"name": "shape"}', path.read_text().replace("4", "5")):
        path.write_text(damaged)
        with pytest.warns(UserWarning, match="made again"):
            assert as_new_process(tmp_path).get_metadata("shape") is None


def test_a_card_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    cards = tmp_path / "skspin-1" / "cards"

    def refuse(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.warns(UserWarning, match="No space left"):
            store.put_metadata("a", 1)
    assert not list(cards.iterdir())
    assert store.get_metadata("a") == 1  # from memory


# Folders


def test_rows_whose_shelf_is_removed_under_the_writer_are_computed_again(tmp_path, monkeypatch):
    store = DiskStore(str(tmp_path), MemoryStore(Keep(0)))  # with nothing in memory
    write(store, TEXTS[:10])
    make_room = Shelves._make_room

    def and_another_process_removes_it(self, n_bytes, limit, shelf):
        places = make_room(self, n_bytes, limit, shelf)
        for path in (tmp_path / "skspin-1" / "shelves").iterdir():
            path.unlink()
        return places

    with monkeypatch.context() as patch:
        patch.setattr(Shelves, "_make_room", and_another_process_removes_it)
        write(store, TEXTS[10:20])
    assert not read(store, TEXTS[:20]).any()
    write(store, TEXTS[:20])
    assert read(store, TEXTS[:20]).all()
    assert read(DiskStore(str(tmp_path), MemoryStore(Keep(0))), TEXTS[:20]).all()


def test_the_folder_is_readable_by_its_owner_alone(tmp_path):
    write(open_store(tmp_path / "new" / "store"), TEXTS)
    for path in [tmp_path / "new" / "store", *tmp_path.glob("new/store/skspin-1/**")]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_other_formats_are_left_alone(tmp_path):
    write(as_new_process(tmp_path), TEXTS)
    texts = file_of(tmp_path, "texts")
    texts.write_bytes(b"skspin shelf 2\n\0" + texts.read_bytes()[16:])
    (tmp_path / "skspin-2").mkdir()
    (tmp_path / "skspin-2" / "anything").write_text("later")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    store = as_new_process(tmp_path)
    assert not read(store, TEXTS).any()
    write(store, TEXTS)
    assert read(as_new_process(tmp_path), TEXTS).all()
    store.clear()
    assert {path: path.read_bytes() for path in before if path.exists()} == before


def test_what_is_asked_for_again_is_served_from_memory(tmp_path):
    write(as_new_process(tmp_path), TEXTS)
    store = as_new_process(tmp_path)
    assert read(store, TEXTS).all()
    assert read(store, TEXTS).all()
    file_of(tmp_path, "rows").write_bytes(bytes(len(TEXTS) * 48 * 4))
    assert read(store, TEXTS).all()


def test_the_bound_is_kept_in_the_folder_for_all(tmp_path):
    assert as_new_process(tmp_path).limit == shutil.disk_usage(tmp_path).total // 4
    as_new_process(tmp_path).limit = 12_345
    assert as_new_process(tmp_path).limit == 12_345
    store = as_new_process(tmp_path)
    store.clear()
    assert store.limit == 12_345


@pytest.mark.parametrize("years", [-50, 50])
def test_a_clock_that_was_wrong_does_not_change_what_makes_room(tmp_path, years):
    store = as_new_process(tmp_path)
    store.limit = 16 * 8 * 216  # eight rows in each of sixteen shelves
    for start_ in range(0, 80, 8):
        write(store, [f"text {i}" for i in range(start_, start_ + 8)])
    # The first and second shelves were used, in this order, when the clock was wrong.
    for later, shelf in enumerate(sorted(tmp_path.glob("skspin-1/shelves/*.texts"))[:2]):
        time = shelf.stat().st_mtime + years * 365 * 86_400 + later
        os.utime(shelf, (time, time))
    store = as_new_process(tmp_path)
    read(store, ["text 24"])
    for i in range(1000, 1080):
        write(store, [f"text {i}"])
    found = read(as_new_process(tmp_path), ["text 24"])
    assert found.all()
    assert store.info().n_bytes <= store.limit
