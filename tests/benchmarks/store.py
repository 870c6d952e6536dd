"""The store beside plain NumPy: reading 9,613 texts x 7 layers x 384 neurons in a random order.

Every reading is done in a process of its own, by turns, after imports::

    python tests/benchmarks/store.py --repeats 11

The reference is ``numpy.load`` of the same bytes, then indexing with the same order.

With ``--data FOLDER``, which holds sst2.csv.gz, the transformer is measured as well: it recalls all
hidden layers of the real texts in a process that has not loaded the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from skspin._digest import array_digest
from skspin._layout import Segment
from skspin._store import open_store

TEXTS = [f"a text that is about as long as a sentence of a film review, {i}" for i in range(9613)]
SEGMENTS = [Segment(None, layer, "hidden", "mean", 384) for layer in range(7)]
ORDER = np.random.default_rng(1).permutation(len(TEXTS))
BATCH = 64  # rows that come from the model at a time
CHUNK = 2048  # rows that the transformer asks for at a time


def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((len(TEXTS), 7 * 384), dtype=np.float32)


def fill(store, values):
    for start in range(0, len(TEXTS), BATCH):
        batch = slice(start, start + BATCH)
        store.write("benchmark", TEXTS[batch], SEGMENTS, values[batch])


def read(cache):
    store = open_store(cache)
    texts = [TEXTS[i] for i in ORDER]
    out = np.empty((len(texts), 7 * 384), np.float32)
    for start in range(0, len(texts), CHUNK):
        chunk = slice(start, start + CHUNK)
        assert store.read("benchmark", texts[chunk], SEGMENTS, out[chunk]).all()
    return out


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def measure_numpy(folder):
    return {"numpy": seconds(lambda: np.load(folder / "rows.npy")[ORDER])}


def measure_disk(folder):
    # The first reading finds everything on disk, the second brings it to memory as well.
    first, second, third = (seconds(read, folder) for _ in range(3))
    return {"disk": first, "disk, again": second, "memory in front": third}


def real_texts(data):
    import pandas as pd

    texts = pd.read_csv(data / "sst2.csv.gz").text.tolist()
    return [texts[i] for i in np.random.default_rng(1).permutation(len(texts))]


def transformer(folder):
    from skspin import LLMActivationTransformer
    from skspin.datasets import demo_model

    return LLMActivationTransformer(demo_model(), dtype="float32", cache=folder)


def fill_as_transformer(folder, data):
    """Keep made-up rows for the real texts, under the names that the transformer asks for."""
    texts = sorted(real_texts(data))
    fitted = transformer(folder).fit(texts[:1])
    values = np.random.default_rng(0).standard_normal((len(texts), 7 * 384), dtype=np.float32)
    context, segments = fitted._context("float32"), fitted.layout_.segments
    for start in range(0, len(texts), BATCH):
        batch = slice(start, start + BATCH)
        open_store(folder).write(context, texts[batch], segments, values[batch])
    np.save(folder / "real.npy", values)


def measure_transformer(folder, data):
    import skspin._extraction.device
    import skspin._extraction.fingerprint  # noqa: F401

    texts = real_texts(data)
    fitted = transformer(folder / "real")
    times = {"transformer, fit": seconds(fitted.fit, texts)}
    for name in ("transform", "transform again", "transform, memory in front"):
        times[f"transformer, {name}"] = seconds(fitted.transform, texts)
    assert not {"torch", "transformers"} & set(sys.modules)
    return times


def measure_real_numpy(folder, data):
    order = np.random.default_rng(1).permutation(len(real_texts(data)))
    return {"numpy, real texts": seconds(lambda: np.load(folder / "real" / "real.npy")[order])}


def measure_writing(folder):
    values = rows()
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        on_disk = seconds(fill, open_store(fresh), values)
    in_memory = seconds(fill, open_store("memory"), values)
    reading = seconds(read, "memory")
    taken = open_store("memory").info().n_bytes
    return {
        "write to disk": on_disk,
        "write to memory": in_memory,
        "read from memory": reading,
        "memory counted": taken / values.nbytes,
    }


def measure_digests(folder):
    values = np.ones((65_536, 3_840), np.float32)  # 1 GB
    part = values[:, 384:1536]
    np.save(folder / "large.npy", values)
    mapped = np.load(folder / "large.npy", mmap_mode="r")
    arrays = {"C": values, "F": values.T, "columns": part, "every second": values[::2, ::2]}
    arrays["memory map"] = mapped
    return {f"digest, {name}": seconds(array_digest, array) for name, array in arrays.items()} | {
        f"bytes, {name}": array.nbytes for name, array in arrays.items()
    }


MEASURES = {
    "numpy": measure_numpy,
    "disk": measure_disk,
    "writing": measure_writing,
    "digests": measure_digests,
}
REAL_MEASURES = {"real numpy": measure_real_numpy, "transformer": measure_transformer}


def in_new_process(name, folder, data=None):
    command = [sys.executable, __file__, "--measure", name, "--folder", folder]
    command += [] if data is None else ["--data", data]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--data", type=Path, help="folder of sst2.csv.gz")
    parser.add_argument(
        "--measure", choices=[*MEASURES, *REAL_MEASURES], help="do this alone, once"
    )
    options = parser.parse_args()
    if options.measure in REAL_MEASURES:
        print(json.dumps(REAL_MEASURES[options.measure](options.folder, options.data)))
        return
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        values = rows()
        fill(open_store(folder), values)
        np.save(folder / "rows.npy", values)
        np.testing.assert_array_equal(read(folder), values[ORDER])
        runs = [
            {
                name: seconds
                for measure in ("numpy", "disk", "writing")
                for name, seconds in in_new_process(measure, folder).items()
            }
            for _ in range(options.repeats)
        ]
        digests = in_new_process("digests", folder)
        if options.data:
            fill_as_transformer(folder / "real", options.data)
            real_runs = [
                in_new_process("real numpy", folder, options.data)
                | in_new_process("transformer", folder, options.data)
                for _ in range(options.repeats)
            ]
    print(f"{values.nbytes / 1e6:.0f} MB, median of {options.repeats}, and beside numpy by turns")
    for name in runs[0]:
        figures = [run[name] for run in runs]
        ratio = median(run[name] / run["numpy"] for run in runs)
        rate = values.nbytes / 1e6 / median(figures)
        if name == "memory counted":
            print(f"{name:18} {median(figures):8.3f} of the rows' bytes")
        else:
            print(f"{name:18} {median(figures) * 1e3:8.1f} ms {rate:8.0f} MB/s {ratio:6.2f}")
    for name in real_runs[0] if options.data else ():
        ratio = median(run[name] / run["numpy, real texts"] for run in real_runs)
        print(f"{name:38} {median(run[name] for run in real_runs) * 1e3:8.1f} ms {ratio:6.2f}")
    for name in ("C", "F", "columns", "every second", "memory map"):
        rate = digests[f"bytes, {name}"] / digests[f"digest, {name}"] / 1e9
        print(f"digest, {name:12} {rate:6.1f} GB/s")


if __name__ == "__main__":
    main()
