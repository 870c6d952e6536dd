"""Rows for a store on disk that tell whether they are right, and processes that use it."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from skspin._layout import Segment
from skspin._store.disk import DiskStore
from skspin._store.keep import Keep
from skspin._store.memory import MemoryStore

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
from skspin._store.keep import Keep

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
