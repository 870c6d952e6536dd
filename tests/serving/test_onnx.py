"""A pipeline as an ONNX folder: the same labels, by what the folder alone says of itself."""

import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from growing_texts import words
from reviews import reviews
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_models import TINY, tiny_tokenizer
from tokenizers import processors

from skspin import (
    LLMActivationTransformer,
    SalientNeuronSelector,
    export_onnx,
    make_spin_pipeline,
    prune,
)
from skspin.datasets import demo_model

GUIDE = Path(__file__).parents[2] / "docs/user_guide"
N_TEXTS = 60
POOLINGS = ("mean", "max", "first", "last")
# Left out of a small image; nothing of it may be imported.
ABSENT = ("skspin", "sklearn", "torch", "transformers", "scipy", "pandas", "onnx")
close = {"rtol": 1e-4, "atol": 1e-4}


def write_texts():
    random = np.random.RandomState(0)
    lengths = random.randint(1, 14, N_TEXTS)
    kinds = np.arange(N_TEXTS) % 3
    texts = [
        " ".join(f"word{18 * kind + random.randint(18)}" for _ in range(length))
        for kind, length in zip(kinds, lengths, strict=True)
    ]
    return texts, kinds


TEXTS, KINDS = write_texts()
NEW = ["word3", "word5 word40 word33 " * 9, " ", "word1 word2 unheard \ud800 of", *TEXTS[:20]]
SEVERAL = np.stack([KINDS == 0, KINDS > 0], axis=1).astype(int)
LONG = pytest.mark.filterwarnings("ignore:.* longer than max_length")


def fitted(name, y, head, tokenizer=None, **params):
    model = TINY[name].build()
    tokenizer = tokenizer or tiny_tokenizer()
    step = LLMActivationTransformer(model, tokenizer=tokenizer, pooling=POOLINGS, **params)
    several = y.ndim == 2 and y.max() > 1  # which a selector does not take
    select = "passthrough" if several else SalientNeuronSelector(C=1.0)
    return make_pipeline(step, select, StandardScaler(), head).fit(TEXTS, y)


def bare_tokenizer():
    """Make one that adds no special tokens, and cuts off a text's beginning."""
    tokenizer = words()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    tokenizer.truncation_side = "left"
    return tokenizer


# An export takes some ten seconds, so each of these tries several things.
PIPELINES = {
    "multilabel, prompt, cut off at the beginning": (
        *("gpt2", SEVERAL, OneVsRestClassifier(LogisticRegression())),
        {"tokenizer": bare_tokenizer(), "layers": [1], "max_length": 10, "prompt": "word1 {text}"},
    ),
    "several outputs, windows": (
        *("bert", np.stack([KINDS, KINDS % 2], axis=1), MultiOutputClassifier(RidgeClassifier())),
        {"long_texts": "windows", "max_length": 7, "overlap": 3, "layers": [1, 2]},
    ),
    "binary, prompt, causal windows": (
        *("llama", np.array(["no", "yes"])[KINDS % 2], LogisticRegression()),
        {"prompt": "word1 {text} word2", "max_length": 8, "pool_over": "text", "layers": [1, 2]}
        | {"long_texts": "windows", "overlap": 1, "site": ("mlp", "attention")},
    ),
}


CARDS = {
    "multilabel, prompt, cut off at the beginning": (
        "Labels: 2 at once, each 0 or 1. - Decision values: one for each label; above 0 means 1."
    ),
    "several outputs, windows": "Labels: 2 at once: one of `0`, `1`, `2`; one of `0`, `1`.",
    "binary, prompt, causal windows": "Labels: `no`, `yes`. - Decision values: above 0 for `yes`.",
}


