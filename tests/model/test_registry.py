"""Frozen models: found, named by what decides their numbers, loaded once, and shared."""

import copy
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from bert_files import COMMIT, CONFIG, as_hub_cache, save, tiny_bert
from transformers import BertConfig, BertModel

from skspin._model.device import multiplies_bfloat16, resolve_device, resolve_dtype
from skspin._model.fingerprint import fingerprint
from skspin._model.registry import forget_models, load_backbone
from skspin._model.source import Source, _ask


@pytest.fixture
def model():
    return tiny_bert()


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    yield save(tmp_path / "tiny", model, tokenizer)
    forget_models()


@pytest.fixture
def cache(tmp_path, folder):
    _ask.cache_clear()
    yield {"cache_dir": as_hub_cache(tmp_path / "hub", folder)}
    _ask.cache_clear()


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


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
    assert load_backbone(again, dtype="bfloat16") is not first


def test_forgotten_models_are_released(folder):
    alive = weakref.ref(load_backbone(Source(folder)).model)
    forget_models()
    gc.collect()
    assert alive() is None


def test_a_source_travels_in_a_pickle(folder):
    source = Source(folder, model_kwargs={"attn_implementation": "eager"})
    assert pickle.loads(pickle.dumps(source)) == source


def test_a_token_is_never_shown():
    assert "secret" not in repr(Source("org/tiny", model_kwargs={"token": "secret"}))
    assert "secret" not in repr(Source("org/tiny", model_kwargs={"token": "secret"}).place)


# Fingerprints


def test_a_folders_fingerprint_is_its_content_not_its_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "README.md").write_text("A copy.")
    assert fingerprint(Source(folder)) == fingerprint(Source(tmp_path / "other"))
    assert fingerprint(Source(folder)).startswith("folder:")


@pytest.mark.parametrize("part", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_changes_gets_a_new_fingerprint_and_new_weights(folder, part):
    before = load_backbone(Source(folder))
    if part == "config.json":
        rewrite(folder / part, lambda config: config | {"layer_norm_eps": 0.1})
    elif part == "tokenizer.json":
        rewrite(folder / part, lambda rules: rules | {"normalizer": {"type": "NFC"}})
    else:
        other = BertModel(BertConfig(**CONFIG))
        other.save_pretrained(folder)
    after = load_backbone(Source(folder))
    assert after.fingerprint == fingerprint(Source(folder)) != before.fingerprint
    assert after is not before
    if part == "model.safetensors":
        torch.testing.assert_close(dict(after.model.state_dict()), dict(other.state_dict()))


def test_the_fingerprint_needs_no_torch(folder, cache):
    code = f"""
import sys
from skspin._model.fingerprint import fingerprint
from skspin._model.device import resolve_device, resolve_dtype
from skspin._model.source import Source, _ask
fingerprint(Source({str(folder)!r}))
fingerprint(Source("org/tiny", model_kwargs={cache!r}))
has_driver = resolve_device() != "cpu"
resolve_dtype("auto", "cpu")
assert has_driver or not {{"torch", "transformers"}} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_a_hub_models_fingerprint_is_its_commit(cache):
    source = Source("org/tiny", model_kwargs=cache)
    assert source.commit == COMMIT
    assert fingerprint(source) == f"hub:org/tiny@{COMMIT}"
    pinned = Source("org/tiny", revision=COMMIT, model_kwargs=cache)
    assert fingerprint(pinned) == fingerprint(source)


def test_options_that_change_no_number_are_not_in_the_fingerprint(folder):
    plain = fingerprint(Source(folder))
    neutral = {"attn_implementation": "eager", "device_map": "cpu", "low_cpu_mem_usage": True}
    assert fingerprint(Source(folder, model_kwargs=neutral)) == plain
    assert fingerprint(Source(folder, model_kwargs={"quantization_config": {"bits": 4}})) != plain
    assert fingerprint(Source(folder, trust_remote_code=True)) != plain


def test_the_tokenizer_and_what_it_does_are_in_the_fingerprint(model, tokenizer):
    def with_settings(**settings):
        other = copy.deepcopy(tokenizer)
        for name, value in settings.items():
            setattr(other, name, value)
        return fingerprint(Source(model, tokenizer=other))

    plain = fingerprint(Source(model, tokenizer=tokenizer))
    assert with_settings() == plain
    assert with_settings(padding_side="left") == plain
    assert with_settings(truncation_side="left") != plain
    assert with_settings(cls_token="[SEP]") != plain
    used = copy.deepcopy(tokenizer)
    used(["a", "a b c"], padding=True, truncation=True, max_length=4)
    assert fingerprint(Source(model, tokenizer=used)) == plain
    used.add_tokens(["spin"])
    assert fingerprint(Source(model, tokenizer=used)) != plain


def test_a_folder_of_a_tokenizer_is_named_by_its_content(folder, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "words")
    source = Source(folder, tokenizer=tmp_path / "words")
    assert fingerprint(source) != fingerprint(Source(folder))
    assert len(load_backbone(source).tokenizer) == len(tokenizer)


# Devices and formats


def test_a_gpu_is_used_where_there_is_one():
    assert resolve_device(None) == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"device='{device}'"):
        resolve_device(device)


def test_auto_is_bfloat16_only_where_the_device_multiplies_it():
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    expected = "bfloat16" if flags.get("amx_bf16") else "float32"
    assert resolve_dtype("auto", "cpu") == expected
    assert multiplies_bfloat16("cpu") is (expected == "bfloat16")
    assert resolve_dtype("auto", "mps") == "float32"
    assert resolve_dtype(torch.float16, "cpu") == "float16"


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="dtype='int8'.*'auto' or one of"):
        resolve_dtype("int8", "cpu")


def test_weights_are_in_the_format_asked_for(folder):
    backbone = load_backbone(Source(folder), dtype="bfloat16")
    assert backbone.model.dtype == torch.bfloat16 and backbone.dtype == "bfloat16"


def test_transformers_may_place_the_weights(folder):
    pytest.importorskip("accelerate")
    backbone = load_backbone(Source(folder, model_kwargs={"device_map": "auto"}))
    assert str(backbone.device) == resolve_device()


# Forks


def embed(folder, queue):
    backbone = load_backbone(Source(folder))
    with torch.no_grad():
        output = backbone.model(torch.arange(30)[None])
    queue.put(output.last_hidden_state.numpy())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python's, from 3.12 on
def test_a_forked_process_runs_the_model_too(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.rand(400, 400) @ torch.rand(400, 400)  # makes OpenMP's threads
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=embed, args=(folder, queue))
        child.start()
        rows = queue.get(timeout=60)
        child.join()
    finally:
        torch.set_num_threads(threads)
    assert np.isfinite(rows).all()
