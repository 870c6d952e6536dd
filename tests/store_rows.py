"""Rows for a store that tell whether they are right, and processes that use it."""

import inspect
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from skspin._layout import Layout, Segment
from skspin._store import open_store

LAYOUT = Layout(tuple(Segment(None, layer, "hidden", "mean", 16) for layer in range(3)))
TEXTS = [f"text {i}" for i in range(40)]


def activations(texts, layout=LAYOUT, key=""):
    """What a model would give: another number for each key, text, segment and neuron."""

    def row(text, segment):
        name = f"{key}/{text}/{segment.key}".encode("utf-8", "surrogatepass")
        seed = int.from_bytes(name, "little") % (2**61 - 1)
        whole = np.random.default_rng(seed).random(segment.width, np.float32)
        return whole if segment.neurons is None else whole[list(segment.neurons)]

    rows = [np.concatenate([row(text, s) for s in layout.segments]) for text in texts]
    return np.array(rows, np.float32).reshape(len(texts), layout.n_columns)


def look_up(store, texts, layout=LAYOUT, key="", *, compute=True, model="", out=None):
    """Look texts up, compute what is missing or leave it, and say what was (text, segment)."""
    out = np.full((len(texts), layout.n_columns), np.nan, np.float32) if out is None else out
    lacked = {}
    for missing in store.look_up(key, texts, layout, out, model=model):
        assert len(set(missing.texts)) == len(missing.texts)
        names = [segment.key for segment in missing.layout.segments]
        lacked |= {(text, name): True for text in missing.texts for name in names}
        if compute:
            values = activations(missing.texts, missing.layout, key)
            for start in range(0, len(values), 7):  # in parts, and not in order
                positions = np.arange(len(values))[::-1][start : start + 7]
                missing.add(positions, values[positions])
    missed = [[(text, s.key) in lacked for s in layout.segments] for text in texts]
    missed = np.array(missed, bool).reshape(len(texts), len(layout.segments))
    expected = activations(texts, layout, key)
    for j, columns in enumerate(layout.slices):
        right = np.ones(len(texts), bool) if compute else ~missed[:, j]
        assert (out[right, columns] == expected[right, columns]).all(), (
            "a row is not what was stored"
        )
    return missed


def write(store, texts, layout=LAYOUT, key="", **more):
    look_up(store, texts, layout, key, **more)


def read(store, texts, layout=LAYOUT, key=""):
    """Say which texts and segments are there, and check their rows."""
    return ~look_up(store, texts, layout, key, compute=False)


# Children load the store and nothing else of the package, so that they start quickly.
CHILD = f"""
import mmap, os, resource, signal, sys, time, types, warnings
import numpy as np
import numpy.random
package = types.ModuleType("skspin")
package.__path__ = [{str(Path(__file__).parents[1] / "skspin")!r}]
sys.modules["skspin"] = package
from skspin._layout import Layout, Segment
from skspin._store import open_store

LAYOUT = Layout(tuple(Segment(None, layer, "hidden", "mean", 16) for layer in range(3)))
"""
CHILD += "\n".join(map(inspect.getsource, (activations, look_up, write, read)))


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


_numbers = itertools.count()


def as_new_process(folder):
    """Open a copy of a folder, as a process does that knows nothing of it."""
    return open_store(shutil.copytree(folder, f"{folder} copy {next(_numbers)}"))


def chunks(folder):
    """List the files of a folder that hold rows."""
    return sorted(Path(folder).glob("skspin-*/chunks/*.npy"))


def flip(path, at, bits=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)
