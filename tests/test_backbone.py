"""Frozen models: found, named by what decides their numbers, loaded once, and shared."""

import copy
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    T5Config,
)
from transformers.utils import logging

from skspin._device import multiplies_bfloat16, resolve_device, resolve_dtype
from skspin._extraction.backbone import (
    forget_models,
    load_backbone,
    read_anatomy,
    resolve_placement,
)
from skspin._extraction.fingerprint import fingerprint
from skspin._extraction.source import Source, _ask
from skspin.datasets import demo_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BertModel(BertConfig(**CONFIG))


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    yield tmp_path / "tiny"
    forget_models()


@pytest.fixture
def cache(tmp_path, folder):
    """A hub cache that holds one model, as the hub's client lays it out."""
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    _ask.cache_clear()
    yield {"cache_dir": str(tmp_path / "hub")}
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
from skspin._extraction.fingerprint import fingerprint
from skspin._device import resolve_device, resolve_dtype
from skspin._extraction.source import Source
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


# Models in memory


def change_in_place(model):
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] += 1


def change_past_the_counter(model):
    model.encoder.layer[0].output.dense.weight.data += 1


def replace_a_parameter(model):
    dense = model.encoder.layer[0].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.detach() * 2)


def change_a_setting(model):
    model.config.hidden_act = "relu"


@pytest.mark.parametrize(
    "change", [change_in_place, change_past_the_counter, replace_a_parameter, change_a_setting]
)
def test_a_model_in_memory_is_named_by_its_parameters(model, tokenizer, change):
    before = fingerprint(Source(model, tokenizer=tokenizer))
    assert fingerprint(Source(copy.deepcopy(model), tokenizer=tokenizer)) == before
    assert fingerprint(Source(model, tokenizer=tokenizer)) == before
    change(model)
    assert fingerprint(Source(model, tokenizer=tokenizer)) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_memory_has_a_fingerprint_in_every_format(model, tokenizer, dtype):
    source = Source(model.to(dtype), tokenizer=tokenizer)
    assert fingerprint(source) == fingerprint(source)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own
def test_an_adapter_is_part_of_a_model(model, tokenizer):
    peft = pytest.importorskip("peft")
    plain = fingerprint(Source(model, tokenizer=tokenizer))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    )
    source = Source(adapted, tokenizer=tokenizer)
    switched_on = fingerprint(source)
    with adapted.disable_adapter():
        switched_off = fingerprint(source)
    assert len({plain, switched_on, switched_off}) == 3
    assert fingerprint(source) == switched_on
    assert load_backbone(source).anatomy.n_layers == 2


def test_a_model_passed_in_is_used_as_it_is(model, tokenizer):
    model.train().to(torch.bfloat16)
    backbone = load_backbone(Source(model, tokenizer=tokenizer))
    assert backbone.model is model and backbone.tokenizer is tokenizer
    assert backbone.dtype == "bfloat16" and str(backbone.device) == "cpu"
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_passed_in_is_not_kept(tokenizer):
    model = BertModel(BertConfig(**CONFIG))
    load_backbone(Source(model, tokenizer=tokenizer))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_model_passed_in_is_not_moved(model, tokenizer):
    source = Source(model, tokenizer=tokenizer)
    assert resolve_placement(source) == ("cpu", "float32")
    assert resolve_placement(source, "cpu", "float32") == ("cpu", "float32")
    with pytest.raises(ValueError, match="dtype='bfloat16'.*'float32' and stays so"):
        load_backbone(source, dtype="bfloat16")
    with pytest.raises(ValueError, match="device='meta'.*'cpu' and stays there"):
        load_backbone(source, device="meta")


def test_a_model_without_weights_is_refused(tokenizer):
    with torch.device("meta"):
        empty = BertModel(BertConfig(**CONFIG))
    with pytest.raises(ValueError, match="not in memory"):
        fingerprint(Source(empty, tokenizer=tokenizer))


