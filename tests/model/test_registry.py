"""Frozen models that are ready to run: loaded once, shared, left as they are if passed in."""

import gc
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bert_files import SIZES
from transformers import BertConfig, BertModel

from skspin._model import batches
from skspin._model.files import Source
from skspin._model.recipe import multiplies_bfloat16, resolve_device, resolve_dtype
from skspin._model.registry import forget_models, load_backbone, resolve_placement

# One shared copy


def test_threads_that_ask_at_once_share_one_copy(folder):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load_backbone(Source(folder)), range(16)))
    assert len({id(backbone.model) for backbone in found}) == 1
    assert not found[0].model.training
    assert not any(parameter.requires_grad for parameter in found[0].model.parameters())


def test_equal_sources_share_and_others_do_not(folder):
    first = load_backbone(Source(folder, model_kwargs={"attn_implementation": "eager"}))
    again = Source(str(folder), model_kwargs={"attn_implementation": "eager"})
    assert load_backbone(again) is first
    assert load_backbone(Source(folder)) is not first
    other = load_backbone(again, dtype="bfloat16")
    assert other is not first and other.model.dtype == torch.bfloat16


def test_copies_of_a_tokenizer_share_the_model(folder, tokenizer):
    first = load_backbone(Source(folder, tokenizer=tokenizer))
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert load_backbone(Source(folder, tokenizer=copied)) is first
    copied.add_tokens(["filmic"])
    assert load_backbone(Source(folder, tokenizer=copied)).fingerprint != first.fingerprint


def test_options_that_change_in_place_load_the_model_again(folder):
    options = {"attn_implementation": "sdpa"}
    first = load_backbone(Source(folder, model_kwargs=options))
    options["attn_implementation"] = "eager"
    assert load_backbone(Source(folder, model_kwargs=options)) is not first


def test_forgotten_models_are_released(folder):
    alive = weakref.ref(load_backbone(Source(folder)).model)
    forget_models()
    gc.collect()
    assert alive() is None


def test_a_source_travels_in_a_pickle(folder):
    source = Source(folder, model_kwargs={"attn_implementation": "eager"})
    assert pickle.loads(pickle.dumps(source)) == source


def test_a_token_is_never_shown():
    source = Source("org/tiny", model_kwargs={"token": "secret"})
    assert "secret" not in f"{source!r} {source.files!r}"


# Devices and formats


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_gpu_is_used_where_there_is_one_and_what_is_not_there_is_refused(device):
    assert resolve_device(None) == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == "cpu"
    # Devices have the names that tensors there give them.
    assert resolve_device("cpu:0") == str(torch.empty(0, device="cpu:0").device) == "cpu"
    assert resolve_device("mps") == resolve_device("mps:0") == "mps:0"
    with pytest.raises(ValueError, match=f"device='{device}'"):
        resolve_device(device)


def test_auto_is_bfloat16_only_where_the_device_multiplies_it():
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    expected = "bfloat16" if flags.get("amx_bf16") else "float32"
    assert resolve_dtype("auto", "cpu") == expected
    assert multiplies_bfloat16("cpu") is (expected == "bfloat16")
    assert resolve_dtype("auto", "mps") == "float32"
    assert resolve_dtype(torch.float16, "cpu") == "float16"
    with pytest.raises(ValueError, match="dtype='int8'.*'auto' or one of"):
        resolve_dtype("int8", "cpu")


def test_transformers_may_place_the_weights(folder):
    pytest.importorskip("accelerate")
    backbone = load_backbone(Source(folder, model_kwargs={"device_map": "auto"}))
    assert str(backbone.device) == resolve_device()


# Models that are passed in


def test_a_model_passed_in_is_used_as_it_is(model, tokenizer):
    model.train().to(torch.bfloat16)
    backbone = load_backbone(Source(model, tokenizer=tokenizer))
    assert backbone.model is model and backbone.tokenizer is tokenizer
    assert backbone.dtype == "bfloat16" and str(backbone.device) == "cpu"
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_passed_in_is_not_kept(tokenizer):
    model = BertModel(BertConfig(**SIZES))
    batches.TokenBudget(load_backbone(Source(model, tokenizer=tokenizer))).halve(16)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_model_passed_in_is_not_moved(model, tokenizer):
    source = Source(model, tokenizer=tokenizer)
    assert resolve_placement(source) == ("cpu", "float32")
    for device in ("cpu", "cpu:0"):
        assert resolve_placement(source, device, "float32") == ("cpu", "float32")
    with pytest.raises(ValueError, match="dtype='bfloat16'.*'float32' and stays so"):
        load_backbone(source, dtype="bfloat16")
    with pytest.raises(ValueError, match="device='meta'.*'cpu' and stays there"):
        load_backbone(source, device="meta")


# Forks


FORK = """
import multiprocessing, sys, torch
from skspin._model.files import Source
from skspin._model.registry import load_backbone

def embed():
    backbone = load_backbone(Source(sys.argv[1]))
    with torch.no_grad():
        rows = backbone.model(torch.arange(30)[None]).last_hidden_state
    queue.put(bool(rows.isfinite().all()))

torch.set_num_threads(2)
torch.rand(400, 400) @ torch.rand(400, 400)  # makes OpenMP's threads
context = multiprocessing.get_context("fork")
queue = context.Queue()
context.Process(target=embed, daemon=True).start()
print(queue.get(timeout=60))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_runs_the_model_too(folder):
    # In a new process: MKL's own memory may be locked at a fork of one that has run for long.
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
