"""What has to hold on a GPU: `pytest -m gpu`; and what can be known of it without one."""

import importlib
import json
import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_files import tiny
from copied_bytes import CopiedBytes
from extracted_rows import recipe_of, rows_of
from forward_pass import segments_of
from tiny_models import TINY, tiny_batch, tiny_tokenizer

from skspin import LLMActivationTransformer, SalientNeuronSelector, make_spin_pipeline, prune
from skspin._model import Source, batches
from skspin._model.anatomy import find_anatomy
from skspin._model.forward import read
from skspin._model.registry import forget_models, load_backbone
from skspin.datasets import demo_model

EVERYTHING = {
    "site": ("hidden", "mlp", "attention"),
    "pooling": ("mean", "max", "first", "last"),
}
TEXTS = [f"word{i % 7} " * (1 + i % 40) + f"word{i % 50}" for i in range(300)]


def on_gpu(test):
    """Mark a test, and skip it where there is no GPU."""
    absent = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason="PyTorch finds no GPU here")(test))


@pytest.fixture
def labelled():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 60)).astype(np.float32)
    return X, (X[:, 3] - X[:, 40] + 0.3 * rng.normal(size=400) > 0).astype(int)


# Without a GPU: the device "meta" has no numbers, so whatever copies some to the host raises.


class NoPadding(CopiedBytes):
    """Answers transformers, which asks once whether there is padding at all."""

    n_asked = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.n_asked += 1
            return False
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_neurons_are_chosen_on_the_device_and_nothing_is_copied_before(name):
    model = TINY[name].build(attn_implementation="eager").to("meta")
    batch = {key: values.to("meta") for key, values in tiny_batch().items()}
    some = [
        replace(segment, neurons=(0, 5, 7))
        for segment in segments_of(model, poolings=EVERYTHING["pooling"])
    ]
    with NoPadding() as copied:
        rows = read(find_anatomy(model), batch, some)
    assert rows.device.type == "meta" and rows.shape == (5, 3 * len(some))
    assert copied.to_host == 0
    assert copied.n_asked <= len(find_anatomy(model).stacks) + 1


def test_the_benchmark_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    benchmark = importlib.import_module("gpu")
    file = tmp_path / "gpu.json"
    parts = ["b", "d", "e", "f", "g"]  # the others differ in their models only
    benchmark.main(["--device", "cpu", "--quick", "--json", str(file), "--parts", *parts])
    rows = json.loads(file.read_text())["rows"]
    assert {row["part"] for row in rows} == set(parts)
    assert all(np.isfinite(row["rounds"]).all() for row in rows)
    assert file.with_suffix(".md").read_text().count("\n| ") == len(rows) + 1
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU here.*--device cpu --quick"):
            benchmark.main([])


# With one


@on_gpu
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "modernbert"])
def test_every_site_and_pooling_is_what_the_cpu_gives(name):
    model, tokenizer = TINY[name].build(), tiny_tokenizer()
    settings = {"tokenizer": tokenizer, "cache": None, **EVERYTHING}
    expected = LLMActivationTransformer(model, **settings).fit_transform(TEXTS)
    moved = deepcopy(model).cuda()
    rows = LLMActivationTransformer(moved, batch_tokens=500, **settings).fit_transform(TEXTS)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)


@on_gpu
def test_a_gpu_is_taken_and_computes_in_the_format_that_it_multiplies():
    transformer = LLMActivationTransformer(demo_model(), layers=-1, cache=None)
    rows = transformer.fit_transform(TEXTS)
    backbone = load_backbone(Source(demo_model()))
    assert backbone.device.type == "cuda"
    is_recent = torch.cuda.get_device_capability()[0] >= 8
    assert backbone.dtype == ("bfloat16" if is_recent else "float32")
    expected = transformer.set_params(device="cpu", dtype="float32").transform(TEXTS)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((rows * expected).sum(axis=1) / lengths).min() > 0.99


@on_gpu
def test_only_what_was_asked_for_leaves_the_gpu_and_nobody_waits_for_the_copy(labelled):
    y = np.arange(len(TEXTS)) % 7 < 3
    spin = make_spin_pipeline(demo_model(), device="cuda", cache=None).fit(TEXTS, y)
    for pipeline in (spin, prune(spin)):
        transformer = pipeline["activations"]
        with CopiedBytes() as copied:
            rows = transformer.transform(TEXTS)
        assert copied.to_host == rows.nbytes
        assert copied.pageable == 0


@on_gpu
def test_memory_does_not_grow_with_the_number_of_texts():
    model = tiny(hidden_size=256, intermediate_size=1024).cuda()
    transformer = LLMActivationTransformer(
        model, tokenizer=demo_model(), cache=None, batch_tokens=2000
    ).fit(TEXTS)
    peaks = []
    for texts in (TEXTS, TEXTS, [f"{i} {text}" for i in range(10) for text in TEXTS]):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        transformer.transform(texts)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] < 1.2 * peaks[1]


@on_gpu
def test_a_batch_that_does_not_fit_is_halved_and_rows_stay():
    texts = [f"{i} " + "film " * 250 for i in range(400)]
    settings = {"device": "cuda", "dtype": "float32", "site": "mlp", "cache": None}
    transformer = LLMActivationTransformer(demo_model(), **settings)
    expected = transformer.fit_transform(texts)
    forget_models()
    transformer.set_params(batch_tokens=1 << 30)
    backbone = load_backbone(Source(demo_model()), "cuda", "float32")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        allowed = torch.cuda.memory_reserved() + (512 << 20)
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        rows = transformer.transform(texts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        forget_models()
    assert batches.TokenBudget(backbone, 1 << 30).tokens < 1 << 30
    np.testing.assert_allclose(rows, expected, atol=1e-4)


@on_gpu
def test_an_interrupted_extraction_leaves_the_model_usable(tokenizer):
    recipe = recipe_of(tiny().cuda(), tokenizer, batch_tokens=500)
    expected = rows_of(recipe, TEXTS)
    handle = recipe.source.model.encoder.layer[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        rows_of(recipe, TEXTS)
    handle.remove()
    np.testing.assert_array_equal(rows_of(recipe, TEXTS), expected)


def interrupt(*_):
    raise KeyboardInterrupt


@on_gpu
@pytest.mark.parametrize("C", [0.1, (0.01, 0.1, 1.0)])
def test_probes_on_a_gpu_select_what_the_cpus_do(labelled, C):
    on_cpu = SalientNeuronSelector(layer_sizes=20, C=C, tol=1e-6, cache=None).fit(*labelled)
    on_gpu = SalientNeuronSelector(
        layer_sizes=20, C=C, tol=1e-6, cache=None, device="cuda"
    ).fit(*labelled)  # fmt: skip
    np.testing.assert_allclose(on_gpu.coef_, on_cpu.coef_, atol=1e-3)
    np.testing.assert_array_equal(on_gpu.support_, on_cpu.support_)


@on_gpu
def test_a_pipeline_that_was_fitted_on_a_gpu_predicts_without_one():
    y = np.arange(len(TEXTS)) % 7 < 3
    spin = make_spin_pipeline(demo_model(), device="cuda", dtype="float32", cache=None)
    spin.set_params(select__device="cuda").fit(TEXTS, y)
    loaded = pickle.loads(pickle.dumps(spin)).set_params(activations__device="cpu")
    np.testing.assert_allclose(loaded.predict_proba(TEXTS), spin.predict_proba(TEXTS), atol=1e-4)
