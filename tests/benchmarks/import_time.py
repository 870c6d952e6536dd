"""Time of ``import skspin`` beside ``import sklearn.linear_model``, in fresh processes by turns.

    python tests/benchmarks/import_time.py [--rounds 21] [--quick] [--json FILE]

Processor time rather than the clock's, which other programs on the machine lengthen. A first round
is not counted: it compiles both sides' modules and brings files to the system's cache.
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

MODULES = ("sklearn.linear_model", "skspin")
ALLOWED = 0.1  # seconds more


def seconds(module, compiled):
    """Import a module in a fresh process; the interpreter's own start is not part of the time."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
    code = f"import time; s = time.process_time(); import {module}; print(time.process_time() - s)"
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env=environment
    )
    return float(printed.stdout)


def measure(n_rounds):
    """Import both in every round, each first in every other one; drop round 0."""
    rounds = []
    with tempfile.TemporaryDirectory() as compiled:
        for turn in range(n_rounds + 1):
            order = MODULES if turn % 2 else MODULES[::-1]
            rounds.append({module: seconds(module, compiled) for module in order})
    reference, ours = ([one[module] for one in rounds[1:]] for module in MODULES)
    more = [b - a for a, b in zip(reference, ours, strict=True)]
    return {
        "what": "import skspin",
        "reference": "import sklearn.linear_model",
        "seconds": median(ours),
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
        f"{row['what']}: {row['seconds']:.3f} s, {row['more']:+.3f} s ({row['least']:+.3f} to "
        f"{row['most']:+.3f}) beside {row['reference']}, {row['reference_seconds']:.3f} s; "
        f"allowed {row['allowed']:+.3f} s"
    )
    if options.json:
        write_record(options.json, [row])


if __name__ == "__main__":
    main()
