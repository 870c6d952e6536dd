"""What decides a number decides what is recalled, and nothing else does: field by field."""

import copy

import numpy as np
import pytest
import torch
import transformers
from bert_files import save, tiny
from sklearn.base import clone
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoTokenizer, T5Config, T5Model

from skspin import LLMActivationTransformer
from skspin._model.files import Source, _ask_hub
from skspin._model.registry import forget_models, load_backbone
from skspin.datasets import demo_model

# The warning that texts were cut off is not what these are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*truncated:UserWarning")

TEXTS = ["A fine film.", "A waste of two hours and of a good cast.", "Quite so."]
COMMITS = ("0" * 40, "1" * 40)


@pytest.fixture
def folder(tmp_path, tokenizer):
    return save(tmp_path / "model", tiny(), tokenizer)


@pytest.fixture
def store(tmp_path):
    yield tmp_path / "store"
    forget_models()


@pytest.fixture
def read():
    """Count the texts that any model in this process reads."""
    lengths = []

    def count(module, args):
        if isinstance(module, torch.nn.Embedding) and (n_words := module.num_embeddings) > 1000:
            # A model is tried on ids from the middle of the vocabulary when it is loaded.
            lengths.append(len(args[0]) if args[0][0, 0] != n_words // 2 else 0)

    handle = register_module_forward_pre_hook(count)
    yield lambda: sum(lengths)
    handle.remove()


def activations(model, store, texts=TEXTS, **params):
    params = {"cache": store, "dtype": "float32", **params}
    return LLMActivationTransformer(model, **params).fit_transform(texts)


# In the key: each of these lets the model read the texts again


def write_other_weights(folder, params):
    save(folder, tiny(seed=1))


def write_other_settings(folder, params):
    tiny(layer_norm_eps=0.1).config.save_pretrained(folder)


def write_other_tokenizer(folder, params):
    other = AutoTokenizer.from_pretrained(demo_model())
    other.add_tokens(["waste"])
    other.save_pretrained(folder)


def change_weights_in_memory(folder, params):
    with torch.no_grad():
        params["model"].embeddings.word_embeddings.weight.mul_(2)


def change_settings_in_memory(folder, params):
    params["model"].config.layer_norm_eps = 0.1


def set_params(**others):
    return lambda folder, params: params.update(others)


def set_tokenizer(**settings):
    def change(folder, params):
        params["tokenizer"] = AutoTokenizer.from_pretrained(folder, **settings)
        params["max_length"] = 8

    return change


def set_model():
    def change(folder, params):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        params.update(model=tiny(), tokenizer=tokenizer, dtype="auto")

    return change


EXTRA_TOKENS = (  # renamed in transformers 5
    "additional_special_tokens" if transformers.__version__ < "5" else "extra_special_tokens"
)
IN_WINDOWS = set_params(long_texts="windows", max_length=5)
DECIDES = {  # what is set before, and what is changed then
    "weights": (set_params(), write_other_weights),
    "configuration": (set_params(), write_other_settings),
    "tokenizer": (set_params(), write_other_tokenizer),
    "special tokens": (set_tokenizer(), set_tokenizer(cls_token="[SEP]")),
    "case": (set_tokenizer(), set_tokenizer(do_lower_case=False)),
    "extra tokens": (set_tokenizer(), set_tokenizer(**{EXTRA_TOKENS: ["waste"]})),
    "truncation side": (set_tokenizer(), set_tokenizer(truncation_side="left")),
    "prompt": (set_params(), set_params(prompt="Review: {text}")),
    "max_length": (set_params(), set_params(max_length=100)),
    "long_texts": (set_params(), set_params(long_texts="windows")),
    "overlap": (IN_WINDOWS, set_params(overlap=1)),
    "pool_over": (set_params(), set_params(pool_over="text")),
    "dtype": (set_params(), set_params(dtype="bfloat16")),
    "store_dtype": (set_params(), set_params(store_dtype="float16")),
    "site": (set_params(), set_params(site="mlp")),
    "pooling": (set_params(), set_params(pooling="max")),
    "layer": (set_params(layers=[0, 1]), set_params(layers=[1, 2])),
    "trust_remote_code": (set_params(), set_params(trust_remote_code=True)),
    "model_kwargs": (set_params(), set_params(model_kwargs={"hidden_act": "relu"})),
    "weights in memory": (set_model(), change_weights_in_memory),
    "configuration in memory": (set_model(), change_settings_in_memory),
}


@pytest.mark.parametrize(("before", "change"), DECIDES.values(), ids=DECIDES)
def test_what_decides_a_number_is_in_the_key(folder, store, read, before, change):
    params = {"model": folder}
    before(folder, params)
    activations(store=store, **params)
    n_read = read()
    change(folder, params)
    found = activations(store=store, **params)
    assert read() >= n_read + len(TEXTS)
    np.testing.assert_array_equal(found, activations(store=None, **params))


def test_the_text_is_in_the_key_to_the_last_blank(folder, store, read):
    for n, text in enumerate(["a film", "a film ", "A film", "a  film", "a fil\u0301m"]):
        activations(folder, store, [text])
        assert read() == n + 1


def test_the_stack_is_in_the_key(tmp_path, tokenizer, store, read):
    sizes = {"vocab_size": 30522, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2}
    torch.manual_seed(0)
    model = T5Model(T5Config(num_layers=2, decoder_start_token_id=0, **sizes)).eval()
    folder = save(tmp_path / "t5", model, tokenizer)
    rows = {}
    for stack in ("encoder", "decoder"):
        before = read()
        rows[stack] = activations(folder, store, stack=stack)
        assert read() > before
    before = read()
    both = activations(folder, store, stack=("encoder", "decoder"))
    assert read() == before
    np.testing.assert_array_equal(both, np.hstack([rows["encoder"], rows["decoder"]]))


def test_the_commit_of_a_hub_model_is_in_the_key(tmp_path, tokenizer, store, read):
    repository = tmp_path / "hub" / "models--org--tiny"
    for seed, commit in enumerate(COMMITS):
        save(repository / "snapshots" / commit, tiny(seed=seed), tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[0])
    _ask_hub.cache_clear()
    hub = {"model_kwargs": {"cache_dir": str(tmp_path / "hub")}}
    rows = [activations("org/tiny", store, revision=c, **hub) for c in (None, *COMMITS)]
    branch, commit = (
        load_backbone(Source("org/tiny", revision=c, **hub)) for c in (None, COMMITS[0])
    )
    assert branch is commit
    _ask_hub.cache_clear()
    assert read() == 2 * len(TEXTS)  # the branch is at the first commit
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])


