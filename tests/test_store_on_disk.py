"""What may happen to a folder: other processes, sudden ends, damage, and disks that refuse."""

import errno
import inspect
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from skspin._keep import Keep
from skspin._layout import Segment
from skspin._store import open_store
from skspin._store.disk import DiskStore
from skspin._store.memory import MemoryStore
from skspin._store.shelves import Shelves

SEGMENTS = [Segment(None, layer, "hidden", "mean", 16) for layer in range(3)]
TEXTS = [f"text {i}" for i in range(40)]


def activations(texts):
    seeds = [int.from_bytes(text.encode(), "little") % 2**32 for text in texts]
    return np.array([np.random.default_rng(seed).random(48) for seed in seeds], np.float32)


def write(store, texts):
    store.write("", texts, SEGMENTS, activations(texts))


def read(store, texts):
    """Say which texts are there, and check their rows."""
    out = np.empty((len(texts), 48), np.float32)
    found = store.read("", texts, SEGMENTS, out).all(axis=1)
    assert (out[found] == activations(texts)[found]).all(), "a row is not what was written"
    return found


# Children load the store and nothing else of the package, so that they start quickly.
CHILD = f"""
import mmap, os, resource, signal, sys, time, types, warnings
import numpy as np
import numpy.random
package = types.ModuleType("skspin")
package.__path__ = [{str(Path(__file__).parents[1] / "skspin")!r}]
sys.modules["skspin"] = package
from skspin._layout import Segment
from skspin._store import open_store
from skspin._store.disk import DiskStore
from skspin._store.memory import MemoryStore
from skspin._keep import Keep

SEGMENTS = [Segment(None, layer, "hidden", "mean", 16) for layer in range(3)]
"""


def as_new_process(folder):
    """Open a folder as a process does that has nothing of it in memory."""
    return DiskStore(str(folder), MemoryStore(Keep(10**8)))


CHILD += "\n".join(map(inspect.getsource, (activations, write, read, as_new_process)))


