"""Speed of extraction, beside what people would use instead.

    python tests/benchmarks/extraction.py --data FOLDER [--quick] [--json FILE]

FOLDER holds sst2.csv.gz and imdb_5k.csv.gz with a column text. Every figure is a ratio of two times
that were taken in turns in this run, so that a machine's other work disturbs both sides alike; the
table shows the median of the rounds, and the least and the most. The other sides are
sentence-transformers where it is installed and the bare model in ONNX Runtime (which both give the
last layer only), the plain ``output_hidden_states`` loop in batches of 32 texts as they come, and
the model's bare forward pass over the same tokens, tokenized, sorted and padded beforehand, in the
better of two batch sizes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch
from record import write_record
from transformers import AutoModel, AutoTokenizer

from skspin import LLMActivationTransformer
from skspin._model import Source
from skspin._model.recipe import multiplies_bfloat16
from skspin._model.registry import load_backbone
from skspin.datasets import demo_llm, demo_model

LLM = "llm"
N_TEXTS = {"sst2": 800, "imdb_5k": 50, LLM: 80}
QUICK_TEXTS = {"sst2": 300, "imdb_5k": 16, LLM: 16}
BARE_BATCHES = (2048, 4096)  # tokens
INT8_TEXTS = {"sst2": 60, "imdb_5k": 5}  # without instructions for it a CPU takes 20 times as long
EVERYTHING = {"site": ("hidden", "mlp", "attention"), "pooling": ("mean", "max")}


@dataclass
class Figure:
    """One line of the table: what was measured round by round, and what it should reach."""

    what: str
    data: str
    reference: str
    rounds: list[float]
    least: float | None = None
    most: float | None = None
    unit: str = "x"

    @property
    def median(self):
        return float(np.median(self.rounds))

    @property
    def goal(self):
        if self.least is not None:
            return f">= {self.least:g}{self.unit}"
        return "" if self.most is None else f"<= {self.most:.3g}{self.unit}"

    @property
    def verdict(self):
        if not self.goal:
            return ""
        met = self.median >= self.least if self.least is not None else self.median <= self.most
        return "yes" if met else "NO"

    def as_row(self):
        ends = (min(self.rounds), max(self.rounds))
        return {
            "what": self.what,
            "data": self.data,
            "reference": self.reference,
            "median": f"{self.median:.3g}{self.unit}",
            "spread": "{:.3g} .. {:.3g}".format(*ends) if len(self.rounds) > 1 else "",
            "goal": self.goal,
            "reached": self.verdict,
            "rounds": self.rounds,
        }


def read_texts(folder, name, n_texts=None):
    """Draw some of a set's texts, or take all of them."""
    texts = pd.read_csv(folder / f"{name}.csv.gz").text.drop_duplicates()
    return texts.tolist() if n_texts is None else texts.sample(n_texts, random_state=0).tolist()


# The other sides


def load_model(dtype=torch.float32):
    return AutoModel.from_pretrained(demo_model(), dtype=dtype).eval()


