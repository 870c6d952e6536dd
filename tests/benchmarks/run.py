"""Run the benchmarks, and write the tables that the documentation shows.

    python tests/benchmarks/run.py --data FOLDER [--only NAME ...] [--quick]

Each benchmark runs in processes of its own and leaves a file of rows in ``build/benchmarks``; the
tables in ``docs/benchmarks`` are written from these files. A NAME is that of a benchmark, or
``benchmark:part``, so that a long one can be run in parts. Speeds are worth quoting only if nothing
else runs on the machine meanwhile. FOLDER holds NAME.csv.gz with the columns text, label and split.

``--quick`` tries everything on little data, and leaves its tables beside its rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tables import as_page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FROZEN = ["--methods", "tfidf", "last", "all", "sentences", "spin"]


@dataclass(frozen=True)
class Benchmark:
    """A script, and how it is called.

    ``parts`` are the arguments of the processes that it is run as. ``columns`` are the table's:
    its titles and, in the language of ``str.format``, what a row puts there; with none, the table
    shows the rows as they are. ``quick`` are the arguments that make it short. ``overview`` is a
    smaller table that comes first, as `tables.as_page` describes it. ``script`` is named where
    several benchmarks share one.
    """

    columns: dict[str, str]
    parts: dict[str, list[str]] = field(default_factory=lambda: {"all": []})
    quick: list[str] = field(default_factory=lambda: ["--quick"])
    data: bool = True
    overview: tuple[str, str, str, str] | None = None
    script: str = ""


ACCURACY = {
    "data set": "{set}",
    "method": "{method}",
    "columns": "{columns:,}",
    "validation": "{validation:.3f}",
    "test": "{test:.3f}",
    "chosen": "{chosen}",
}
BY_SET = "Accuracy on test texts", "method", "set", "{test:.3f}"

BENCHMARKS = {
    "accuracy": Benchmark(
        ACCURACY,
        {
            # What takes an hour is a part of its own.
            "sst2": ["--sets", "sst2", *FROZEN],
            "sst2-recipe": ["--sets", "sst2", "--methods", "paper"],
            "sst2-fine-tuning": ["--sets", "sst2", "--methods", "fine-tuning"],
            "trec6": ["--sets", "trec6", *FROZEN],
            "trec6-recipe": ["--sets", "trec6", "--methods", "paper"],
            "trec6-fine-tuning": ["--sets", "trec6", "--methods", "fine-tuning"],
            "banking77": ["--sets", "banking77", *FROZEN],
            "banking77-fine-tuning": ["--sets", "banking77", "--methods", "fine-tuning"],
            "imdb_5k": ["--sets", "imdb_5k", *FROZEN],
            "imdb_5k-recipe": ["--sets", "imdb_5k", "--methods", "paper"],
        },
        overview=BY_SET,
    ),
    "decoder": Benchmark(
        ACCURACY,
        {
            name: ["--sets", name, "--methods", "llm", "--texts", "3000"]
            for name in ("sst2", "trec6")
        },
        overview=BY_SET,
        script="accuracy",
    ),
    "long_texts": Benchmark(
        {title: cell for title, cell in ACCURACY.items() if title != "data set"},
        {"imdb_5k": ["--sets", "imdb_5k", "--methods", "long"]},
        script="accuracy",
    ),
    "number_format": Benchmark(
        {
            "data set": "{set}",
            "texts": "{texts:,}",
            "format": "{format}",
            "in float32": "{float32:.4f}",
            "in the format": "{other:.4f}",
            "points": "{points:+.2f}",
            "only float32 is right": "{only float32}",
            "only the format is right": "{only other}",
            "cosine, least layer": "{cosine:.5f}",
        },
        {
            **{name: ["--sets", name] for name in ("sst2", "trec6", "imdb_5k")},
            **{f"{name}-int8": ["--sets", name, "--format", "int8"] for name in ("sst2", "trec6")},
        },
    ),
    "fit_time": Benchmark(
        {
            "data set": "{set}",
            "texts": "{texts:,}",
            "method": "{method}",
            "seconds": "{seconds:.1f}",
            "times SPIN's": "{beside_spin:.2g}",
        },
    ),
    "extraction": Benchmark(
        {
            "what": "{what}",
            "data set": "{data}",
            "beside": "{reference}",
            "median": "{median}",
            "rounds": "{spread}",
            "goal": "{goal}",
            "reached": "{reached}",
        },
        {name: ["--sets", name] for name in ("sst2", "imdb_5k", "llm")},
    ),
    "memory": Benchmark(
        {
            "texts": "{texts:,}",
            "array, MB": "{array_mb:.0f}",
            "growth beyond it, MB": "{grown_mb:.0f}",
            "allowed, MB": "{allowed_mb}",
        },
    ),
    "grid_search": Benchmark(
        {
            "what": "{what}",
            "texts": "{texts:,}",
            "search, s": "{search, s:.1f}",
            "the heads' fits, s": "{heads, s:.1f}",
            "beside": "{beside}",
            "its seconds": "{beside, s:.1f}",
            "measured": "{value:.2f}",
            "goal": "{goal}",
        },
    ),
    "probes": Benchmark(
        {
            "workload": "{workload}",
            "solver": "{solver}",
            "seconds": "{seconds:.2f}",
            "times skspin's": "{ratio:.1f}",
            "excess": "{excess:.1e}",
            "solved": "{n_solved} of {n_problems}",
        },
        quick=["--repeats", "1", "--limit", "5"],
    ),
    "store": Benchmark(
        {
            "what": "{what}",
            "ms": "{milliseconds:.3g}",
            "MB/s": "{mb_per_second:,.0f}",
            "times numpy's": "{beside_numpy:.2f}",
            "times the rows' bytes": "{of_the_rows:.3f}",
            "times an extraction without a store": "{beside_none:.3f}",
        },
    ),
    "prune": Benchmark(
        {
            "layers": "{layers in use} of {layers}",
            "columns": "{columns:,} of {columns before:,}",
            "whole, s": "{whole, s:.2f}",
            "pruned, s": "{pruned, s:.2f}",
            "ratio": "{ratio:.2f}",
            "rounds": "{least:.2f} .. {most:.2f}",
            "allowed": "{allowed:.2f}",
            "labels that differ": "{labels differ}",
        },
        quick=["--repeats", "1", "--layers", "2", "--train", "300", "--texts", "200"],
    ),
    "serving": Benchmark(
        {
            "what": "{what}",
            "layers": "{layers}",
            "p50, ms": "{p50, ms:.1f}",
            "p99, ms": "{p99, ms:.1f}",
            "32 texts, ms": "{batch, ms:.0f}",
            "accuracy": "{accuracy:.3f}",
            "goal": "{goal}",
            "reached": "{reached}",
            "note": "{note}",
        },
    ),
    "prefixes": Benchmark(
        {
            "model": "{model}",
            "what": "{what}",
            "ms": "{milliseconds:,.0f}",
            "beside": "{reference}",
            "ratio": "{median:.2f}",
            "rounds": "{spread}",
            "goal": "{goal}",
            "reached": "{reached}",
        },
        data=False,
    ),
    "import_time": Benchmark(
        {
            "what": "{what}",
            "beside": "{reference}",
            "its seconds": "{reference_seconds:.2f}",
            "seconds more": "{more:+.3f}",
            "rounds": "{least:+.3f} .. {most:+.3f}",
            "allowed": "{allowed:+.3f}",
        },
        data=False,
    ),
}


def run(name, part, options):
    """Run one process; return whether it ended well."""
    benchmark = BENCHMARKS[name]
    command = [sys.executable, str(HERE / f"{benchmark.script or name}.py"), *benchmark.parts[part]]
    command += ["--json", str(options.results / f"{name}-{part}.json")]
    if benchmark.data:
        command += ["--data", str(options.data)]
    if options.quick:
        command += benchmark.quick
    print(f"\n== {name}:{part}", flush=True)
    started = time.perf_counter()
    code = subprocess.run(command).returncode
    print(f"== {'done' if code == 0 else 'FAILED'} in {time.perf_counter() - started:.0f} s")
    return code == 0


def write_page(name, results, pages):
    """Write one benchmark's table from what its parts left behind, in the parts' order."""
    files = [results / f"{name}-{part}.json" for part in BENCHMARKS[name].parts]
    records = [json.loads(file.read_text()) for file in files if file.exists()]
    records = [record for record in records if {"machine", "rows"} <= record.keys()]
    if records:
        pages.mkdir(parents=True, exist_ok=True)
        page = as_page(name, records, BENCHMARKS[name].columns, BENCHMARKS[name].overview)
        (pages / f"{name}.rst").write_text(page)
    else:
        print(f"{name} left no rows and machine, so there is no table of it")


def chosen(names):
    """Resolve names to benchmarks and parts."""
    every = [(name, part) for name in BENCHMARKS for part in BENCHMARKS[name].parts]
    for wanted in names or BENCHMARKS:
        found = [(n, p) for n, p in every if wanted in (n, f"{n}:{p}")]
        if not found:
            known = ", ".join(BENCHMARKS)
            raise SystemExit(f"--only {wanted}: there is no such benchmark. There are: {known}.")
        yield from found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="little data; no page is written")
    parser.add_argument("--results", type=Path, help="where rows go")
    parser.add_argument("--pages", type=Path, help="where tables go")
    options = parser.parse_args()
    if options.results is None:
        options.results = ROOT / "build" / ("benchmarks-quick" if options.quick else "benchmarks")
    pages = options.pages or (options.results if options.quick else ROOT / "docs/benchmarks")
    options.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, part in chosen(options.only):
        if run(name, part, options):
            write_page(name, options.results, pages)
        else:
            failed.append(f"{name}:{part}")
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
