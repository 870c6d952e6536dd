"""A pipeline as a torch module: the same decision values, without what they do not need."""

import copy
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler
from sklearn.svm import LinearSVC
from tiny_models import TINY, tiny_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers.models.bert.modeling_bert import BertLayer

from skspin import (
    LLMActivationTransformer,
    ModelMismatchError,
    SalientNeuronSelector,
    make_spin_pipeline,
    prune,
    to_torch,
)
from skspin._model import Recipe, Source, fingerprint, text_encoder
from skspin.datasets import demo_model, load_docstrings

SITES = ("hidden", "mlp", "attention")
POOLINGS = ("mean", "max", "first", "last")
# What can be cut, one of a kind; "decoder" says which half of a model is read.
ENCODERS = ("bert", "roberta", "deberta-v2", "modernbert")
DECODERS = ("gpt2", "gpt-neox", "opt-350m", "falcon", "llama", "gemma2")
ARCHITECTURES = {
    **{name: {} for name in ENCODERS + DECODERS},
    "t5": {"stack": "encoder"},
    "flan-t5": {"stack": ("encoder", "decoder")},
    "bart": {"stack": "decoder"},
}
# 1e-4, where a decision value is no larger than some units.
close = {"rtol": 1e-4, "atol": 1e-4}


def tiny_texts(n_texts=60):
    """Write texts of words that the tiny tokenizer knows, and say which of two kinds each is."""
    random = np.random.RandomState(0)
    kinds = np.arange(n_texts) % 2
    lengths = random.randint(1, 12, n_texts)
    return [
        " ".join(f"word{28 * kind + random.randint(28)}" for _ in range(length))
        for kind, length in zip(kinds, lengths, strict=True)
    ], kinds


def inputs_of(pipeline, texts):
    """Tokenize as a pipeline does; windows are tested where they are exported."""
    step = pipeline[0]
    source = Source(step.model, tokenizer=step.tokenizer)
    options = {name: getattr(step, name) for name in ("prompt", "max_length", "pool_over")}
    recipe = Recipe(source, fingerprint(source), dtype=step.dtype, **options)
    rows = []
    for (window,), _ in text_encoder(recipe).encode(texts):
        ones = np.ones(len(window), int)
        pooled = ones if window.pooled is None else window.pooled
        rows.append({**window.inputs, "attention_mask": ones, "pooled": pooled})
    return {
        name: pad_sequence([torch.as_tensor(row[name]).long() for row in rows], batch_first=True)
        for name in rows[0]
    }


def run(module, pipeline, texts):
    with torch.no_grad():
        return module(**inputs_of(pipeline, texts)).numpy()


def tiny_pipeline(name, head=None, layers=None, **params):
    model = TINY[name].build()
    step = LLMActivationTransformer(
        model, tokenizer=tiny_tokenizer(), pooling=POOLINGS, layers=layers, **params
    )
    head = LogisticRegression() if head is None else head
    return make_pipeline(step, SalientNeuronSelector(C=1.0), StandardScaler(), head)


def demo_pipeline(head=None, max_layer=3, **params):
    params = {"dtype": "float32"} | params
    return make_spin_pipeline(demo_model(), head=head, **params).set_params(
        select__max_layer=max_layer, select__C=0.3, select__tol=1e-2
    )


@pytest.fixture(scope="module")
def data():
    # Neurons that vary little make much of rounding, and vary less in texts that are alike.
    docstrings = load_docstrings(n_per_class=24)
    texts = [text[:200] for text in docstrings.data]
    return texts[:80], [*texts[80:], "", "so " * 30], docstrings.target[:80]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_decision_values_of_its_pipeline(name):
    texts, kinds = tiny_texts()
    params = {"site": SITES, "pool_over": "text"} | ARCHITECTURES[name]
    spin = tiny_pipeline(name, layers=[0, 1, 2], **params).fit(texts, kinds)
    expected = spin.decision_function(texts)
    for pipeline in (spin, prune(spin)):
        np.testing.assert_allclose(run(to_torch(pipeline), spin, texts), expected, **close)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("site", SITES)
