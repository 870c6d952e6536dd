"""Time and accuracy of a fitted pipeline in every form that it can be served in, beside peers.

    python tests/benchmarks/serving.py --data FOLDER [--layers 4] [--rounds 3] [--texts 400]
        [--quick] [--json FILE]

FOLDER holds sst2.csv.gz with the columns text, label and split. One pipeline with its defaults,
fitted in float32 on the first layers, is served as it is, pruned, by ``to_torch`` and by
``export_onnx`` in float32 and int8. Its peers embed texts by the whole model's last layer, with a
logistic regression behind: sentence-transformers with each of its backends, and the bare model's
own graph in ONNX Runtime and OpenVINO. A side has as many threads as PyTorch takes. In each round
every side serves test texts one by one (p50 and p99 over all rounds) and then in batches of 32, in
an order that changes; each alone, as a service is. Accuracy is that of all test texts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from bare_onnx import embedder, run_with_onnxruntime, run_with_openvino, session, write_graphs
from record import write_record
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from splits import load_splits
from transformers import AutoTokenizer

from skspin import export_onnx, make_spin_pipeline, prune, to_torch
from skspin._serving.onnx_classifier import Classifier
from skspin.datasets import demo_model

BATCH = 32
MAX_LENGTH = 256  # tokens, as the model's own settings say
N_BLOCKS = 6
FLOAT32, INT8 = "export_onnx, float32", "export_onnx, int8"
OWN = ("pipeline", "pruned", "to_torch", FLOAT32, INT8)
POINTS = 0.005  # of accuracy that int8 may lose


@dataclass
class Side:
    """One way to serve: a function from texts to labels, and what was measured of it."""

    what: str
    layers: int
    predict: Callable[[list[str]], np.ndarray] | None  # None where a package is not installed
    single: bool = True  # float32
    note: str = ""
    accuracy: float = np.nan
    alone: list[float] = field(default_factory=list)  # seconds, by text
    batches: list[float] = field(default_factory=list)  # seconds, by batch


# The pipeline's forms


def own_sides(splits, layers, folder, n_threads):
    spin = make_spin_pipeline(demo_model(), dtype="float32", max_length=MAX_LENGTH)
    spin.set_params(select__max_layer=layers, activations__cache=None)
    spin.fit(splits.texts, splits.y)
    pruned = prune(spin)
    deepest = max(segment.layer for segment in pruned["activations"].layout_.segments)
    report = export_onnx(spin, folder / "spin", texts=splits.test, quantize="int8")
    print(f"int8 changes {report.n_changed} of {report.n_texts} labels", file=sys.stderr)
    yield Side("pipeline", N_BLOCKS, spin.predict)
    yield Side("pruned", deepest, pruned.predict)
    yield Side("to_torch", deepest, torch_predict(spin))
    for what, file in ((FLOAT32, "model.onnx"), (INT8, "model.int8.onnx")):
        classifier = Classifier(report.folder, file)
        classifier.session = session(report.folder / file, n_threads)
        yield Side(what, deepest, classifier.predict, single=what == FLOAT32)


def torch_predict(spin):
    module, tokenizer = to_torch(spin), AutoTokenizer.from_pretrained(demo_model())

    def predict(texts):
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        with torch.inference_mode():
            return spin.classes_[(module(**inputs) > 0).long().numpy()]

    return predict


# Peers


def peers(splits, folder, n_threads):
    graphs = write_graphs(folder)
    embed = embedder(run_with_onnxruntime(graphs["float32"], n_threads), MAX_LENGTH)
    grid = {"logisticregression__C": np.logspace(-3, 1, 9)}
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    head = GridSearchCV(classifier, grid, cv=splits.folds)
    head.fit(np.concatenate([embed(part) for part in batches_of(splits.texts)]), splits.y)

    def side(name, number_format, make, *args):
        what, single = f"{name}, {number_format}", number_format == "float32"
        try:
            embed = make(*args)
        except ImportError as error:
            return Side(what, N_BLOCKS, None, single, f"not installed: {error.name}")
        except Exception as error:  # of other versions than these packages know
            return Side(what, N_BLOCKS, None, single, f"fails: {str(error).splitlines()[0][:60]}")
        return Side(what, N_BLOCKS, lambda texts: head.predict(embed(texts)), single)

    name = "sentence-transformers, {}".format
    yield side(name("torch"), "float32", sentence_transformers, "torch")
    for form, graph in graphs.items():
        yield side(name("ONNX"), form, sentence_transformers, "onnx", graph)
    yield side(name("OpenVINO"), "float32", sentence_transformers, "openvino")
    for name, run in (("ONNX Runtime", run_with_onnxruntime), ("OpenVINO", run_with_openvino)):
        for form, graph in graphs.items():
            made = f"bare model, {name}", form, bare_model, run, graph, n_threads
            yield side(*made)


def bare_model(run, graph, n_threads):
    return embedder(run(graph, n_threads), MAX_LENGTH)


def sentence_transformers(backend, graph=None):
    """Make one backend's embedder. Its ONNX backend gets the bare model's graph to run."""
    from sentence_transformers import SentenceTransformer

    path, settings = demo_model(), {}
    if backend == "onnx":
        import_module("optimum.onnxruntime")
        path = graph.parent / "sentences"
        (path / "onnx").mkdir(parents=True, exist_ok=True)
        for file in demo_model().iterdir():
            if not (path / file.name).exists():
                (path / file.name).symlink_to(file)
        shutil.copy(graph, path / "onnx")
        settings = {"subfolder": "onnx", "file_name": graph.name, "export": False}
        settings["provider"] = "CPUExecutionProvider"
    elif backend == "openvino":
        import_module("optimum.intel")
        settings = {"export": True}
    sentences = SentenceTransformer(
        str(path), device="cpu", backend=backend, model_kwargs=settings, local_files_only=True
    )
    sentences.max_seq_length = MAX_LENGTH
    return lambda texts: sentences.encode(texts, show_progress_bar=False)


# Measuring


def batches_of(texts, size=BATCH):
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def measure(sides, splits, n_texts, n_rounds):
    running = [side for side in sides if side.predict]
    for side in running:
        predicted = np.concatenate([side.predict(part) for part in batches_of(splits.test)])
        side.accuracy = float((predicted == splits.y_test).mean())
    texts = np.random.RandomState(0).permutation(splits.test)[:n_texts].tolist()
    for turn in range(n_rounds):
        at = turn % len(running)
        for side in running[at:] + running[:at]:
            side.predict(texts[:BATCH])  # what ran before has left the caches
            side.alone += [seconds(side, [text]) for text in texts]
            side.batches += [
                seconds(side, part) for part in batches_of(texts) if len(part) == BATCH
            ]
        print(f"  round {turn + 1} of {n_rounds}", file=sys.stderr)


def seconds(side, texts):
    started = time.perf_counter()
    side.predict(texts)
    return time.perf_counter() - started


def as_rows(sides):
    """Turn sides into rows, with what ONNX is to reach: a peer's time, by layers; its accuracy."""
    own = {side.what: side for side in sides}
    times = {side.what: (np.median(side.alone), np.median(side.batches)) for side in running(sides)}
    others = [side for side in running(sides) if side.single and side.what not in OWN]
    for side in sides:
        row = {"what": side.what, "layers": f"{side.layers} of {N_BLOCKS}", "note": side.note}
        if side.predict:
            row |= {
                "accuracy": side.accuracy,
                "p50, ms": 1e3 * times[side.what][0],
                "p99, ms": 1e3 * float(np.quantile(side.alone, 0.99)),
                "batch, ms": 1e3 * times[side.what][1],
            }
        if side.what == FLOAT32 and others:
            share = side.layers / N_BLOCKS
            most = [share * min(times[peer.what][i] for peer in others) for i in (0, 1)]
            row["goal"] = f"at most {1e3 * most[0]:.1f} and {1e3 * most[1]:.0f} ms"
            row["reached"] = all(a <= b for a, b in zip(times[side.what], most, strict=True))
        if side.what == INT8:
            least = own[FLOAT32].accuracy - POINTS
            row["goal"], row["reached"] = f"accuracy {least:.3f}", side.accuracy >= least
        if "reached" in row:
            row["reached"] = "yes" if row["reached"] else "NO"
        yield row


