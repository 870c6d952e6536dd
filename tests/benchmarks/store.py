"""The store beside plain NumPy: reading 9,613 texts x 7 layers x 384 neurons in a random order.

Every reading is done in a process of its own, by turns, after imports::

    python tests/benchmarks/store.py [--data FOLDER] [--repeats 7] [--quick] [--json FILE]

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
from record import write_record

from skspin._layout import Layout, Segment
from skspin._store import open_store

TEXTS = [f"a text that is about as long as a sentence of a film review, {i}" for i in range(9613)]
LAYOUT = Layout(tuple(Segment(None, layer, "hidden", "mean", 384) for layer in range(7)))
ORDER = np.random.default_rng(1).permutation(len(TEXTS))
BATCH = 64  # rows that come from the model at a time
N_SINGLE = 2000  # texts that come one by one
N_EXTRACTED, N_TURNS = 500, 6  # texts that a model reads, with and without a store
WIDE = {"site": "mlp", "pooling": ("mean", "max")}


def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((len(TEXTS), 7 * 384), dtype=np.float32)


def fill(store, values, texts=TEXTS, layout=LAYOUT, key="benchmark", dtype="float32"):
    out = np.ones(values.shape, np.float32)  # the system has found its memory before
    start = time.perf_counter()
    for missing in store.look_up(key, texts, layout, out, dtype=dtype):
        for first in range(0, len(texts), BATCH):
            batch = np.arange(first, min(first + BATCH, len(texts)))
            missing.add(batch, values[batch])
    return time.perf_counter() - start


def fill_one_by_one(store, values):
    out = np.empty((1, LAYOUT.n_columns), np.float32)
    for text, row in zip(TEXTS[:N_SINGLE], values, strict=False):
        for missing in store.look_up("one by one", [text], LAYOUT, out):
            missing.add(np.array([0]), row[None])


def read(cache):
    texts = [TEXTS[i] for i in ORDER]
    out = np.empty((len(texts), LAYOUT.n_columns), np.float32)
    assert not list(open_store(cache).look_up("benchmark", texts, LAYOUT, out))
    return out


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def measure_numpy(folder):
    return {"numpy": seconds(lambda: np.load(folder / "rows.npy")[ORDER])}


def measure_disk(folder):
    # The first reading also opens the files.
    first, second = (seconds(read, folder) for _ in range(2))
    return {"disk": first, "disk, again": second}


def real_texts(data):
    import pandas as pd

    texts = pd.read_csv(data / "sst2.csv.gz").text.drop_duplicates().tolist()
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
    fill(
        open_store(folder),
        values,
        texts,
        fitted.layout_,
        fitted._fitted_recipe(conversations=False).key,
    )
    np.save(folder / "real.npy", values)


def measure_transformer(folder, data):
    import skspin._model.fingerprint  # noqa: F401

    texts = real_texts(data)
    fitted = transformer(folder / "real")
    times = {"transformer, fit": seconds(fitted.fit, texts)}
    for name in ("transform", "transform again"):
        times[f"transformer, {name}"] = seconds(fitted.transform, texts)
    assert not {"torch", "transformers"} & set(sys.modules)
    return times


def measure_real_numpy(folder, data):
    order = np.random.default_rng(1).permutation(len(real_texts(data)))
    return {"numpy, real texts": seconds(lambda: np.load(folder / "real" / "real.npy")[order])}


def measure_writing(folder):
    values, memory = rows(), open_store("memory")
    figures = {}
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        figures["write to disk"] = fill(open_store(fresh), values)
        bytes_before = open_store(fresh).info().n_bytes
        figures["write to disk, float16"] = fill(open_store(fresh), values, dtype="float16")
        half = open_store(fresh).info().n_bytes - bytes_before
        figures["disk counted"] = bytes_before / values.nbytes
        figures["disk counted, float16"] = half / values.nbytes
        one_by_one = seconds(fill_one_by_one, open_store(fresh), values)
        figures["one by one to disk"] = one_by_one / N_SINGLE
    figures["write to memory"] = fill(memory, values)
    figures["read from memory"] = seconds(read, "memory")
    figures["memory counted"] = memory.info().n_bytes / values.nbytes
    figures["one by one to memory"] = seconds(fill_one_by_one, memory, values) / N_SINGLE
    return figures


def measure_storing(folder, data):
    """Measure what storing adds to an extraction, by turns: seconds of the one, and a ratio."""
    texts, took = real_texts(data)[:N_EXTRACTED], {}
    sides = [None, "float32", "float16"]
    for turn in range(N_TURNS + 1):
        # Each is first, second and third equally often: what runs before a side changes its time.
        for dtype in sides[turn % 3 :] + sides[: turn % 3]:
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                fitted = transformer(None if dtype is None else fresh)
                fitted.set_params(store_dtype=dtype or "float32", **WIDE).fit(texts)
                time_taken = seconds(fitted.transform, texts)
                if turn:  # the first one loads the model
                    took.setdefault(dtype, []).append(time_taken)
    return {
        f"extraction, stored in {dtype}": median(np.divide(took[dtype], took[None]))
        for dtype in ("float32", "float16")
    }


def touch_memory():
    """Have the system find memory once: a virtual machine may take longer for that than to copy."""
    np.ones(2**26)  # 512 MB


MEASURES = {
    "numpy": measure_numpy,
    "disk": measure_disk,
    "writing": measure_writing,
}
REAL_MEASURES = {
    "real numpy": measure_real_numpy,
    "transformer": measure_transformer,
    "storing": measure_storing,
}


def in_new_process(name, folder, data=None):
    command = [sys.executable, __file__, "--measure", name, "--folder", folder]
    command += [] if data is None else ["--data", data]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def compare(runs, n_bytes):
    """Sum up what took how long beside numpy in the same round, and what memory was counted."""
    for name in runs[0]:
        figures = [run[name] for run in runs]
        row = {"what": name}
        if "counted" in name:
            yield row | {"of_the_rows": median(figures)}
        elif name.startswith("one by one"):
            yield row | {"milliseconds": median(figures) * 1e3}
        else:
            ratio = median(run[name] / run["numpy"] for run in runs)
            yield row | {
                "milliseconds": median(figures) * 1e3,
                "mb_per_second": n_bytes / 1e6 / median(figures),
                "beside_numpy": ratio,
            }


def compare_real(runs):
    """Sum up the same of the transformer."""
    for name in runs[0] if runs else ():
        ratio = median(run[name] / run["numpy, real texts"] for run in runs)
        took = median(run[name] for run in runs)
        yield {"what": name, "milliseconds": took * 1e3, "beside_numpy": ratio}


def as_line(row):
    if "beside_none" in row:
        return f"{row['what']:38} {row['beside_none']:.3f} of the time without a store"
    if "of_the_rows" in row:
        return f"{row['what']:38} {row['of_the_rows']:.3f} of the rows' bytes"
    took = f"{row['milliseconds']:.2f} ms" if "milliseconds" in row else ""
    rate = f"{row['mb_per_second']:.0f} MB/s" if "mb_per_second" in row else ""
    ratio = f"{row['beside_numpy']:.2f}" if "beside_numpy" in row else ""
    return f"{row['what']:38} {took:>12} {rate:>12} {ratio:>7}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--data", type=Path, help="folder of sst2.csv.gz")
    parser.add_argument("--json", type=Path, help="where to write rows and machine")
    parser.add_argument(
        "--measure", choices=[*MEASURES, *REAL_MEASURES], help="do this alone, once"
    )
    options = parser.parse_args()
    if options.measure:
        touch_memory()
    if options.measure in REAL_MEASURES:
        print(json.dumps(REAL_MEASURES[options.measure](options.folder, options.data)))
        return
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.folder)))
        return
    repeats = options.repeats or (2 if options.quick else 7)
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
            for _ in range(repeats)
        ]
        real_runs, storing = [], []
        if options.data:
            fill_as_transformer(folder / "real", options.data)
            real_runs = [
                in_new_process("real numpy", folder, options.data)
                | in_new_process("transformer", folder, options.data)
                for _ in range(repeats)
            ]
            shares = in_new_process("storing", folder, options.data)
            storing = [{"what": name, "beside_none": ratio} for name, ratio in shares.items()]
    print(f"{values.nbytes / 1e6:.0f} MB, median of {repeats}, and beside numpy by turns")
    table = [*compare(runs, values.nbytes), *compare_real(real_runs), *storing]
    print("\n".join(map(as_line, table)))
    if options.json:
        write_record(options.json, table)


if __name__ == "__main__":
    main()
