"""What can't be a model, what is read of one that can, and what is fetched from the hub."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from bert_files import COMMIT, SIZES, save
from huggingface_hub import constants, file_download
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel, LlamaConfig, T5Config
from transformers.utils import logging

from skspin import LLMActivationTransformer
from skspin._model.files import Source
from skspin._model.fingerprint import fingerprint
from skspin._model.registry import forget_models, load_backbone, read_anatomy

# What can't be a model


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda model: Source(3), TypeError, "model is a int"),
        (lambda model: Source(model), ValueError, "Pass tokenizer="),
        (lambda model: Source(model.encoder, "a"), TypeError, "BertEncoder.*pass the whole model"),
        (lambda model: Source("a", model_kwargs={1: 2}), ValueError, "names that are no str"),
        *[
            (lambda model, name=name: Source("a", model_kwargs={name: "b"}), ValueError, says)
            for name, says in {
                "torch_dtype": "parameter dtype=",
                "revision": "parameter revision=",
                "device": "parameter device=",
                "config": "config='b', but it must be a configuration",
                "output_loading_info": "'output_loading_info'.*Leave it out",
                "state_dict": "'state_dict'.*Leave it out",
            }.items()
        ],
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


def test_the_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    source = Source("~/tiny", tokenizer="~/tiny")
    assert len(load_backbone(source).anatomy.stacks[None].blocks) == 2
    assert source == Source(folder, tokenizer=folder)


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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "lack 16 of the model's parameters.*random"),
        ({"intermediate_size": 9}, "lack 6.*or have them in another shape.*dense.*random"),
        ({"vocab_size": 31000}, "lack 1 .*word_embed.*random"),
    ],
)
def test_weights_that_do_not_fit_are_not_made_up(folder, changes, says):
    with pytest.raises(ValueError, match=says):
        load_backbone(Source(folder, model_kwargs=changes))
    BertConfig(**SIZES | changes).save_pretrained(folder)
    with pytest.raises(ValueError, match=says):
        load_backbone(Source(folder, model_kwargs={"ignore_mismatched_sizes": True}))


def test_a_head_is_left_out_and_a_pooler_is_not_missed(tmp_path, tokenizer):
    save(tmp_path, BertForMaskedLM(BertConfig(**SIZES)), tokenizer)
    assert type(load_backbone(Source(tmp_path)).model) is BertModel
    forget_models()


@pytest.mark.parametrize("config", [BertConfig, LlamaConfig, T5Config])
def test_a_folder_without_a_tokenizer_asks_for_one(tmp_path, config):
    save(tmp_path, AutoModel.from_config(config(**SIZES)))
    with pytest.raises(ValueError, match="has no tokenizer. Pass tokenizer="):
        load_backbone(Source(tmp_path))


def test_a_folder_without_a_whole_model_is_named(folder):
    (folder / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=f"weights of '{folder}' can't be loaded"):
        load_backbone(Source(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{folder}.*has no config.json"):
        load_backbone(Source(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter.*peft"):
        read_anatomy(Source(folder))


# Configuration alone, in silence


def test_weights_may_be_in_several_files_and_widths_are_read_without_them(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert len(load_backbone(Source(folder)).anatomy.stacks[None].blocks) == 2
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    stack = read_anatomy(Source(folder)).stacks[None]
    assert len(stack.blocks) == 2
    assert stack.tap(2, "hidden").width == 8 and stack.tap(1, "mlp").width == 12


@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 1},
        {"config": BertConfig(**SIZES | {"num_hidden_layers": 1})},
        {"hidden_act": "relu", "return_dict": False},
        {"add_pooling_layer": False, "attn_implementation": "eager"},
    ],
)
def test_options_mean_what_they_mean_to_from_pretrained(folder, tokenizer, options):
    model = AutoModel.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        inputs = tokenizer("A fine film.", return_tensors="pt")
        output = model(**inputs, output_hidden_states=True, return_dict=True)
    expected = torch.cat([state[0].mean(0) for state in output.hidden_states])
    transformer = LLMActivationTransformer(folder, dtype="float32", model_kwargs=options)
    X = transformer.fit(["A fine film."]).transform(["A fine film."])
    assert transformer.n_layers_ == model.config.num_hidden_layers
    np.testing.assert_allclose(X[0], expected, atol=1e-6)
    assert transformer.model_fingerprint_ != fingerprint(Source(folder))


class Pooled(torch.nn.Sequential):
    """What sentence_transformers wraps a model in."""

    tokenizer = property(lambda self: self[0].tokenizer)
    max_seq_length = property(lambda self: self[0].max_seq_length)


@pytest.mark.parametrize("of", ["all", "its first module", "the library"])
@pytest.mark.filterwarnings("ignore:.*truncated:UserWarning")
def test_of_a_sentence_transformer_the_language_model_is_taken(folder, tokenizer, of):
    model = AutoModel.from_pretrained(folder)
    first = torch.nn.Identity()
    first.auto_model, first.tokenizer, first.max_seq_length = model, tokenizer, 8
    wrapped = first if of == "its first module" else Pooled(first, torch.nn.Identity())
    if of == "the library":
        wrapped = pytest.importorskip("sentence_transformers").SentenceTransformer(
            str(folder), device="cpu"
        )
        wrapped.max_seq_length = 8
    texts = ["a b c d e f g h i j", "a"]
    X = LLMActivationTransformer(wrapped, cache=None).fit_transform(texts)
    plain = LLMActivationTransformer(model, tokenizer=tokenizer, cache=None, max_length=8)
    np.testing.assert_array_equal(X, plain.fit_transform(texts))
    shorter = LLMActivationTransformer(wrapped, cache=None, max_length=5).fit_transform(texts)
    assert not np.array_equal(shorter, X)
    given = Source(wrapped, tokenizer="words")
    assert given.tokenizer == "words" and not isinstance(given.model, torch.nn.Sequential)


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
def serve(folder):
    """Serve a folder as the model org/tiny; yield the hub's address and the files it has given."""
    given = []
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    tree = [
        {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
        for name, content in files.items()
    ]
    model = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):  # noqa: N802
            name = self.path.partition(f"/resolve/{COMMIT}/")[2]
            if name not in files and name:
                self.send_error(404)
                return
            body = files.get(name, json.dumps(tree if "/tree/" in self.path else model).encode())
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                given.extend([name] if name else [])

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", given
        finally:
            server.shutdown()


