"""A folder that several processes use, some of which end in the middle; and disks that fail."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from store_rows import TEXTS, as_new_process, chunks, finish, read, start, write

from skspin._store import Store, open_store


def test_open_stores_learn_what_others_write_merge_and_clear(tmp_path):
    store = open_store(tmp_path)
    write(store, TEXTS[:1])
    store.put_metadata("shape", {"n_layers": 3})
    code = """
store, texts = open_store(sys.argv[1]), sys.argv[2:]
assert store.get_metadata("shape") == {"n_layers": 3} and read(store, texts[:1]).all()
for text in texts[1:]:
    write(store, [text])
"""
    for end in (14, 27, 40):
        finish(start(code, tmp_path, *TEXTS[:end]))
        assert read(store, TEXTS[:end]).all()
    assert len(chunks(tmp_path)) < 20
    finish(start("open_store(sys.argv[1]).clear()", tmp_path))
    assert not read(store, TEXTS).any()
    write(store, TEXTS)
    assert read(as_new_process(tmp_path), TEXTS).all()


def test_five_processes_write_at_once_and_lose_nothing(tmp_path):
    code = """
store, me = open_store(sys.argv[1]), int(sys.argv[2])
mine = [f"{me} {i}" for i in range(150)]
all_write = [f"all {i}" for i in range(150)]
for i in range(0, 150, 5):
    write(store, mine[i : i + 5] + all_write[i : i + 5])
    store.put_metadata("shape", list(range(1000)))
    assert store.get_metadata("shape") == list(range(1000))
    assert read(store, mine[: i + 5] + all_write[: i + 5]).all()
"""
    for child in [start(code, tmp_path, me) for me in range(5)]:
        finish(child)
    texts = [f"{me} {i}" for me in (*range(5), "all") for i in range(150)]
    store = as_new_process(tmp_path)
    assert read(store, texts).all() and store.info().entries == 3 * len(texts)


def test_four_processes_stay_in_their_bound(tmp_path):
    open_store(tmp_path).limit = 200_000
    code = """
store = open_store(sys.argv[1])
for i in range(100):
    write(store, [f"{sys.argv[2]} {i} {k}" for k in range(10)])
"""
    for child in [start(code, tmp_path, me) for me in range(4)]:
        finish(child)
    store = open_store(tmp_path)
    write(store, TEXTS[:1])
    assert 100_000 < store.info().n_bytes <= store.limit


def test_a_kill_at_any_moment_leaves_whole_entries_and_all_that_was_finished(tmp_path):
    code = """
folder, rng = sys.argv[1], np.random.default_rng(0)
done = mmap.mmap(-1, 8)
n_kills = 0
store = open_store(folder)
for round in range(60):
    done[:] = bytes(8)
    child = os.fork()
    if not child:
        for i in range(10**6):
            write(store, [f"{round} {i} {k}" for k in range(5)])
            store.put_metadata(f"shape {round}", [i] * 100)
            done[:] = (i + 1).to_bytes(8, "little")
    while not any(done[:]):
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    n_kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    n_done = int.from_bytes(done[:], "little")
    assert read(store, [f"{round} {i} {k}" for i in range(n_done) for k in range(5)]).all()
    read(store, [f"{round} {n_done} {k}" for k in range(5)])
    found = store.get_metadata(f"shape {round}")
    assert found in ([n_done - 1] * 100, [n_done] * 100)
    write(store, [f"after {round}"])
print(n_kills)
"""
    assert finish(start(code, tmp_path)) == "60\n"
    assert read(as_new_process(tmp_path), [f"after {i}" for i in range(60)]).all()


def test_a_kill_in_the_middle_of_a_chunk_leaves_whole_entries(tmp_path):
    code = """
folder, rng, n_kills, n_torn = sys.argv[1], np.random.default_rng(0), 0, 0
wide, begun = Layout((Segment(None, 0, "hidden", "mean", 500_000),)), mmap.mmap(-1, 1)
store = open_store(folder)
store.limit = 40_000_000

def add(number):
    out = np.empty((2, 500_000), np.float32)
    for missing in store.look_up("", [f"{number} {k}" for k in range(2)], wide, out):
        n_texts = len(missing.texts)
        missing.add(np.arange(n_texts), np.full((n_texts, 500_000), number, np.float32))