def hand_written(model, tokenizer, texts):
    """What people write: batches as they come, all hidden states kept, pooled by hand."""
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            batch = texts[start : start + 32]
            inputs = tokenizer(
                batch, padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            states = model(**inputs, output_hidden_states=True).hidden_states
            mask = inputs["attention_mask"].unsqueeze(-1)  # (n_texts, n_tokens, 1)
            rows.append(torch.cat([(h * mask).sum(1) / mask.sum(1) for h in states], dim=1))
    return torch.cat(rows).float().numpy()


def sentence_transformers(texts):
    """Give sentence-transformers' side, or none where it is not installed."""
    if not find_spec("sentence_transformers"):
        return {}
    from sentence_transformers import SentenceTransformer

    sentences = SentenceTransformer(str(demo_model()), device="cpu")
    sentences.max_seq_length = 512
    return {"sentences": lambda: sentences.encode(texts, show_progress_bar=False)}


def onnx_runtime(texts):
    """Give the bare model's graph in ONNX Runtime, last layer, where that is installed."""
    if not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        return {}
    from bare_onnx import embedder, run_with_onnxruntime, write_graphs

    ordered = sorted(texts, key=len)  # as sentence-transformers orders them
    batches = [ordered[start : start + 32] for start in range(0, len(texts), 32)]
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for number_format, path in write_graphs(Path(folder)).items():
            embed = embedder(run_with_onnxruntime(path, torch.get_num_threads()), 512)
            sides[f"ONNX {number_format}"] = lambda embed=embed: [embed(part) for part in batches]
    return sides


def best_batches(tokenizer, texts, n_tokens):
    """Tokenize, sort by length and pad beforehand: a forward pass over these is the bare work."""
    ids = sorted(tokenizer(texts, truncation=True, max_length=512)["input_ids"], key=len)
    batches = []
    while ids:
        size = max(1, n_tokens // len(ids[-1]))
        batches.append(tokenizer.pad({"input_ids": ids[-size:]}, return_tensors="pt"))
        del ids[-size:]
    return batches


def run_bare(model, batches, **settings):
    with torch.no_grad():
        for batch in batches:
            model(**batch, **settings)


# Timing


def take_turns(sides: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, np.ndarray]:
    """Time every side once a round, in an order that changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(n_rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - started)
        print(f"  round {turn + 1} of {n_rounds}", file=sys.stderr)
    return {name: np.array(values) for name, values in times.items()}


@contextmanager
def busy_process():
    """Keep one core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def extraction(texts, path=None, **params):
    """Make a function that extracts the texts anew at each call, with the model loaded already."""
    settings = {"cache": None, "dtype": "float32", **params}
    transformer = LLMActivationTransformer(path or demo_model(), **settings).fit(texts)
    transformer.transform(texts[:64])
    return lambda: transformer.transform(texts)


def eight_bits(name, texts, n_rounds):
    """Time torchao's int8 beside float32: of weights alone, and of weights and activations."""
    if not find_spec("torchao"):
        return
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    def quantised(config):
        return extraction(texts, model_kwargs={"quantization_config": TorchAoConfig(config)})

    t = take_turns(
        {
            "float32": extraction(texts),
            "int8 weights": quantised(Int8WeightOnlyConfig()),
            "int8": quantised(Int8DynamicActivationInt8WeightConfig()),
        },
        n_rounds,
    )
    for what in ("int8 weights", "int8"):
        ratios = (t["float32"] / t[what]).tolist()
        yield Figure(f"hidden, mean, {what} by torchao: speed", name, "float32", ratios)


def measure(name, texts, n_rounds):
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model, has_half = load_model(), multiplies_bfloat16("cpu")
    n_layers = model.config.num_hidden_layers
    bare = [best_batches(tokenizer, texts, n_tokens) for n_tokens in BARE_BATCHES]
    up_to = (n_layers // 3, 2 * n_layers // 3)
    sides = {
        "hidden": extraction(texts),
        "everything": extraction(texts, **EVERYTHING),
        **{f"up to {k}": extraction(texts, layers=list(range(k + 1))) for k in up_to},
        **sentence_transformers(texts),
        **onnx_runtime(texts),
        "by hand": lambda: hand_written(model, tokenizer, texts),
        **{f"bare {i}": lambda b=batches: run_bare(model, b) for i, batches in enumerate(bare)},
    }
    if has_half:  # elsewhere it takes many times as long
        half = load_model(torch.bfloat16)
        sides["bfloat16"] = extraction(texts, dtype="bfloat16")
        sides["bare bfloat16"] = lambda: run_bare(half, bare[-1])
    t = take_turns(sides, n_rounds)
    bare_time = np.minimum(t["bare 0"], t["bare 1"])
    st, hand, forward = "SentenceTransformer.encode", "output_hidden_states by 32", "bare forward"
    short = name == "sst2"

    def figure(what, reference, ratios, **goal):
        return Figure(what, name, reference, ratios.tolist(), **goal)

    if "sentences" in t:
        goal = {"least": 1.1} if short else {}
        yield figure("hidden, mean, float32: speed", st, t["sentences"] / t["hidden"], **goal)
    for side in ("ONNX float32", "ONNX int8"):
        if side in t:
            reference = f"the model in {side.replace('ONNX', 'ONNX Runtime')}"
            yield figure("hidden, mean, float32: speed", reference, t[side] / t["hidden"])
    yield figure("hidden, mean, float32: speed", hand, t["by hand"] / t["hidden"])
    cores = 1.1 if short else 1.0
    yield figure("hidden, mean, float32: tokens/s", forward, bare_time / t["hidden"], least=cores)
    yield figure("3 sites, 2 poolings: tokens/s", forward, bare_time / t["everything"], least=0.9)
    with busy_process():
        names = ("hidden", "bare 0", "bare 1")
        busy = take_turns({side: sides[side] for side in names}, n_rounds)
    yield figure(
        "hidden, mean, float32, beside a busy process: tokens/s",
        f"{forward}, beside it, too",
        np.minimum(busy["bare 0"], busy["bare 1"]) / busy["hidden"],
        **({"least": 1.3} if short else {}),
    )
    if has_half:
        ratio = t["bare bfloat16"] / t["bfloat16"]
        yield figure("hidden, mean, bfloat16: tokens/s", f"{forward}, bfloat16", ratio, least=0.9)
        ratio = t["by hand"] / t["bfloat16"]
        goal = {"least": 6.0} if short else {}
        yield figure("hidden, mean, bfloat16: speed", hand, ratio, **goal)
    yield figure(
        "3 sites, 2 poolings: time", "hidden, mean", t["everything"] / t["hidden"], most=1.3
    )
    for k in up_to:
        share = t[f"up to {k}"] / t["hidden"]
        yield figure(
            f"layers up to {k} of {n_layers}: time", "all layers", share, most=k / n_layers + 0.1
        )
    yield closeness(name, texts, n_layers)
    yield from eight_bits(name, texts[: INT8_TEXTS[name]], min(n_rounds, 3))


def measure_llm(texts, n_rounds):
    """Time a decoder of thirty small blocks beside its own bare forward pass."""
    backbone = load_backbone(Source(demo_llm()), None, "float32")
    tokenizer, model = backbone.tokenizer, backbone.model
    sides = {
        "hidden, last": extraction(texts, demo_llm(), pooling="last"),
        "mlp, mean + max": extraction(texts, demo_llm(), site="mlp", pooling=("mean", "max")),
    }
    for n_tokens in BARE_BATCHES:
        batches = best_batches(tokenizer, texts, n_tokens)
        sides[f"bare {n_tokens}"] = lambda b=batches: run_bare(model, b, use_cache=False)
    t = take_turns(sides, n_rounds)
    bare_time = np.minimum(*(t[f"bare {n_tokens}"] for n_tokens in BARE_BATCHES))
    for what, least in (("hidden, last", 1.1), ("mlp, mean + max", 0.9)):
        ratios = (bare_time / t[what]).tolist()
        yield Figure(
            f"{what}, float32: tokens/s", "sst2, demo LLM", "bare forward", ratios, least=least
        )


def padding(name, texts):
    """Share of the tokens in the model's batches that are padding."""
    batches = []  # (tokens, real tokens); appended to by several threads

    def see(module, args, kwargs):
        mask = kwargs["attention_mask"]
        batches.append((mask.numel(), int(mask.sum())))

    backbone = load_backbone(Source(demo_model()), None, "float32")
    handle = backbone.model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        extraction(texts, layers=0)()
    finally:
        handle.remove()
    n_tokens, n_real = np.sum(batches, axis=0)
    share = 100 * float(1 - n_real / n_tokens)
    goal = {"most": 3.0} if name == "sst2" else {}
    return Figure("padding", name, "tokens in the batches", [share], unit="%", **goal)


def closeness(name, texts, n_layers):
    """Least cosine between a text's bfloat16 and float32 activations, over texts and layers."""
    pair = [extraction(texts[:200], dtype=dtype)() for dtype in ("float32", "bfloat16")]
    single, half = (np.asarray(rows).reshape(len(rows), n_layers + 1, -1) for rows in pair)
    lengths = np.linalg.norm(single, axis=2) * np.linalg.norm(half, axis=2)
    cosine = (single * half).sum(axis=2) / lengths  # (n_texts, n_layers + 1)
    by_layer = cosine.mean(axis=0)
    return Figure(
        "bfloat16: cosine, least layer",
        name,
        "float32",
        [float(by_layer.min())],
        least=0.999,
        unit="",
    )


# Report


def print_table(rows):
    names = ["what", "data", "reference", "median", "spread", "goal", "reached"]
    lines = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--quick", action="store_true", help="few texts, three rounds")
    parser.add_argument("--rounds", type=int, help="how often each side is timed")
    parser.add_argument("--sets", nargs="+", default=list(N_TEXTS), choices=list(N_TEXTS))
    parser.add_argument("--json", type=Path, help="where to write figures and machine")
    options = parser.parse_args()
    if not find_spec("sentence_transformers"):
        print("sentence-transformers is not installed: nothing is compared with it")
    n_rounds = options.rounds or (3 if options.quick else 5)
    figures = []
    for name in options.sets:
        n_texts = (QUICK_TEXTS if options.quick else N_TEXTS)[name]
        print(f"{name}: {n_texts} texts", file=sys.stderr)
        texts = read_texts(options.data, "sst2" if name == LLM else name, n_texts)
        if name == LLM:
            figures += measure_llm(texts, n_rounds)
            continue
        figures += measure(name, texts, n_rounds)
        figures.append(padding(name, read_texts(options.data, name)))
    rows = [figure.as_row() for figure in figures]
    print_table(rows)
    if not multiplies_bfloat16("cpu"):
        print("This CPU does not multiply bfloat16, whose speed was not measured.")
    if options.json:
        write_record(options.json, rows)


if __name__ == "__main__":
    main()
