"""What can't be a model, what is read of one that can, and what is fetched from the hub."""

import socket
import time
from contextlib import contextmanager

import pytest
import torch
from bert_files import COMMIT, CONFIG, save
from huggingface_hub import constants
from small_hub import serve
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel, LlamaConfig, T5Config
from transformers.utils import logging

from skspin._model.files import Source
from skspin._model.fingerprint import fingerprint
from skspin._model.registry import forget_models, load_backbone, read_anatomy

# What can't be a model


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda model: Source(3), TypeError, "model is a int"),
        (lambda model: Source(model), ValueError, "Pass tokenizer="),
        (lambda model: Source("a", model_kwargs={1: 2}), ValueError, "names that are no str"),
        (lambda model: Source("a", model_kwargs={"torch_dtype": 0}), ValueError, "parameter dtype"),
        (lambda model: Source("a", model_kwargs={"revision": 0}), ValueError, "parameter revision"),
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


def test_pickled_weights_are_refused_unless_they_are_asked_for(folder):
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled.*model_kwargs={'use_safetensors': False}"):
        load_backbone(Source(folder))
    trusted = Source(folder, model_kwargs={"use_safetensors": False})
    loaded = load_backbone(trusted).model.state_dict()
    torch.testing.assert_close(dict(loaded), dict(model.state_dict()))
    before = fingerprint(trusted)
    torch.save({}, folder / "pytorch_model.bin")
    assert fingerprint(trusted) != before


def test_weights_that_are_missing_are_not_made_up(folder):
    BertConfig(**CONFIG | {"num_hidden_layers": 3}).save_pretrained(folder)
    with pytest.raises(ValueError, match="lack 16 of the model's parameters"):
        load_backbone(Source(folder))


def test_a_head_is_left_out_and_a_pooler_is_not_missed(tmp_path, tokenizer):
    save(tmp_path, BertForMaskedLM(BertConfig(**CONFIG)), tokenizer)
    assert type(load_backbone(Source(tmp_path)).model) is BertModel
    forget_models()


@pytest.mark.parametrize("config", [BertConfig, LlamaConfig, T5Config])
def test_a_folder_without_a_tokenizer_asks_for_one(tmp_path, config):
    save(tmp_path, AutoModel.from_config(config(**CONFIG)))
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


# Configuration alone, in silence


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


# The hub


@contextmanager
def silent():
    """Yield the address of a hub that takes calls and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def connect(monkeypatch, new_process):
    """Have this process ask another hub."""

    def to(url):
        new_process()
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("skspin._model.files._HUB_SECONDS", 0.2)

    return to


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_the_hub_gives_what_is_needed_when_it_is_needed(
    folder, model, tmp_path, connect, monkeypatch, revision
):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    save(folder / "onnx", model)
    source = Source("org/tiny", revision=revision, model_kwargs={"cache_dir": tmp_path / "hub"})
    with serve(folder) as (url, served):
        connect(url)
        assert fingerprint(source) == f"hub:org/tiny@{COMMIT}"
        assert read_anatomy(source).n_layers == 2
        assert served == ["config.json"]
        loaded = load_backbone(source).model.state_dict()
        torch.testing.assert_close(dict(loaded), dict(model.state_dict()))
        tokenizers = [name for name in served[2:] if name.startswith(("tokenizer", "special"))]
        assert served == ["config.json", "model.safetensors", *tokenizers] and tokenizers
        forget_models()
        load_backbone(source)
        assert len(served) == 2 + len(tokenizers)
    forget_models()
    connect(url)  # which is gone
    assert load_backbone(source).fingerprint == f"hub:org/tiny@{COMMIT}"
    forget_models()


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_model_in_the_cache_needs_no_hub(cache, connect, revision):
    source = Source("org/tiny", revision=revision, model_kwargs=cache)
    with silent() as url:
        connect(url)
        started = time.perf_counter()
        backbone = load_backbone(source)
        assert backbone.fingerprint == f"hub:org/tiny@{COMMIT}"
        assert len(backbone.tokenizer) > 30_000
        assert read_anatomy(source).n_layers == 2
        assert time.perf_counter() - started < 10
    forget_models()


@pytest.mark.parametrize("revision", [None, "9" * 40])
def test_a_hub_that_does_not_answer_is_said(cache, connect, revision):
    name = "nobody/nothing" if revision is None else "org/tiny"
    with silent() as url, pytest.raises(ValueError, match=f"'{name}'.*reached .ReadTime"):
        connect(url)
        load_backbone(Source(name, revision=revision, model_kwargs=cache))


def test_a_model_in_the_cache_loads_offline(cache):
    backbone = load_backbone(Source("org/tiny", model_kwargs=cache))
    assert backbone.model.config.hidden_size == 8
    with pytest.raises(ValueError, match="'org/tiny' at revision='v2'.*HF_HUB_OFFLINE is set"):
        load_backbone(Source("org/tiny", revision="v2", model_kwargs=cache))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set.*hf download nobody/nothing"):
        fingerprint(Source("nobody/nothing"))
    forget_models()