def running(sides):
    return [side for side in sides if side.predict]


def print_table(rows):
    line = "{what:<40}{layers:>8}{p50:>9}{p99:>9}{batch:>9}{accuracy:>10}  {goal} {reached}{note}"
    print(line.format(
        what="", layers="layers", p50="p50, ms", p99="p99, ms", batch="32, ms", accuracy="accuracy",
        goal="goal", reached="", note="",
    ))  # fmt: skip
    for row in rows:
        shown = {"goal": "", "reached": "", "p50": "", "p99": "", "batch": "", "accuracy": ""} | row
        if "accuracy" in row:
            shown |= {key: f"{row[f'{key}, ms']:.1f}" for key in ("p50", "p99", "batch")}
            shown["accuracy"] = f"{row['accuracy']:.3f}"
        print(line.format(**shown))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4, help="layers to select from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=400, help="texts to time, one by one")
    parser.add_argument("--quick", action="store_true", help="few texts, one round")
    parser.add_argument("--json", type=Path, help="where to write rows and machine")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.texts = 1, 40
    splits = load_splits(options.data, "sst2", 200 if options.quick else None)
    n_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        sides = [*own_sides(splits, options.layers, Path(folder), n_threads)]
        sides += peers(splits, Path(folder), n_threads)
        measure(sides, splits, options.texts, options.rounds)
    rows = list(as_rows(sides))
    print_table(rows)
    if options.json:
        write_record(options.json, rows)


if __name__ == "__main__":
    main()
