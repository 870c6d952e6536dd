"""A folder that several processes use, and some of them end in the middle."""

import os

import pytest
from shelf_rows import TEXTS, as_new_process, file_of, finish, read, start, write

from skspin._store import open_store


def test_another_process_finds_what_this_one_wrote(tmp_path):
    write(open_store(tmp_path), TEXTS)
    open_store(tmp_path).put_metadata("shape", {"n_layers": 3})
    code = """
store = open_store(sys.argv[1])
assert store.get_metadata("shape") == {"n_layers": 3}
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
    store.put_metadata("shape", list(range(1000)))
    assert store.get_metadata("shape") == list(range(1000))
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
            store.put_metadata("shape", [i] * 100)
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
    assert store.get_metadata("shape") in ([n_done - 1] * 100, [n_done] * 100)
    write(store, [f"after {round}"])
assert read(as_new_process(folder), [f"after {round}" for round in range(60)]).all()
print(n_kills)
"""
    assert finish(start(code, tmp_path)) == "60\n"


def test_a_kill_in_the_middle_of_a_row_leaves_whole_entries(tmp_path):
    code = """
folder, rng, n_kills, n_torn = sys.argv[1], np.random.default_rng(0), 0, 0
wide, begun = [Segment(None, 0, "hidden", "mean", 500_000)], mmap.mmap(-1, 1)

def large(number):
    return np.full((2, 500_000), number, np.float32)

def is_there(store, number):
    out = np.empty((2, 500_000), np.float32)
    found = store.read("", [f"{number} {k}" for k in range(2)], wide, out)[:, 0]
    assert (out[found] == number).all()
    return found.all()

# 50, and on a busy machine more, until one has fallen into the middle of a row.
while n_kills < 50 or (not n_torn and n_kills < 300):
    n_kills += 1
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
    assert int(finish(start(code, tmp_path))) > 0


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