def is_there(number):
    out = np.full((2, 500_000), number, np.float32)
    lacking = list(store.look_up("", [f"{number} {k}" for k in range(2)], wide, out))
    assert (out == number).all()
    return not lacking

# 40, and on a busy machine more, until one has fallen into the middle of a file.
while n_kills < 40 or (not n_torn and n_kills < 300):
    n_kills += 1
    begun[:] = bytes(1)
    child = os.fork()
    if not child:
        add(100 * n_kills)
        begun[:] = b"!"
        for i in range(1, 100):
            is_there(100 * n_kills)  # used again, so that it is not evicted
            add(100 * n_kills + i)
    while not any(begun[:]):
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.06)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    n_torn += any(name.endswith(".tmp") for name in os.listdir(folder + "/skspin-4/chunks"))
    assert is_there(100 * n_kills)
    for i in range(1, 5):
        is_there(100 * n_kills + i)
    add(0)
    assert is_there(0)
    assert store.info().n_bytes <= store.limit  # what was left half written makes room
    if n_kills % 10 == 0:
        store.clear()
        assert not os.listdir(folder + "/skspin-4/chunks")
print(n_torn)
"""
    assert int(finish(start(code, tmp_path))) > 0


def test_ctrl_c_at_any_moment_leaves_a_store_that_works(tmp_path):
    code = """
def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
sys.unraisablehook = lambda _: None  # it may also fall into a finaliser
folder, rng, n_interrupts = sys.argv[1], np.random.default_rng(0), 0
store = open_store(folder)
for round in range(150):
    texts = [f"{round} {k}" for k in range(20)]
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.01)
            for text in texts:
                write(store, [text])
        finally:  # inside the outer try: the alarm may go off while it is being stopped
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        n_interrupts += 1
    read(store, texts)
    write(store, texts)
    assert read(store, texts).all()
assert n_interrupts > 50, n_interrupts
"""
    finish(start(code, tmp_path))
    texts = [f"{i} {k}" for i in range(150) for k in range(20)]
    assert read(as_new_process(tmp_path), texts).all()


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
assert read(store, [f"{me} {i}" for me in (0, 1, 2, "parent") for i in range(100)]).all()
"""
    finish(start(code, tmp_path))
    texts = [f"{me} {i}" for me in (0, 1, 2, "parent") for i in range(100)]
    assert read(as_new_process(tmp_path), texts).all()


# Disks that are full, read-only or gone: one warning, and the computation goes on


def test_a_full_disk_warns_once_and_the_computation_goes_on(tmp_path):
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
store = open_store(sys.argv[1])
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
"""
    finish(start(code, tmp_path))
    assert not list(tmp_path.glob("skspin-*/*/*.tmp"))
    store = as_new_process(tmp_path)
    assert 50 < read(store, [f"text {i}" for i in range(400)]).all(axis=1).sum() < 400
    write(store, TEXTS)
    assert read(store, TEXTS).all()


READ_ONLY = """
if os.geteuid() == 0:
    os.setuid(65534)  # the system refuses nothing to root
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    store = open_store(sys.argv[1])
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


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_read_only_folder_is_read_and_warns_once(read_only_folder, is_filled):
    if is_filled:
        write(open_store(read_only_folder), ["before"])
    for path in read_only_folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    read_only_folder.chmod(0o555)
    assert finish(start(READ_ONLY, read_only_folder)) == f"{is_filled}\n"


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
    # The next one to open it begins anew.
    assert not read(open_store(folder), TEXTS).any()
    write(open_store(folder), TEXTS)
    assert read(as_new_process(folder), TEXTS).all()


def test_a_folder_that_was_emptied_is_filled_again(tmp_path):
    store = open_store(tmp_path)
    write(store, TEXTS)
    for inside in tmp_path.iterdir():
        shutil.rmtree(inside)
    with pytest.warns(UserWarning, match="Could not read the store"):
        read(store, TEXTS)
    write(open_store(tmp_path), TEXTS)
    assert read(as_new_process(tmp_path), TEXTS).all()


@pytest.mark.parametrize(
    "use", [Store.clear, lambda store: store.limit, lambda store: setattr(store, "limit", 9)]
)
def test_a_store_whose_folder_was_removed_is_cleared_and_bounded_with_a_warning(tmp_path, use):
    store = open_store(tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    with pytest.warns(UserWarning, match="Could not (read|write to) the store in .*store: "):
        use(store)