def start(code, *arguments):
    command = [sys.executable, "-W", "error", "-c", CHILD + code, *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(child):
    """Wait for a child and return what it printed; nothing may have gone wrong in it."""
    printed, errors = child.communicate(timeout=100)
    assert child.returncode == 0 and not errors, errors
    return printed


def file_of(folder, kind):
    (path,) = folder.glob(f"skspin-1/shelves/*.{kind}")
    return path


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# Processes


def test_another_process_finds_what_this_one_wrote(tmp_path):
    write(open_store(tmp_path), TEXTS)
    open_store(tmp_path).put_card("shape", {"n_layers": 3})
    code = """
store = open_store(sys.argv[1])
assert store.get_card("shape") == {"n_layers": 3}
print(read(store, sys.argv[2:]).all())
"""
    assert finish(start(code, tmp_path, *TEXTS)) == "True\n"


def test_an_open_store_learns_what_others_write_and_clear(tmp_path):
    one, other = as_new_process(tmp_path), as_new_process(tmp_path)
    assert not read(one, TEXTS).any()
    for i, text in enumerate(TEXTS):
        write((one, other)[i % 2], [text])
        assert read(as_new_process(tmp_path), TEXTS[: i + 1]).all()
    assert read(one, TEXTS).all() and read(other, TEXTS).all()
    one.clear()
    assert not read(one, TEXTS).any()
    write(other, TEXTS)
    assert read(as_new_process(tmp_path), TEXTS).all()


def test_five_processes_write_at_once_and_lose_nothing(tmp_path):
    code = """
store, me = open_store(sys.argv[1]), int(sys.argv[2])
mine = [f"{me} {i}" for i in range(150)]
all_write = [f"all {i}" for i in range(150)]
for i in range(0, 150, 5):
    write(store, mine[i : i + 5] + all_write[i : i + 5])
    store.put_card("shape", list(range(1000)))
    assert store.get_card("shape") == list(range(1000))
    assert read(store, mine[: i + 5] + all_write[: i + 5]).all()
"""
    for child in [start(code, tmp_path, me) for me in range(5)]:
        finish(child)
    texts = [f"{me} {i}" for me in (*range(5), "all") for i in range(150)]
    assert read(as_new_process(tmp_path), texts).all()


def test_processes_that_follow_each_other_fill_the_same_files(tmp_path):
    for text in TEXTS[:3]:
        finish(start("write(open_store(sys.argv[1]), [sys.argv[2]])", tmp_path, text))
    assert os.path.getsize(file_of(tmp_path, "rows")) == 3 * 48 * 4


def test_a_kill_at_any_moment_leaves_whole_entries_and_all_that_was_finished(tmp_path):
    code = """
folder, rng = sys.argv[1], np.random.default_rng(0)
done = mmap.mmap(-1, 8)
n_kills = 0
for round in range(60):
    done[:] = bytes(8)
    child = os.fork()
    if not child:
        store = as_new_process(folder)
        for i in range(10**6):
            write(store, [f"{round} {i} {k}" for k in range(5)])
            store.put_card("shape", [i] * 100)
            done[:] = (i + 1).to_bytes(8, "little")
    while not any(done[:]):
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    n_kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    n_done = int.from_bytes(done[:], "little")
    store = as_new_process(folder)
    assert read(store, [f"{round} {i} {k}" for i in range(n_done) for k in range(5)]).all()
    read(store, [f"{round} {n_done} {k}" for k in range(5)])
    assert store.get_card("shape") in ([n_done - 1] * 100, [n_done] * 100)
    write(store, [f"after {round}"])
assert read(as_new_process(folder), [f"after {round}" for round in range(60)]).all()
print(n_kills)
"""
    assert finish(start(code, tmp_path)) == "60\n"


def test_a_kill_in_the_middle_of_a_row_leaves_whole_entries(tmp_path):
    code = """
folder, rng, n_torn = sys.argv[1], np.random.default_rng(0), 0
wide, begun = [Segment(None, 0, "hidden", "mean", 500_000)], mmap.mmap(-1, 1)

def large(number):
    return np.full((2, 500_000), number, np.float32)

def is_there(store, number):
    out = np.empty((2, 500_000), np.float32)
    found = store.read("", [f"{number} {k}" for k in range(2)], wide, out)[:, 0]
    assert (out[found] == number).all()
    return found.all()

for round in range(50):
    begun[:] = bytes(1)
    child = os.fork()
    if not child:
        store = as_new_process(folder)
        store.write("", ["0 0", "0 1"], wide, large(0))
        begun[:] = b"!"
        for i in range(1, 100):
            store.write("", [f"{i} {k}" for k in range(2)], wide, large(i))
    while not any(begun[:]):
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.008)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (rows,) = (os.path.join(folder, "skspin-1/shelves", name)
               for name in os.listdir(os.path.join(folder, "skspin-1/shelves"))
               if name.endswith(".rows"))
    n_torn += os.path.getsize(rows) % 2_000_000 != 0
    store = as_new_process(folder)
    assert is_there(store, 0)
    for i in range(1, 101):
        is_there(store, i)
    store.write("", ["200 0", "200 1"], wide, large(200))
    assert is_there(as_new_process(folder), 200)
    store.clear()
print(n_torn)
"""
    assert int(finish(start(code, tmp_path))) > 0  # kills did fall into the middle of a row


def test_ctrl_c_at_any_moment_leaves_a_store_that_works(tmp_path):
    code = """
def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
sys.unraisablehook = lambda _: None  # it may also fall into a finaliser
folder, rng, n_interrupts = sys.argv[1], np.random.default_rng(0), 0
store = as_new_process(folder)
for round in range(150):
    texts = [f"{round} {k}" for k in range(20)]
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.004)
            for text in texts:
                write(store, [text])
        finally:  # inside the outer try: the alarm may go off while it is being stopped
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        n_interrupts += 1
    read(store, texts)
    write(store, texts)
    assert read(store, texts).all() and read(as_new_process(folder), texts).all()
assert n_interrupts > 50, n_interrupts
"""
    finish(start(code, tmp_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_and_its_parent_write_without_harm(tmp_path):
    code = """
store = open_store(sys.argv[1])
write(store, ["before"])
children = []
for me in range(3):
    child = os.fork()
    if not child:
        for i in range(100):
            write(store, [f"{me} {i}"])
        os._exit(0 if read(store, ["before", f"{me} 0"]).all() else 1)
    children.append(child)
for i in range(100):
    write(store, [f"parent {i}"])
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
texts = [f"{me} {i}" for me in (0, 1, 2, "parent") for i in range(100)]
assert read(store, texts).all() and read(as_new_process(sys.argv[1]), texts).all()
"""
    finish(start(code, tmp_path))


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
    as_new_process(tmp_path).put_card("shape", {"widths": [4]})
    (path,) = tmp_path.glob("skspin-1/cards/*.json")
    for damaged in ("", "{", "[]", '{"name": "shape"}', path.read_text().replace("4", "5")):
        path.write_text(damaged)
        with pytest.warns(UserWarning, match="made again"):
            assert as_new_process(tmp_path).get_card("shape") is None


def test_a_card_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    cards = tmp_path / "skspin-1" / "cards"

    def refuse(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.warns(UserWarning, match="No space left"):
            store.put_card("a", 1)
    assert not list(cards.iterdir())
    assert store.get_card("a") == 1  # from memory


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


# Trouble


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
    store.put_card("large", "x" * 50_000)
    assert store.get_card("large") == "x" * 50_000
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
        store.put_card("shape", 1)
        assert read(store, ["after"]).all() and store.get_card("shape") == 1
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