# Not in the key: with each of these the model reads nothing more


def copy_folder(folder, params):
    folder.rename(folder.parent / "another name")
    params["model"] = folder.parent / "another name"


def add_a_note(folder, params):
    (folder / "README.md").write_text("Trained in one afternoon.")


DECIDES_NOTHING = {
    "the folder's path": copy_folder,
    "a file that is not the model's": add_a_note,
    "batch_tokens": set_params(batch_tokens=1),
    "device": set_params(device="cpu"),
    "devices": set_params(device=["cpu", "cpu"]),
    "n_jobs": set_params(n_jobs=2),
    "verbose": set_params(verbose=1),
    "how attention is computed": set_params(model_kwargs={"attn_implementation": "eager"}),
    "the format's other name": set_params(dtype="auto"),
}


@pytest.mark.parametrize("change", DECIDES_NOTHING.values(), ids=DECIDES_NOTHING)
def test_what_decides_no_number_is_not_in_the_key(folder, store, read, change, monkeypatch):
    monkeypatch.setattr("skspin._model.recipe.multiplies_bfloat16", lambda device: False)
    params = {"model": folder}
    expected = activations(folder, store)
    change(folder, params)
    found = activations(store=store, **params)
    assert read() == len(TEXTS)
    np.testing.assert_array_equal(found, expected)


def test_order_repetition_company_instance_and_clone_are_not_in_the_key(folder, store, read):
    transformer = LLMActivationTransformer(folder, cache=store, dtype="float32").fit(TEXTS)
    expected = transformer.transform(TEXTS)
    order = [2, 0, 0, 1, 2]
    for other in (transformer, clone(transformer).fit(TEXTS[:1]), copy.deepcopy(transformer)):
        np.testing.assert_array_equal(other.transform([TEXTS[i] for i in order]), expected[order])
    assert read() == len(TEXTS)


def test_which_objects_hold_the_same_weights_and_words_is_not_in_the_key(tokenizer, store, read):
    model = tiny()
    for twin in (model, copy.deepcopy(model), tiny()):
        twin.train(twin is not model)  # runs in evaluation mode in any case
        words = copy.deepcopy(tokenizer)
        words.padding_side = "right" if twin is model else "left"
        activations(twin, store, tokenizer=words, dtype="auto")
    assert read() == len(TEXTS)


def test_layers_and_sites_are_recalled_from_a_call_for_more(folder, store, read):
    more = activations(folder, store, site=("hidden", "mlp"), pooling=("mean", "max"))
    fewer = activations(folder, store, layers=[1], site="hidden", pooling="max")
    assert read() == len(TEXTS)
    names = LLMActivationTransformer(folder, site=("hidden", "mlp"), pooling=("mean", "max"))
    names = names.fit(TEXTS).get_feature_names_out().tolist()
    at = [names.index(f"layer1_hidden_max_{i}") for i in range(8)]
    np.testing.assert_array_equal(fewer, more[:, at])


def test_only_the_texts_and_poolings_that_are_missing_are_read(folder, store, read):
    for n, pooling in enumerate(["mean", "max", ("mean", "max")]):
        activations(folder, store, TEXTS[:2], pooling=pooling)
        assert read() == 2 * min(n + 1, 2)
    activations(folder, store, pooling=("mean", "max"))
    assert read() == 2 * 2 + 1


def test_a_pruned_layout_is_served_from_whole_rows_and_else_computed_alone(folder, store, read):
    columns = np.arange(24) % 3 == 0

    def pruned(cache, site):
        transformer = LLMActivationTransformer(folder, cache=cache, dtype="float32", site=site)
        return transformer.fit(TEXTS)._restrict_to(columns).transform(TEXTS)

    whole = activations(folder, store)
    np.testing.assert_array_equal(pruned(store, "hidden"), whole[:, columns])
    assert read() == len(TEXTS)
    few = [pruned(store, "mlp") for _ in range(2)]
    assert read() == 2 * len(TEXTS)
    np.testing.assert_array_equal(few[0], few[1])
    np.testing.assert_array_equal(few[0], activations(folder, None, site="mlp")[:, columns])
