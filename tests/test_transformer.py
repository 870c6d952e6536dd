"""What the transformer promises, on the real demo model and against output_hidden_states."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model

from skspin import LLMActivationTransformer, ModelMismatchError
from skspin._texts import open_texts
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


@pytest.mark.parametrize("pooling", POOL)
@pytest.mark.parametrize("batch_tokens", [1, 200, "auto"])
def test_hidden_states_are_those_of_the_model_whatever_the_batch(reference, pooling, batch_tokens):
    X = transformer(pooling=pooling, batch_tokens=batch_tokens).fit_transform(TEXTS)
    assert X.shape == (len(TEXTS), 7 * 384) and X.dtype == np.float32
    for row, states in zip(X, reference, strict=True):
        expected = np.concatenate([POOL[pooling](layer) for layer in states])
        np.testing.assert_allclose(row, expected, atol=1e-5)


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


def test_mlp_neurons_are_the_input_of_the_down_projection():
    X = transformer(site="mlp", layers=3).fit_transform(TEXTS[:2])
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = AutoModel.from_pretrained(demo_model(), dtype=torch.float32).eval()
    seen = []
    down = model.encoder.layer[2].output.dense
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        for text in TEXTS[:2]:
            model(**tokenizer(text, return_tensors="pt"))
    expected = [tokens[0].mean(0).numpy() for tokens in seen]
    np.testing.assert_allclose(X, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "found"),
    [(0, [0]), (-1, [6]), ([1, 5], [1, 5]), ([-1, 0, 6], [0, 6]), (None, "all")],
)
def test_layers_count_from_either_end(layers, found):
    fitted = transformer(layers=layers).fit(TEXTS)
    layers = [segment.layer for segment in fitted.layout_.segments]
    assert layers == (list(range(7)) if found == "all" else found)
    assert fitted.n_layers_ == 6


def test_equal_texts_have_equal_rows():
    X = transformer().fit_transform(TEXTS)
    np.testing.assert_array_equal(X[0], X[4])


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


def test_a_text_without_tokens_is_never_nan():
    X = transformer(pooling=("mean", "max", "first", "last")).fit_transform(["", "   ", "\u200b"])
    assert np.isfinite(X).all()
    np.testing.assert_array_equal(X[0], X[1])


def test_lone_surrogates_and_null_characters_are_texts():
    X = transformer().fit_transform(["\ud800", "a\x00b", "\udfff tail"])
    assert np.isfinite(X).all()


def test_fit_reads_no_weights(tmp_path):
    (tmp_path / "config.json").write_bytes((demo_model() / "config.json").read_bytes())
    code = (
        "import sys; from skspin import LLMActivationTransformer as T\n"
        "from skspin.datasets import demo_model\n"
        "import safetensors.torch, safetensors, transformers\n"
        "def refuse(*args, **kwargs): raise AssertionError('weights were read')\n"
        "transformers.PreTrainedModel.from_pretrained = classmethod(refuse)\n"
        "print(T(demo_model(), site='mlp', cache=None).fit(['a']).layout_.n_columns)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(6 * 1536)


def test_import_brings_in_no_torch():
    code = "import sys, skspin; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_nothing_is_printed(capfd):
    transformer().fit_transform(TEXTS)
    assert capfd.readouterr() == ("", "")


def test_the_same_weights_serve_all_instances():
    from skspin._model.registry import load_backbone

    one, other = transformer(layers=1), clone(transformer(layers=2))
    one.fit_transform(TEXTS), other.fit_transform(TEXTS)
    first, second = (
        load_backbone(
            each._fitted_recipe(open_texts(TEXTS)).source,
            None,
            "float32",
        )
        for each in (one, other)
    )
    assert first.model is second.model


def test_another_model_after_set_params_is_really_another(tiny_bert):
    changed = transformer().fit(TEXTS)
    changed.set_params(**tiny_bert)
    with pytest.raises(ModelMismatchError, match="fitted with"):
        changed.transform(TEXTS)
    assert changed.fit_transform(TEXTS).shape == (len(TEXTS), 3 * 16)


@pytest.fixture
def tiny_bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    return {"model": BertModel(config).eval(), "tokenizer": tokenizer}


def test_a_model_in_memory_is_shared_and_comes_back_as_it_was(tiny_bert):
    model = tiny_bert["model"].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = LLMActivationTransformer(**tiny_bert, site=("hidden", "mlp"))
    twin = clone(original)
    assert twin.model is model and twin.tokenizer is tiny_bert["tokenizer"]
    assert np.isfinite(twin.fit_transform(TEXTS)).all()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_in_memory_stays_out_of_the_pickle(tiny_bert):
    fitted = LLMActivationTransformer(**tiny_bert).fit(TEXTS)
    loaded = pickle.loads(pickle.dumps(fitted))
    with pytest.raises(ValueError, match=r"set_params\(model=...\)"):
        loaded.transform(TEXTS)
    X = loaded.set_params(model=tiny_bert["model"]).transform(TEXTS)
    np.testing.assert_allclose(X, fitted.transform(TEXTS), atol=1e-6)


def test_a_decoder_without_padding_token_is_handled(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.pad_token = None
    model = GPT2Model(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30522)).eval()
    X = LLMActivationTransformer(model, tokenizer=tokenizer, pooling="last").fit_transform(TEXTS)
    assert tokenizer.pad_token is None
    with torch.inference_mode():
        tokens = tokenizer(TEXTS[1], return_tensors="pt")
        states = model(**tokens, output_hidden_states=True).hidden_states
    expected = np.concatenate([state[0, -1].numpy() for state in states])
    np.testing.assert_allclose(X[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": 7}, "layers 0 .embeddings. to 6"),
        ({"layers": [1, -8]}, "layer -8"),
        ({"layers": []}, "layers"),
        ({"layers": [0.5]}, "sequence of ints"),
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
    with pytest.raises(ValueError, match="no/such-model.*HF_HUB_OFFLINE"):
        LLMActivationTransformer("no/such-model").fit(TEXTS)


def test_activations_that_overflow_name_layer_and_dtype(tiny_bert):
    with torch.no_grad():
        tiny_bert["model"].encoder.layer[1].output.LayerNorm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="layer 2.*dtype"):
        LLMActivationTransformer(**tiny_bert).fit_transform(TEXTS)