# What can't be a model


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda model: Source(3), TypeError, "model is a int"),
        (lambda model: Source(model), ValueError, "Pass tokenizer="),
        (
            lambda model: Source("a", model_kwargs={"torch_dtype": "auto"}),
            ValueError,
            "parameter dtype=",
        ),
        (
            lambda model: Source("a", model_kwargs={"revision": "b"}),
            ValueError,
            "parameter revision=",
        ),
    ],
)
def test_a_source_names_a_model(model, make, error, says):
    with pytest.raises(error, match=says):
        make(model)


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder", "/no/such/folder", "a b"])
def test_a_model_that_is_nowhere_is_named_at_once(name):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"'{name}'.* neither a folder nor"):
        load_backbone(Source(name))
    assert time.perf_counter() - started < 5


def test_what_to_do_offline_is_said():
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set.*hf download nobody/nothing"):
        fingerprint(Source("nobody/nothing"))


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that takes calls and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("skspin._extraction.source._HUB_SECONDS", 0.2)
        yield


def test_a_model_in_the_cache_needs_no_hub(cache, silent_hub):
    started = time.perf_counter()
    backbone = load_backbone(Source("org/tiny", model_kwargs=cache))
    assert backbone.fingerprint == f"hub:org/tiny@{COMMIT}"
    assert len(backbone.tokenizer) > 30_000
    assert read_anatomy(Source("org/tiny", model_kwargs=cache)).n_layers == 2
    assert time.perf_counter() - started < 30
    forget_models()


def test_a_hub_that_does_not_answer_is_said(silent_hub):
    with pytest.raises(ValueError, match="'nobody/nothing'.*the hub can't be reached .ReadTimeout"):
        load_backbone(Source("nobody/nothing"))


def test_a_model_in_the_cache_loads_offline(cache):
    backbone = load_backbone(Source("org/tiny", model_kwargs=cache))
    assert backbone.model.config.hidden_size == 8
    with pytest.raises(ValueError, match="'org/tiny' at revision='v2'.*HF_HUB_OFFLINE is set"):
        load_backbone(Source("org/tiny", revision="v2", model_kwargs=cache))
    forget_models()


def test_pickled_weights_are_refused_unless_they_are_asked_for(folder):
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled.*model_kwargs={'use_safetensors': False}"):
        load_backbone(Source(folder))
    trusted = Source(folder, model_kwargs={"use_safetensors": False})
    torch.testing.assert_close(
        dict(load_backbone(trusted).model.state_dict()), dict(model.state_dict())
    )
    before = fingerprint(trusted)
    torch.save({}, folder / "pytorch_model.bin")
    assert fingerprint(trusted) != before


def test_weights_that_are_missing_are_not_made_up(folder):
    deeper = BertConfig(**CONFIG | {"num_hidden_layers": 3})
    deeper.save_pretrained(folder)
    with pytest.raises(ValueError, match="lack 16 of the model's parameters"):
        load_backbone(Source(folder))


def test_a_head_is_left_out_and_a_pooler_is_not_missed(tmp_path, tokenizer):
    head = BertForMaskedLM(BertConfig(**CONFIG))
    head.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(load_backbone(Source(tmp_path)).model) is BertModel
    forget_models()


@pytest.mark.parametrize("config", [BertConfig, LlamaConfig, T5Config])
def test_a_folder_without_a_tokenizer_asks_for_one(tmp_path, config):
    AutoModel.from_config(config(**CONFIG)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer. Pass tokenizer="):
        load_backbone(Source(tmp_path))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.*has no config.json"):
        load_backbone(Source(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter.*peft"):
        read_anatomy(Source(tmp_path))


def test_damaged_weights_are_an_error_that_names_them(folder):
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=f"weights of '{folder}' can't be loaded"):
        load_backbone(Source(folder))


# Configuration alone


@pytest.mark.parametrize("sharded", [False, True])
def test_widths_are_read_without_weights(folder, model, sharded):
    if sharded:
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="2KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert load_backbone(Source(folder)).anatomy.n_layers == 2
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    anatomy = read_anatomy(Source(folder))
    stack = anatomy.stacks[None]
    assert anatomy.n_layers == 2
    assert stack.width(2, "hidden") == 8 and stack.width(1, "mlp") == 12


# Loading in silence


def test_loading_says_nothing_and_changes_no_setting(folder, capfd):
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load_backbone(Source(folder))
        read_anatomy(Source(folder))
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


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