def run_card(folder, texts, model="model.onnx"):
    """Run the code of a model card where skspin and all that it needs can't be imported."""
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import .*?)```", card, re.DOTALL)
    begin = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    end = f"""
classifier = type(classifier)(".", {model!r})
texts = json.loads({json.dumps(texts)!r})
values = [classifier.decision_function(part) for part in (texts[:1], texts[1:3], texts[3:])]
labels = [classifier.predict(texts[start : start + 32]) for start in range(0, len(texts), 32)]
print(json.dumps([sum(labels, []), np.concatenate(values).tolist()]))
"""
    run = subprocess.run(
        [sys.executable, "-c", begin + code + end], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    labels, values = json.loads(run.stdout.splitlines()[-1])
    return np.array(labels), np.array(values)


def decisions(spin, texts):
    if hasattr(spin, "decision_function"):
        return spin.decision_function(texts)
    columns = spin[:-1].transform(texts)
    return np.column_stack([member.decision_function(columns) for member in spin[-1].estimators_])


@LONG
@pytest.mark.parametrize("name", PIPELINES)
def test_the_code_in_the_card_gives_the_labels_and_decision_values(name, tmp_path):
    model, y, head, params = PIPELINES[name]
    spin = fitted(model, y, head, **params)
    report = export_onnx(prune(spin) if "binary" in name else spin, tmp_path / "model")
    assert report.difference < 1e-4 and report.n_changed is None and report.n_texts > 4
    labels, values = run_card(report.folder, NEW)
    np.testing.assert_allclose(values, decisions(spin, NEW), **close)
    np.testing.assert_array_equal(labels, spin.predict(NEW))
    assert CARDS[name] in " ".join((report.folder / "README.md").read_text().split())


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory):
    """Export the demo model once, with all that can be asked for."""
    texts, kinds = reviews(40)
    names = np.array(["film", "restaurant", "hotel"])[kinds]
    spin = make_spin_pipeline(demo_model(), dtype="float32").set_params(
        select__max_layer=2, select__C=0.3, select__tol=1e-2, classify__C=0.1
    )
    spin.fit(texts[:100], names[:100])
    folder = tmp_path_factory.mktemp("onnx") / "model"
    report = export_onnx(spin, folder, texts=texts, score={"accuracy": 0.75}, quantize="int8")
    return spin, texts, report


def test_a_real_model_and_its_8_bits_run_by_themselves(reviewed):
    spin, texts, report = reviewed
    labels, values = run_card(report.folder, texts)
    np.testing.assert_allclose(values, spin.decision_function(texts), **close)
    np.testing.assert_array_equal(labels, spin.predict(texts))
    short, _ = run_card(report.folder, texts, "model.int8.onnx")
    assert report.n_changed == (short != labels).sum() < 0.1 * len(texts)
    assert report.n_texts == len(texts)
    sizes = {path.name: path.stat().st_size for path in report.folder.iterdir()}
    assert sorted(sizes) == [
        *("README.md", "labels.json", "model.int8.onnx", "model.onnx", "tokenizer.json")
    ]
    assert sizes["model.int8.onnx"] < 0.3 * sizes["model.onnx"]
    graph = onnx.load(report.folder / "model.int8.onnx").graph
    head = [weights for weights in graph.initializer if "head.weight" in weights.name]
    assert [weights.data_type for weights in head] == [onnx.TensorProto.FLOAT]


def test_the_folder_says_what_it_is(reviewed):
    spin, texts, report = reviewed
    labels = json.loads((report.folder / "labels.json").read_text())
    assert labels["classes"] == ["film", "hotel", "restaurant"]
    assert labels["fingerprint"] == spin[0].model_fingerprint_
    assert labels["max_length"] == 512 and labels["pooling"] == ["mean", "max"]
    assert labels["inputs"]["attention_mask"] == ["n_texts", "n_tokens"]
    card = (report.folder / "README.md").read_text()
    for fact in (
        "the first 2 of 6 blocks",
        "Training texts: 100.",
        f"Sparsity: {spin['select'].sparsity_:.2%}",
        "accuracy: 0.75.",
        "LogisticRegression(C=0.1, max_iter=1000)",
        f"gives {report.n_changed} of these 120 texts another label",
    ):
        assert fact in " ".join(card.split())
    assert str(demo_model()) not in card + json.dumps(labels)


def open_service(name, folder, monkeypatch):
    monkeypatch.setenv("SPIN", str(folder))
    spec = importlib.util.spec_from_file_location(name, GUIDE / f"{name}.py")
    service = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(service)
    return service


@LONG
def test_a_tokenizer_that_adds_no_tokens_is_served_too(tmp_path, monkeypatch):
    tokenizer = bare_tokenizer()
    tokenizer.truncation_side, tokenizer.split_special_tokens = "right", True
    spin = fitted("gpt2", KINDS, LogisticRegression(), tokenizer, layers=[1], max_length=8)
    report = export_onnx(spin, tmp_path / "model")
    service = open_service("serve_onnx", report.folder, monkeypatch)
    texts = ["", "word1", "word20 " * 30, "word40 </s> word41"]
    for asked in (texts, texts[:1]):
        assert service.labels(asked) == spin.predict(asked).tolist()
    _, values = run_card(report.folder, texts)
    np.testing.assert_allclose(values, spin.decision_function(texts), **close)


def test_an_empty_text_within_a_token_is_read_as_the_pipeline_reads_it(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["()"])
    step = LLMActivationTransformer(
        TINY["bert"].build(vocab_size=len(tokenizer)),
        tokenizer=tokenizer,
        layers=[1],
        prompt="word1 ({text}) word2",
        pool_over="text",
    )
    spin = make_pipeline(step, StandardScaler(), LogisticRegression()).fit(TEXTS, KINDS)
    texts = ["", "word3", "", "word20 word21", ""]
    _, values = run_card(export_onnx(spin, tmp_path / "model").folder, texts)
    np.testing.assert_allclose(values, spin.decision_function(texts), **close)


@LONG
@pytest.mark.filterwarnings("ignore:The anyio:DeprecationWarning")  # old releases of starlette
@pytest.mark.parametrize("name", ["serve_onnx", "serve_pipeline"])
def test_the_services_of_the_guide_answer_as_the_pipeline(name, reviewed, tmp_path, monkeypatch):
    import skops.io
    from fastapi.testclient import TestClient

    spin, texts, report = reviewed
    skops.io.dump(prune(spin), tmp_path / "spin.skops")
    served = report.folder if name == "serve_onnx" else tmp_path / "spin.skops"
    client = TestClient(open_service(name, served, monkeypatch).app)
    asked = [texts[:1], texts[1:30], ["", "word " * 600]]
    for request in asked:
        answer = client.post("/labels", json=request)
        assert answer.status_code == 200
        assert answer.json() == spin.predict(request).tolist()
    for request in ([], ["a"] * 65, [1], "text"):
        assert client.post("/labels", json=request).status_code == 422


@pytest.fixture(scope="module")
def small():
    return fitted("gpt2", KINDS > 0, LogisticRegression(), layers=[1])


def test_nothing_is_left_behind_when_the_check_fails(small, tmp_path, monkeypatch):
    monkeypatch.setattr("skspin._serving.export._TOLERANCE", -1)
    with pytest.raises(RuntimeError, match="the text 'A fine film.*differs.*Nothing was left"):
        export_onnx(small, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_keeps_its_mode_whatever_its_name(
    small, tmp_path, monkeypatch
):
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o700)
    monkeypatch.chdir(empty)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in (".", tmp_path / "link"):
        assert (export_onnx(small, name).folder / "model.onnx").exists()
    assert empty.stat().st_mode & 0o777 == 0o700 and (tmp_path / "new").is_dir()
    names = ["README.md", "labels.json", "model.onnx", "tokenizer.json"]
    assert sorted(path.name for path in empty.iterdir()) == names


def test_the_card_shows_a_score_with_four_digits(small, tmp_path):
    scores = {"f1": np.float32(0.85), "texts": 12345}
    card = (export_onnx(small, tmp_path / "model", score=scores).folder / "README.md").read_text()
    assert "- f1: 0.85.\n- texts: 12345." in card


def test_a_model_that_torch_can_not_trace_is_named(tmp_path, capsys):
    spin = fitted("bert", KINDS > 0, LogisticRegression(), layers=[1])
    embeddings = spin[0].model.embeddings
    forward = embeddings.forward

    def undecided(input_ids, **others):
        return forward(input_ids=input_ids, **others) * (2 if input_ids.max() < 0 else 1)

    embeddings.forward = undecided
    with pytest.raises(ValueError, match=r"torch 2.* can't export BertModel of transformers \d"):
        export_onnx(spin, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_what_can_not_be_written_is_refused_at_once(small, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    half = fitted("gpt2", KINDS > 0, LogisticRegression(), layers=[1])
    half[0].model.to(torch.bfloat16)
    half.fit(TEXTS, KINDS > 0)
    said = {"texts": [[{"role": "user", "content": "word1"}]]}
    for error, message, pipeline, folder, options in [
        (FileExistsError, "full' is there already", small, "full", {}),
        (FileNotFoundError, "which is no folder. Make that first", small, "a/b", {}),
        (ValueError, "quantize='int4' must be None or 'int8'", small, "new", {"quantize": "int4"}),
        (ValueError, "counted on your texts. Pass texts=", small, "new", {"quantize": "int8"}),
        (TypeError, "score is a str", small, "new", {"score": "good"}),
        (TypeError, "score is a dict", small, "new", {"score": {"f1": "good"}}),
        (TypeError, "export_onnx takes a fitted Pipeline", small[-1], "new", {}),
        (ValueError, "conversations, which need the tokenizer's chat", small, "new", said),
        (ValueError, r"in memory is in bfloat16.*model.float\(\)", half, "new", {}),
    ]:
        with pytest.raises(error, match=message):
            export_onnx(pipeline, tmp_path / folder, **options)
    with pytest.raises(TypeError, match="folder=None must be a str or path"):
        export_onnx(small, None)
    for wrong in (np.array(["2020", "2021"], "M8[ns]"), np.array(["a", "b\ud800"], object)):
        spin = fitted("gpt2", wrong[KINDS % 2], LogisticRegression(), layers=[1])
        with pytest.raises(ValueError, match="y has the label .* labels that can be written are"):
            export_onnx(spin, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=f"is to be in '{Path.home()}"):
        export_onnx(small, "~/no such folder/model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'needs onnxscript, .* pip install "skspin\[onnx\]"'):
        export_onnx(small, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
