"""Disks that are full, read-only or gone: one warning, and the computation goes on."""

import shutil
import tempfile
from pathlib import Path

import pytest
from shelf_rows import TEXTS, as_new_process, finish, read, start, write

from skspin._store import open_store


def test_a_full_disk_warns_once_and_the_computation_goes_on(tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
store = as_new_process(sys.argv[1])
texts = [f"text {i}" for i in range(400)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i in range(0, 400, 10):
        write(store, texts[i : i + 10])
        assert read(store, texts[: i + 10]).all()
    store.put_metadata("large", "x" * 50_000)
    assert store.get_metadata("large") == "x" * 50_000
(warning,) = caught
assert "Could not write to the store" in str(warning.message), warning
found = read(as_new_process(sys.argv[1]), texts)
assert 50 < found.sum() < 200 and found[: found.sum()].all()
"""
    finish(start(code, tmp_path))
    store = as_new_process(tmp_path)
    write(store, TEXTS)
    assert read(as_new_process(tmp_path), TEXTS).all()


READ_ONLY = """
if os.geteuid() == 0:
    os.setuid(65534)  # the system refuses nothing to root
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    store = as_new_process(sys.argv[1])
    print(read(store, ["before"]).all())
    assert store.info().entries in (0, 3)
    for _ in range(3):
        write(store, ["after"])
        store.put_metadata("shape", 1)
        assert read(store, ["after"]).all() and store.get_metadata("shape") == 1
(warning,) = caught
assert "Could not" in str(warning.message) and sys.argv[1] in str(warning.message), warning
"""


@pytest.fixture
def read_only_folder():
    """Make a folder that another user can reach, and that nobody may write to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o700)
    folder.chmod(0o700)
    shutil.rmtree(folder)


def test_a_read_only_folder_warns_once_and_the_computation_goes_on(read_only_folder):
    read_only_folder.chmod(0o555)
    assert finish(start(READ_ONLY, read_only_folder)) == "False\n"


def test_a_read_only_store_can_be_read(read_only_folder):
    write(as_new_process(read_only_folder), ["before"])
    for path in read_only_folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    read_only_folder.chmod(0o555)
    assert finish(start(READ_ONLY, read_only_folder)) == "True\n"


def test_a_folder_that_is_a_file_warns_once_and_the_computation_goes_on(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="Could not make the store") as caught:
        store = as_new_process(tmp_path / "file")
        for _ in range(2):
            write(store, TEXTS)
            assert read(store, TEXTS).all()
            assert store.info().entries == 0
    assert len(caught) == 1


@pytest.mark.parametrize("next_is_write", [True, False])
def test_a_folder_removed_in_use_warns_once_and_the_computation_goes_on(tmp_path, next_is_write):
    folder = tmp_path / "store"
    store = open_store(folder)
    write(store, TEXTS[:5])
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="Could not (read|write to) the store") as caught:
        if next_is_write:
            write(store, TEXTS)
        found = read(store, TEXTS)
        write(store, TEXTS)
    assert found[:5].all() and read(store, TEXTS).all()
    assert len(caught) == 1
    # The next one to open it begins anew, on disk and in memory.
    assert not read(open_store(folder), TEXTS).any()
    write(open_store(folder), TEXTS)
    assert read(as_new_process(folder), TEXTS).all()
