"""How much a process grows while it extracts many texts, beyond the array that it returns.

    python tests/benchmarks/memory.py --data FOLDER [--texts 25000] [--quick] [--json FILE]

FOLDER holds sst2.csv.gz with a column text. The extraction runs in a process of its own, where
nothing else has had its peak before; the model is loaded already.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
from record import write_record

from skspin import LLMActivationTransformer
from skspin.datasets import demo_model

ALLOWED = 500  # MB
MEGABYTE = 2**20


def peak_bytes():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def grow(folder, n_texts):
    """Extract, and print growth and the array's size in MB."""
    source = pd.read_csv(folder / "sst2.csv.gz").text.tolist()
    texts = [f"{source[i % len(source)]} {i}" for i in range(n_texts)]
    transformer = LLMActivationTransformer(demo_model(), dtype="float32", cache=None).fit(texts)
    transformer.transform(texts[:1])
    before = peak_bytes()
    output = transformer.transform(texts)
    print((peak_bytes() - before - output.nbytes) / MEGABYTE, output.nbytes / MEGABYTE)


def measure(folder, n_texts):
    command = [sys.executable, __file__, "--data", str(folder), "--texts", str(n_texts), "--grow"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    grown, returned = map(float, printed.split()[-2:])
    return {"texts": n_texts, "array_mb": returned, "grown_mb": grown, "allowed_mb": ALLOWED}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--quick", action="store_true", help="few texts")
    parser.add_argument("--json", type=Path, help="where to write the row and the machine")
    parser.add_argument("--grow", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    n_texts = options.texts or (2_500 if options.quick else 25_000)
    if options.grow:
        grow(options.data, n_texts)
        return
    row = measure(options.data, n_texts)
    print(
        f"{row['texts']:,} texts: grew by {row['grown_mb']:.0f} MB beyond the array of "
        f"{row['array_mb']:.0f} MB; allowed {row['allowed_mb']} MB"
    )
    if options.json:
        write_record(options.json, [row])


if __name__ == "__main__":
    main()