def test_wherever_the_deepest_neurons_are(site, name):
    texts, kinds = tiny_texts()
    for layer in (1, 2, 3):
        spin = tiny_pipeline(name, site=site, layers=layer).fit(texts, kinds)
        expected = spin.decision_function(texts)
        np.testing.assert_allclose(run(to_torch(spin), spin, texts), expected, **close)


@pytest.mark.parametrize(
    "params",
    [
        {"site": SITES},
        {"prompt": "Review: {text} It is", "max_length": 24},
        {"pool_over": "text", "prompt": "{text} Good?"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.* texts are longer than max_length:UserWarning")
def test_labels_and_decision_values_are_those_of_the_pipeline(data, params):
    train, test, y = data
    spin = demo_pipeline(**params).fit(train, y)
    expected = spin.decision_function(test)
    for pipeline in (spin, prune(spin)):
        values = run(to_torch(pipeline), spin, test)
        np.testing.assert_allclose(values, expected, **close)
        np.testing.assert_array_equal(spin.classes_[values.argmax(axis=1)], spin.predict(test))


HEADS = {
    "logistic": LogisticRegression(),
    "l1": LinearSVC(penalty="l1", C=0.1, random_state=0),
    "ridge behind PCA": make_pipeline(MinMaxScaler(), PCA(5), RidgeClassifier()),
    "members": OneVsRestClassifier(make_pipeline(StandardScaler(), LogisticRegression())),
}


@pytest.mark.parametrize("name", HEADS)
def test_linear_heads_have_the_shape_of_their_decision_function(data, name):
    train, test, y = data
    numbers = np.unique(y, return_inverse=True)[1]
    targets = [numbers % 2, numbers % 3]
    if name == "members":  # several labels at once
        targets.append(np.eye(5, dtype=int)[numbers][:, :3])
    for target in targets:
        spin = demo_pipeline(head=HEADS[name], max_layer=1).fit(train, target)
        values, expected = run(to_torch(spin), spin, test), spin.decision_function(test)
        assert values.shape == expected.shape
        np.testing.assert_allclose(values, expected, **close)


def test_blocks_after_the_deepest_and_unused_modules_are_gone(data, monkeypatch):
    train, test, y = data
    spin = demo_pipeline(site="mlp", max_layer=2).fit(train, y)
    module = to_torch(spin)
    left = [part for part in module.modules() if isinstance(part, BertLayer)]
    assert len(left) == 2
    shapes = {tuple(weight.shape) for weight in left[1].parameters()}
    assert (1536, 384) in shapes and (384, 1536) not in shapes  # up, and never down again
    ran, forward = [], BertLayer.forward

    def counted(block, *args, **kwargs):
        ran.append(block)
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(BertLayer, "forward", counted)
    run(module, spin, test[:2])
    assert ran == left


def test_the_model_of_the_pipeline_stays_as_it_was():
    texts, kinds = tiny_texts()
    spin = tiny_pipeline("llama", site=SITES, layers=[0, 1]).fit(texts, kinds)
    model = spin[0].model.train()
    state = [*model.parameters(), *model.buffers()]
    before = [(tensor.data_ptr(), tensor._version) for tensor in state]
    parts, expected = list(model.modules()), spin.decision_function(texts)
    module = to_torch(spin)
    assert parts == list(model.modules()) and model.training and not module.training
    assert [(tensor.data_ptr(), tensor._version) for tensor in state] == before
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in parts)
    assert all(weight.requires_grad for weight in model.parameters())
    with torch.no_grad():  # and the copy stays as it was
        for weight in model.parameters():
            weight.zero_()
    np.testing.assert_allclose(run(module, spin, texts), expected, **close)


def test_the_module_computes_in_float32_whatever_the_pipeline_does(data):
    train, test, y = data
    spin = demo_pipeline(dtype="bfloat16").fit(train, y)
    module = to_torch(spin)
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    agree = run(module, spin, test).argmax(axis=1) == spin.predict(test)
    assert agree.mean() > 0.9


def test_threads_copies_and_files_give_what_the_module_gives():
    texts, kinds = tiny_texts()
    spin = tiny_pipeline("bert", site=SITES).fit(texts, kinds)
    module, file = to_torch(spin), io.BytesIO()
    texts = texts[:20]
    alone = [run(module, spin, [text]) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: run(module, spin, [text]), texts))
    np.testing.assert_allclose(together, alone, **close)
    expected = run(module, spin, texts)
    torch.save(module, file)
    file.seek(0)
    twins = [copy.deepcopy(module), torch.load(file, weights_only=False)]
    for weight in module.parameters():
        weight.zero_()
    for twin in twins:
        np.testing.assert_array_equal(run(twin, spin, texts), expected)


def compiled(module, args, shapes):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile writes C++, and there is no compiler")
    return torch.compile(module, fullgraph=True, dynamic=True)


def traced_whole(module, args, shapes):
    return torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")


def exported(module, args, shapes):
    return torch.export.export(module, args, dynamic_shapes=shapes).module()


@pytest.mark.parametrize(
    ("name", "trace"),
    [("bert", compiled), ("llama", traced_whole), ("llama", exported)],
)
def test_it_is_compiled_and_exported_whole(name, trace):
    if (name, trace) == ("llama", traced_whole) and transformers.__version__.startswith("4."):
        pytest.skip("torch can't trace the masks of transformers 4")
    texts, kinds = tiny_texts()
    layers = [1, 2] if trace is exported else 1
    spin = tiny_pipeline(name, site="mlp", layers=layers).fit(texts, kinds)
    module = to_torch(spin)
    batches = [
        tuple(inputs_of(spin, texts[:n])[name] for name in ("input_ids", "attention_mask"))
        for n in (6, 3, 2)
    ]
    sizes = {axis: torch.export.Dim.DYNAMIC for axis in (0, 1)}
    traced = trace(module, batches[0], (sizes, sizes))
    for batch in batches:
        with torch.no_grad():
            torch.testing.assert_close(traced(*batch), module(*batch), **close)


def test_what_can_not_leave_is_refused_with_what_can(data):
    train, _, y = data
    forest = demo_pipeline(head=RandomForestClassifier(5), max_layer=1).fit(train, y)
    with pytest.raises(ValueError, match="RandomForestClassifier.*LogisticRegression, LinearSVC"):
        to_torch(forest)
    with pytest.raises(ValueError, match="begins with a TfidfVectorizer"):
        to_torch(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(train, y))
    spin = demo_pipeline(max_layer=1)
    ahead = make_pipeline(FunctionTransformer(lambda X: [text.lower() for text in X]), spin)
    with pytest.raises(ValueError, match=r"begins with a FunctionTransformer.*pipeline\[1:\]"):
        to_torch(ahead.fit(train, y))
    with pytest.raises(TypeError, match="to_torch takes a fitted Pipeline"):
        to_torch(LogisticRegression())


@pytest.mark.parametrize(
    ("name", "reason"),
    [("albert", "same blocks several times"), ("fnet", "padding"), ("xlm", "no modules")],
)
def test_a_model_that_can_not_be_cut_is_refused_with_the_reason(name, reason):
    texts, kinds = tiny_texts()
    spin = tiny_pipeline(name, layers=[1]).fit(texts, kinds)
    with pytest.raises(ValueError, match=reason):
        to_torch(spin)


def test_positions_that_a_long_text_scales_are_refused_if_a_text_may_be_so_long():
    texts, kinds = tiny_texts()
    spin = tiny_pipeline("phi3-128k", layers=[1], max_length=16).fit(texts, kinds)
    np.testing.assert_allclose(
        run(to_torch(spin), spin, texts), spin.decision_function(texts), **close
    )
    spin = spin.set_params(llmactivationtransformer__max_length=17).fit(texts, kinds)
    with pytest.raises(ValueError, match="max_length=17. Fit with max_length=16 or less"):
        to_torch(spin)


def test_other_weights_are_refused():
    texts, kinds = tiny_texts()
    spin = tiny_pipeline("bert").fit(texts, kinds)
    with torch.no_grad():
        spin[0].model.embeddings.word_embeddings.weight += 1
    with pytest.raises(ModelMismatchError):
        to_torch(spin)
