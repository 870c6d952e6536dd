"""What a GPU makes of it: extraction, memory, probes, whole fits, and equality with the CPU.

    python tests/benchmarks/gpu.py [--data FOLDER] [--parts a b ...] [--json FILE]
    python tests/benchmarks/gpu.py --device cpu --quick    # does the script run?

Nothing is downloaded, and no part is begun after --minutes. FOLDER holds sst2.csv.gz with the
columns text and label; without it, docstrings take their place. The table goes to FILE, and as
Markdown to the same name with .md, anew after each part:

a  MiniLM on short texts        d  batch sizes, and memory that falls short
b  a random Llama of 1 billion  e  probes, beside the CPU's and liblinear
   parameters on 512 tokens     f  whole fits of make_spin_pipeline
c  the demo LLM, if installed   g  equality with the CPU in float32

Speeds stand beside the model's bare forward pass over the same tokens, tokenized, sorted, padded
and put on the device beforehand, in the best of some batch sizes, and beside the rate of a product
of two large matrices; of the pass, two operations for each token and weight count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # the tests' own modules

import numpy as np
import torch
from copied_bytes import CopiedBytes
from extraction import EVERYTHING, Figure, best_batches, print_table, run_bare, take_turns
from probes import folds_and_costs, objectives, solve_one_by_one, solve_together, with_scikit_learn
from record import describe_machine, write_record
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer, LlamaConfig, LlamaModel
from transformers.utils import is_flash_attn_2_available

from skspin import LLMActivationTransformer, make_spin_pipeline
from skspin._model import Source, batches
from skspin._model.batches import TokenBudget
from skspin._model.recipe import multiplies_bfloat16
from skspin._model.registry import forget_models, load_backbone
from skspin.datasets import demo_llm, demo_model, load_docstrings

COLUMNS = {
    "hidden, mean": {},
    "mlp, mean and max": {"site": "mlp", "pooling": ("mean", "max")},
    "3 sites, mean and max": EVERYTHING,
}
ALL_POOLINGS = {"site": EVERYTHING["site"], "pooling": ("mean", "max", "first", "last")}
BILLION = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPARE_BYTES = 1 << 30  # that are left to a batch where memory is to fall short


@dataclass(frozen=True)
class Setting:
    """Where it is measured, on which texts, and how long."""

    device: torch.device
    dtype: str  # what "auto" means on the device
    quick: bool
    data: str
    texts: list[str]
    y: np.ndarray
    matrix_rate: float  # operations per second

    def either(self, whole, quick):
        return quick if self.quick else whole


def load_texts(folder, quick):
    """Give the name of a set, its texts and their labels."""
    if folder is None:
        found = load_docstrings(n_per_class=5 if quick else 2000)
        return "docstrings", found.data, found.target
    import pandas as pd

    table = pd.read_csv(folder / "sst2.csv.gz").drop_duplicates("text")
    table = table.head(30) if quick else table
    return "sst2", table.text.tolist(), table.label.to_numpy()


def measure_matrix_rate(device, dtype, size):
    """Multiply two square matrices again and again; give operations per second."""
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    rates = []
    for _ in range(10):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return float(np.median(rates))


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# a, b, c: extraction


def minilm(setting):
    sizes = setting.either((8192, 32_768, 131_072), (256,))
    yield from extraction(setting, "MiniLM", demo_model(), setting.texts, sizes)


def billion(setting):
    n_texts, n_tokens = setting.either((256, 512), (3, 32))
    sizes = setting.either((4096, 16_384, 65_536), (64,))
    with random_llama(setting.either(BILLION, SMALL), setting) as folder:
        texts = random_texts(AutoTokenizer.from_pretrained(folder), n_texts, n_tokens)
        name = setting.either("random Llama, 1 billion", "random Llama, small")
        yield from extraction(setting, name, folder, texts, sizes, matrix_goal=0.5)
        yield from attention(setting, name, folder, texts)


def language_model(setting):
    texts = setting.texts[: setting.either(2000, 2)]
    sizes = setting.either((8192, 32_768), (256,))
    yield from extraction(setting, "SmolLM2-135M-Instruct", demo_llm(), texts, sizes)


def extraction(setting, name, model, texts, sizes, matrix_goal=None):
    """Measure all of one model: speed, memory and copies."""
    place = {"device": str(setting.device), "dtype": setting.dtype}
    transformers = {
        what: LLMActivationTransformer(model, cache=None, **place, **columns).fit(texts)
        for what, columns in setting.either(COLUMNS, dict([*COLUMNS.items()][-1:])).items()
    }
    backbone = load_backbone(Source(model), **place)
    batches = {size: bare_inputs(backbone, texts, size) for size in sizes}

    def bare(size):
        run_bare(backbone.model, batches[size])
        synchronise(setting.device)

    sides = {what: lambda t=t: t.transform(texts) for what, t in transformers.items()}
    sides |= {f"bare {size}": lambda size=size: bare(size) for size in sizes}
    for run in sides.values():
        run()  # kernels are chosen, memory is found
    times = take_turns(sides, setting.either(5, 1))
    forward = np.min([times[f"bare {size}"] for size in sizes], axis=0)
    n_tokens = sum(int(b["attention_mask"].sum()) for b in batches[sizes[0]])
    on = f"{name}, {setting.data if name == 'MiniLM' else f'{len(texts)} texts'}, {backbone.dtype}"
    embedded = {id(m.weight) for m in backbone.model.modules() if isinstance(m, torch.nn.Embedding)}
    n_weights = sum(p.numel() for p in backbone.model.parameters() if id(p) not in embedded)

    def share(seconds):
        return (100 * 2 * n_weights * n_tokens / seconds / setting.matrix_rate).tolist()

    goal = {} if matrix_goal is None else {"least": 100 * matrix_goal}
    speed = (n_tokens / forward / 1e6).tolist()
    yield Figure("bare pass: speed", on, "", speed, unit=" M tokens/s")
    yield Figure("bare pass: operations", on, "matrix product", share(forward), unit="%")
    for what, transformer in transformers.items():
        took = times[what]
        speed = (n_tokens / took / 1e6).tolist()
        yield Figure(f"{what}: speed", on, "", speed, unit=" M tokens/s")
        yield Figure(f"{what}: speed", on, "bare pass", (forward / took).tolist(), least=0.9)
        yield Figure(f"{what}: operations", on, "matrix product", share(took), unit="%", **goal)
        yield from memory(setting, what, on, transformer, backbone, texts)


def bare_inputs(backbone, texts, n_tokens):
    names = ("input_ids", "attention_mask")
    batches = best_batches(backbone.tokenizer, texts, n_tokens)
    more = {"use_cache": False} if hasattr(backbone.model.config, "use_cache") else {}
    return [{name: batch[name].to(backbone.device) for name in names} | more for batch in batches]


def memory(setting, what, on, transformer, backbone, texts):
    """Measure the peak beyond the weights, and what goes to the device and back."""
    with CopiedBytes() as copied:
        transformer.transform(texts)
    n_columns = transformer.layout_.n_columns
    to_host, from_host = copied.to_host / len(texts), copied.from_host / len(texts)
    most = {"most": 4 * n_columns / 1e3}
    columns = f"{n_columns:,} columns in float32"
    yield Figure(f"{what}: to the host, a text", on, columns, [to_host / 1e3], unit=" kB", **most)
    yield Figure(f"{what}: to the device, a text", on, "", [from_host / 1e3], unit=" kB")
    if setting.device.type != "cuda":
        return
    synchronise(setting.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    transformer.transform(texts)
    peak = torch.cuda.max_memory_allocated(setting.device) - before
    allowed = two_layers(backbone, texts)
    beside = "activations of two layers"
    yield Figure(f"{what}: peak", on, beside, [peak / 1e6], most=allowed / 1e6, unit=" MB")


def two_layers(backbone, texts):
    """Count the bytes of what all modules of a block give for the largest batch, twice."""
    n_bytes = []
    block = next(iter(backbone.anatomy.stacks.values())).blocks[-1]

    def note(module, args, output):
        n_bytes.append(output.nbytes if isinstance(output, torch.Tensor) else 0)

    batch = bare_inputs(backbone, texts, TokenBudget(backbone).tokens)[:1]
    handles = [m.register_forward_hook(note) for m in block.modules() if not [*m.children()]]
    try:
        run_bare(backbone.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return 2 * sum(n_bytes)


@contextmanager
def random_llama(size, setting):
    """Save a Llama-shaped model that has learnt nothing, for as long as a ``with`` block lasts."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    torch.manual_seed(0)
    with setting.device:
        model = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **size))
    with tempfile.TemporaryDirectory() as folder:
        model.to(getattr(torch, setting.dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        yield Path(folder)


def random_texts(tokenizer, n_texts, n_tokens):
    """Make texts of as many tokens each."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())
    chosen = np.random.default_rng(0).choice(words, (n_texts, n_tokens - 2))  # two special ones
    return [" ".join(row) for row in chosen]


def attention(setting, name, model, texts):
    """Compare the ways to compute attention."""
    ways = ["sdpa", "eager", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
    place = {"device": str(setting.device), "dtype": setting.dtype, "cache": None}
    transformers = {
        way: LLMActivationTransformer(
            model, model_kwargs={"attn_implementation": way}, **place
        ).fit(texts)
        for way in ways
    }  # fmt: skip
    sides = {way: lambda t=t: t.transform(texts) for way, t in transformers.items()}
    for run in sides.values():
        run()
    times = take_turns(sides, setting.either(3, 1))
    for way in ways[1:]:
        ratios = (times["sdpa"] / times[way]).tolist()
        yield Figure(f"attention: {way}, speed", name, "sdpa", ratios)


# d: memory that falls short


def batch_sizes(setting):
    for dtype in ("float32", setting.dtype):
        backbone = load_backbone(Source(demo_model()), setting.device, dtype)
        found = [float(TokenBudget(backbone).tokens)]
        yield Figure(f"tokens in a batch, {dtype}", "MiniLM", "", found, unit="")
    forget_models()
    texts = setting.texts
    plain = {"device": str(setting.device), "dtype": "float32", "cache": None, "site": "mlp"}
    expected = LLMActivationTransformer(demo_model(), **plain).fit_transform(texts)
    plain["batch_tokens"] = 1 << 30
    transformer = LLMActivationTransformer(demo_model(), **plain).fit(texts)
    backbone = load_backbone(Source(demo_model()), setting.device, "float32")
    with short_memory(setting, backbone):
        rows = transformer.transform(texts)
    limit = batches._token_limits.get(backbone.model)
    forget_models()  # and the limit with it
    if limit is None:
        raise RuntimeError("Memory did not fall short.")
    beside = "1,073,741,824 asked for"
    yield Figure("tokens in a batch, memory short", "MiniLM", beside, [float(limit)], unit="")
    away = [float(np.abs(rows - expected).max())]
    yield Figure("rows after halving: difference", "MiniLM", "others", away, most=1e-4, unit="")


class short_memory:
    """Leaves a batch little memory; on a CPU, a hook says so of several texts of many tokens."""

    def __init__(self, setting, backbone):
        self.setting, self.backbone = setting, backbone

    def __enter__(self):
        device = self.setting.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(device).total_memory
            share = (torch.cuda.memory_reserved(device) + SPARE_BYTES) / total
            torch.cuda.set_per_process_memory_fraction(share, device)
            return
        embeddings = self.backbone.model.get_input_embeddings()
        self.handle = embeddings.register_forward_pre_hook(self.refuse)

    def refuse(self, module, args):
        if len(args[0]) > 1 and args[0].numel() > 100:
            raise torch.OutOfMemoryError("out of memory, as the benchmark has it")

    def __exit__(self, *error):
        if self.setting.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.setting.device)
        else:
            self.handle.remove()


# e, f: probes and whole fits


def probes(setting):
    """Solve one layer's problems of a search: on the device, on the CPU, and by liblinear."""
    for site, layer in (("hidden", 4), ("mlp", 5))[: setting.either(2, 1)]:
        n_texts = setting.either(7000, len(setting.texts))
        transformer = LLMActivationTransformer(
            demo_model(), site=site, layers=layer, device=str(setting.device), cache=None
        )
        X = np.array(transformer.fit_transform(setting.texts[:n_texts]))
        problems = folds_and_costs(X, setting.y[:n_texts])
        scaler = StandardScaler().fit(X)
        on_device = str(setting.device)
        took, found = {}, {}
        for where in (on_device, None):
            # The first one is not counted: kernels are chosen.
            runs = [solve_together(X, scaler, *problems, device=where) for _ in range(4)][1:]
            took[where] = np.array([seconds for seconds, _, _ in runs])
            found[where] = runs[-1][1:]
        Z = scaler.transform(X).astype(np.float64)
        liblinear = with_scikit_learn("liblinear")
        seconds, coef, intercept = solve_one_by_one(liblinear, Z, *problems, limit=30)
        seconds *= len(problems[1]) / len(coef)
        on = f"MiniLM, {setting.data}, {X.shape[0]:,} x {X.shape[1]:,}"
        yield Figure(f"20 probes, {site}: time", on, "", took[on_device].tolist(), unit=" s")
        ratios = (took[None] / took[on_device]).tolist()
        yield Figure(f"20 probes, {site}: speed", on, "the CPU's", ratios)
        ratios = (seconds / took[on_device]).tolist()
        yield Figure(f"20 probes, {site}: speed", on, "liblinear on the CPU", ratios, least=20)
        signs, costs, weights = (part[..., : len(coef)] for part in problems)
        own = [part[: len(coef)] for part in found[on_device]]
        reached, theirs = (
            objectives(Z, signs, costs, weights, *solution).sum()
            for solution in (own, (coef, intercept))
        )
        excess = [float(reached / theirs - 1)]
        yield Figure(f"20 probes, {site}: objective", on, "liblinear", excess, most=1e-3, unit="")


def whole_fit(setting):
    texts, y = setting.texts[: setting.either(4000, 40)], setting.y[: setting.either(4000, 40)]
    half = len(texts) // 2
    took, predicted = {}, {}
    for where in (str(setting.device), "cpu"):
        spin = make_spin_pipeline(demo_model(), device=where, dtype="float32", cache=None)
        spin.set_params(select__device=None if where == "cpu" else where, select__cache=None)
        spin["activations"].fit(texts).transform(texts[:64])
        started = time.perf_counter()
        spin.fit(texts[:half], y[:half])
        took[where] = time.perf_counter() - started
        predicted[where] = spin.predict(texts[half:])
    on_device, on = str(setting.device), f"MiniLM, {setting.data}, {half:,} texts, float32"
    yield Figure("fit of make_spin_pipeline: time", on, "", [took[on_device]], unit=" s")
    yield Figure("fit of make_spin_pipeline: speed", on, "CPU", [took["cpu"] / took[on_device]])
    alike = 100 * float(np.mean(predicted[on_device] == predicted["cpu"]))
    yield Figure("the same predictions", on, "CPU", [alike], least=99.0, unit="%")


# g: equality


def equality(setting):
    """Compare every site and pooling with the CPU's, in float32."""
    with random_llama(SMALL, replace(setting, dtype="float32")) as folder:
        for name, model in (("MiniLM", demo_model()), ("random Llama, small", folder)):
            for (site, pooling), largest in differences(setting, model).items():
                what, on = f"{site}, {pooling}: difference", f"{name}, float32"
                yield Figure(what, on, "CPU", [largest], most=1e-4, unit="")


def differences(setting, model):
    """Give the largest difference of a number x, in units of 1 + abs(x), by site and pooling."""
    texts = setting.texts[: setting.either(300, 10)]
    settings = {"cache": None, "dtype": "float32", **ALL_POOLINGS}
    on_cpu = LLMActivationTransformer(model, device="cpu", **settings)
    settings |= {"device": str(setting.device), "batch_tokens": 2000}
    on_device = LLMActivationTransformer(model, **settings)
    expected, rows = (np.asarray(t.fit_transform(texts)) for t in (on_cpu, on_device))
    away = np.abs(rows - expected) / (1 + np.abs(expected))  # (n_texts, n_columns)
    largest, layout = {}, on_cpu.layout_
    for segment, columns in zip(layout.segments, layout.slices, strict=True):
        key = segment.site, segment.pooling
        largest[key] = max(largest.get(key, 0.0), float(away[:, columns].max()))
    return largest


PARTS = {
    "a": minilm,
    "b": billion,
    "c": language_model,
    "d": batch_sizes,
    "e": probes,
    "f": whole_fit,
    "g": equality,
}


# Report


def run_part(part, setting):
    """Measure one part; an error becomes a row, and other parts go on."""
    try:
        for figure in PARTS[part](setting):
            yield {"part": part, **figure.as_row()}
    except ModuleNotFoundError as error:
        yield remark(part, "left out", str(error))
    except Exception as error:
        traceback.print_exc()
        yield remark(part, "FAILED", f"{type(error).__name__}: {error}".splitlines()[0])
    forget_models()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def remark(part, what, why):
    names = ("data", "reference", "median", "spread", "goal", "reached")
    return {"part": part, "what": what, **dict.fromkeys(names, ""), "data": why, "rounds": []}


def describe_device(setting):
    """Name the card, its memory and its driver."""
    facts = {"device": str(setting.device), "matrix product, TFLOP/s": setting.matrix_rate / 1e12}
    if setting.device.type == "cuda":
        card = torch.cuda.get_device_properties(setting.device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True).stdout.split()
        except OSError:  # ROCm
            said = []
        facts |= {
            "card": card.name,
            "memory, GB": card.total_memory / 1e9,
            "capability": f"{card.major}.{card.minor}",
            "driver": (said or ["unknown"])[0],
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return facts


def as_markdown(rows, facts):
    names = ["part", "what", "data", "reference", "median", "spread", "goal", "reached"]
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = [f"{name} {number}" for name, number in describe_machine()["versions"].items()]
    told = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in facts.items()]  # fmt: skip
    return f"{table}\n\nMeasured with {', '.join([*told, *versions])}.\n"


def write(path, rows, facts):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, rows, **facts)
    path.with_suffix(".md").write_text(as_markdown(rows, facts))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of sst2.csv.gz")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="everything on tiny sizes")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7, help="after which no part is begun")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/gpu.json"))
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch sees no GPU here, so there is nothing to measure. To see whether this script "
            "runs, use --device cpu --quick."
        )
    warnings.simplefilter("ignore")
    dtype = "bfloat16" if multiplies_bfloat16(str(device)) else "float32"
    rate = measure_matrix_rate(device, dtype, 256 if options.quick else 8192)
    setting = Setting(device, dtype, options.quick, *load_texts(options.data, options.quick), rate)
    facts, rows = describe_device(setting), []
    for part in options.parts:
        if time.monotonic() - begun > 60 * options.minutes:
            rows.append(remark(part, "left out", f"{options.minutes:g} minutes had passed"))
            continue
        print(f"part {part}, after {time.monotonic() - begun:.0f} s", file=sys.stderr)
        rows += run_part(part, setting)
        write(options.json, rows, facts)
    print_table([{**row, "what": f"{row['part']}  {row['what']}"} for row in rows])
    if any(row["what"] == "FAILED" for row in rows):
        raise SystemExit("Some parts failed.")


if __name__ == "__main__":
    main()
