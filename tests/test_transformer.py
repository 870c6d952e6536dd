"""What the transformer promises, on the real demo model and against output_hidden_states."""

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from bert_files import tiny
from sklearn.base import clone
from sklearn.pipeline import FeatureUnion
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from skspin import LLMActivationTransformer, ModelMismatchError
from skspin._layout import layout_of
from skspin._model.registry import forget_models
from skspin.datasets import demo_model

TEXTS = [
    "A fine film.",
    "Two hours that nobody will give me back, and not one line of dialogue worth remembering.",
    "",
    "naïve café 🤷 日本語",
    "A fine film.",
    "word " * 90,
]


@pytest.fixture(scope="module")
def reference():
    """Every layer's token-level hidden states of each text alone: the oracle."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = AutoModel.from_pretrained(demo_model(), dtype=torch.float32).eval()
    states = []
    with torch.inference_mode():
        for text in TEXTS:
            tokens = tokenizer(text, return_tensors="pt")
            hidden = model(**tokens, output_hidden_states=True).hidden_states
            states.append(torch.stack(hidden)[:, 0].numpy())  # (7, n_tokens, 384)
    return states


def transformer(**params):
    return LLMActivationTransformer(demo_model(), **{"dtype": "float32", "cache": None, **params})


POOL = {
    "mean": lambda tokens: tokens.mean(axis=0),
    "max": lambda tokens: tokens.max(axis=0),
    "first": lambda tokens: tokens[0],
    "last": lambda tokens: tokens[-1],
}


@pytest.mark.parametrize("batch_tokens", [1, 200, "auto"])
def test_hidden_states_are_those_of_the_model_whatever_the_batch(reference, batch_tokens):
    X = transformer(pooling=tuple(POOL), batch_tokens=batch_tokens).fit_transform(TEXTS)
    assert X.shape == (len(TEXTS), 7 * 4 * 384) and X.dtype == np.float32
    for row, states in zip(X, reference, strict=True):
        expected = np.concatenate([pool(layer) for layer in states for pool in POOL.values()])
        np.testing.assert_allclose(row, expected, atol=1e-5)
    np.testing.assert_array_equal(X[0], X[4])  # equal texts have equal rows


def test_columns_are_ordered_by_layer_site_pooling_and_neuron():
    several = transformer(site=("mlp", "hidden"), pooling=("max", "mean"), layers=[-1, 2])
    X = several.fit_transform(TEXTS)
    alone = [
        transformer(site=site, pooling=pooling, layers=layer).fit_transform(TEXTS)
        for layer in (2, 6)
        for site in ("hidden", "mlp")
        for pooling in ("mean", "max")
    ]
    np.testing.assert_allclose(X, np.hstack(alone), atol=1e-5)
    names = several.get_feature_names_out()
    assert len(names) == X.shape[1] == 2 * 2 * (384 + 1536)
    assert names[0] == "layer2_hidden_mean_0" and names[-1] == "layer6_mlp_max_1535"


@pytest.mark.parametrize(
    ("layers", "found"),
    [(0, [0]), (-1, [6]), ([1, 5], [1, 5]), ([-1, 0, 6], [0, 6]), (None, "all")],
)
def test_layers_count_from_either_end(layers, found):
    fitted = transformer(layers=layers).fit(TEXTS)
    layers = [segment.layer for segment in fitted.layout_.segments]
    assert layers == (list(range(7)) if found == "all" else found)
    assert fitted.n_layers_ == 6


def test_a_prompt_goes_around_every_text():
    prompted = transformer(prompt="Review: {text} {x}").fit_transform(["fine", "{text}"])
    plain = transformer().fit_transform(["Review: fine {x}", "Review: {text} {x}"])
    np.testing.assert_allclose(prompted, plain, atol=1e-6)
    with pytest.raises(ValueError, match="no place for the text"):
        transformer(prompt="Review:").fit(TEXTS)


def test_long_texts_are_cut_with_one_warning_that_counts_them():
    with pytest.warns(UserWarning, match="2 of 5") as warned:
        X = transformer(max_length=8).fit_transform(TEXTS)
    assert len(warned) == 1
    assert np.isfinite(X).all()


def test_an_overlap_that_leaves_no_window_is_refused_before_a_long_text_comes():
    with pytest.raises(ValueError, match="overlap=8 must be less than max_length=8"):
        transformer(long_texts="windows", max_length=8, overlap=8).fit(TEXTS[:1])


@pytest.mark.parametrize(
    "params",
    [{"prompt": "{text}!"}, {"max_length": 4}, {"long_texts": "windows"}, {"pool_over": "text"}],
)
@pytest.mark.filterwarnings("ignore:.*truncated")
def test_how_texts_are_read_changes_with_the_next_fit_only(params):
    fitted = transformer(max_length=8, layers=2).fit(TEXTS)
    before = fitted.transform(TEXTS)
    np.testing.assert_array_equal(fitted.set_params(**params).transform(TEXTS), before)
    assert np.abs(fitted.fit_transform(TEXTS) - before).max() > 1e-3


def test_texts_without_tokens_and_with_half_characters_have_activations():
    texts = ["", "   ", "\u200b", "\ud800", "a\x00b", "\udfff tail"]
    X = transformer(pooling=tuple(POOL)).fit_transform(texts)
    assert np.isfinite(X).all()
    np.testing.assert_array_equal(X[0], X[1])


def test_fit_reads_no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    forget_models()
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    fitted = transformer(site="mlp").fit(["a"])
    assert fitted.layout_.n_columns == 6 * 1536


def test_import_brings_in_no_torch():
    code = "import sys, skspin; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_nothing_is_printed(capfd):
    transformer().fit_transform(TEXTS)
    assert capfd.readouterr() == ("", "")


def test_another_model_after_set_params_is_really_another(in_memory):
    changed = transformer().fit(TEXTS)
    changed.set_params(**in_memory)
    with pytest.raises(ModelMismatchError, match="fitted with"):
        changed.transform(TEXTS)
    assert changed.fit_transform(TEXTS).shape == (len(TEXTS), 3 * 8)


def test_a_union_joins_the_columns_of_one_model_and_keeps_those_of_two_apart(tokenizer):
    def union(*seeds):
        branches = zip(("mean", "max"), map(tiny, seeds), strict=True)
        return FeatureUnion(
            [
                (how, LLMActivationTransformer(m, tokenizer=tokenizer, pooling=how))
                for how, m in branches
            ]
        ).fit_transform(TEXTS)

    same, other = union(0, 0), union(0, 1)
    assert [len(layer.columns) for layer in layout_of(same).layers()] == [16, 16, 16]
    assert layout_of(other) is None  # although their layers are equally wide
    np.testing.assert_array_equal(same[:, :24], other[:, :24])


@pytest.fixture
def in_memory(tokenizer):
    return {"model": tiny(), "tokenizer": tokenizer}


def test_a_model_in_memory_is_shared_and_comes_back_as_it_was(in_memory):
    model = in_memory["model"].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = LLMActivationTransformer(**in_memory, site=("hidden", "mlp"))
    twin = clone(original)
    assert twin.model is model and twin.tokenizer is in_memory["tokenizer"]
    assert np.isfinite(twin.fit_transform(TEXTS)).all()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_in_memory_stays_out_of_the_pickle(in_memory):
    fitted = LLMActivationTransformer(**in_memory).fit(TEXTS)
    loaded = pickle.loads(pickle.dumps(fitted))
    with pytest.raises(ValueError, match=r"set_params\(model=...\)"):
        loaded.transform(TEXTS)
    X = loaded.set_params(model=in_memory["model"]).transform(TEXTS)
    np.testing.assert_allclose(X, fitted.transform(TEXTS), atol=1e-6)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": 7}, "layers 0 .embeddings. to 6"),
        ({"layers": [1, -8]}, "layer -8"),
        ({"layers": []}, "layers"),
        ({"layers": [0.5]}, "sequence of at least one int"),
        ({"site": "mlp", "layers": 0}, "the embeddings, which have hidden states only"),
        ({"site": "neck"}, "site"),
        ({"site": ("hidden", "neck")}, "neck.*hidden.*mlp"),
        ({"site": ()}, "site"),
        ({"pooling": "sum"}, "pooling"),
        ({"pooling": ("mean", "sum")}, "mean.*max.*first.*last"),
        ({"dtype": "int8"}, "dtype.*bfloat16"),
        ({"max_length": 0}, "max_length"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"device": "abacus"}, "device.*abacus"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(params, message):
    with pytest.raises(ValueError, match=message):
        transformer(**params).fit(TEXTS).transform(TEXTS)


def test_a_model_that_cannot_be_found_offline_says_so():
    started = time.perf_counter()
    with pytest.raises(ValueError, match="no/such-model.*HF_HUB_OFFLINE"):
        LLMActivationTransformer("no/such-model").fit(TEXTS)
    assert time.perf_counter() - started < 10


def test_activations_that_overflow_name_layer_and_dtype(in_memory):
    with torch.no_grad():
        in_memory["model"].encoder.layer[1].output.LayerNorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="layer 2.*dtype"):
        LLMActivationTransformer(**in_memory).fit_transform(TEXTS)