@contextmanager
def silent():
    """Yield the address of a hub that takes calls and never answers, and its socket."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", listening


@pytest.fixture
def connect(monkeypatch, new_process):
    """Have this process ask another hub."""

    def to(url):
        new_process()
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # older versions hold a copy
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
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
        assert fingerprint(source) == f"hub:org/tiny@{source.commit}" == f"hub:org/tiny@{COMMIT}"
        assert len(read_anatomy(source).stacks[None].blocks) == 2
        assert served == ["config.json"]
        loaded = load_backbone(source).model.state_dict()
        torch.testing.assert_close(dict(loaded), dict(model.state_dict()))
        forget_models()
        load_backbone(source)
        assert served[:2] == ["config.json", "model.safetensors"]
        all_but_the_pickle = {path.name for path in folder.glob("*.[jst]*")}
        assert sorted(served) == sorted(all_but_the_pickle)
    forget_models()
    connect(url)  # which is gone
    assert load_backbone(source).fingerprint == f"hub:org/tiny@{COMMIT}"
    forget_models()


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_hub_that_does_not_answer_is_missed_only_where_the_cache_lacks_a_model(
    cache, connect, revision
):
    source = Source("org/tiny", revision=revision, model_kwargs=cache)
    with silent() as (url, listening):
        connect(url)
        started = time.perf_counter()
        backbone = load_backbone(source)
        assert backbone.fingerprint == f"hub:org/tiny@{COMMIT}"
        assert len(backbone.tokenizer) > 30_000
        assert len(read_anatomy(source).stacks[None].blocks) == 2
        assert time.perf_counter() - started < 10
        listening.setblocking(False)
        if revision == COMMIT:  # which never changes
            with pytest.raises(BlockingIOError):  # nobody has called
                listening.accept()
        missing = ("nobody/nothing", None) if revision is None else ("org/tiny", "9" * 40)
        with pytest.raises(ValueError, match=f"'{missing[0]}'.*reached .ReadTime"):
            load_backbone(Source(missing[0], revision=missing[1], model_kwargs=cache))
    forget_models()


def test_a_model_in_the_cache_loads_offline(cache):
    backbone = load_backbone(Source("org/tiny", model_kwargs=cache))
    assert backbone.model.config.hidden_size == 8
    with pytest.raises(ValueError, match="'org/tiny' at revision='v2'.*HF_HUB_OFFLINE is set"):
        load_backbone(Source("org/tiny", revision="v2", model_kwargs=cache))
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set.*hf download nobody/nothing"):
        fingerprint(Source("nobody/nothing"))
    forget_models()
