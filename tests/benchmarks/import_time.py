"""Time that ``import skspin`` takes beyond ``import sklearn.linear_model``, in fresh processes.

    python tests/benchmarks/import_time.py [--rounds 21] [--quick] [--json FILE]

skspin imports ``sklearn.linear_model`` itself, so each process imports that first and skspin then:
what the second import takes is what it takes more. Two processes by turns would differ by more than
that from one turn to the next. Processor time rather than the clock's, which other programs on the
machine lengthen. A first round is not counted: it compiles modules and brings files to the cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from record import write_record

ALLOWED = 0.1  # seconds more
IMPORTS = """
from time import process_time
start = process_time()
import sklearn.linear_model
between = process_time()
import skspin
print(between - start, process_time() - between)
"""


def seconds(compiled):
    """Import in a fresh process; the interpreter's own start is not part of the times."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
    printed = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, env=environment
    )
    return [float(part) for part in printed.stdout.split()]


def measure(n_rounds):
    with tempfile.TemporaryDirectory() as compiled:
        rounds = [seconds(compiled) for _ in range(n_rounds + 1)][1:]
    reference, more = zip(*rounds, strict=True)
    return {
        "what": "import skspin",
        "reference": "import sklearn.linear_model",
        "reference_seconds": median(reference),
        "more": median(more),
        "least": min(more),
        "most": max(more),
        "allowed": ALLOWED,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", type=Path, help="where to write the row and the machine")
    options = parser.parse_args()
    row = measure(options.rounds or (5 if options.quick else 21))
    print(
        f"{row['reference']}: {row['reference_seconds']:.3f} s; {row['what']}: "
        f"{row['more']:+.3f} s ({row['least']:+.3f} to {row['most']:+.3f}), "
        f"allowed {row['allowed']:+.3f} s"
    )
    if options.json:
        write_record(options.json, [row])


if __name__ == "__main__":
    main()
