"""What can't be a model, and what is read of one that can."""

import socket
import time

import pytest
import torch
from bert_files import COMMIT, CONFIG, as_hub_cache, save, tiny_bert
from huggingface_hub import constants
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    T5Config,
)
from transformers.utils import logging

from skspin._model.fingerprint import fingerprint
from skspin._model.registry import forget_models, load_backbone, read_anatomy
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
        monkeypatch.setattr("skspin._model.source._HUB_SECONDS", 0.2)
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
