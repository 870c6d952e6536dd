"""A long text is read in windows, whose rows are merged exactly."""

import time

import numpy as np
import pytest
import torch
from bert_files import tiny
from extracted_rows import layout_of, recipe_of, rows_of, watching
from transformers import AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2Model

from skspin import LLMActivationTransformer
from skspin._layout import POOLINGS
from skspin.datasets import demo_model

WORDS = [f"word{i} of a long text" for i in range(12)]
TEXTS = [" ".join(WORDS[:n]) for n in (1, 3, 7, 12)] + ["", "fine"]
LAYOUT = layout_of(poolings=POOLINGS)


@pytest.fixture(scope="module")
def model():
    return tiny()


def by_hand(model, tokenizer, text, max_length, overlap=0, prompt="{text}", causal=False):
    """Merge the rows of a text's windows, each of which goes through the model by itself."""
    head, tail = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in prompt.split("{text}")
    )
    first, last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    first, last = first + head, tail + last
    room = max_length - len(first) - len(last)
    starts = range(0, max(1, len(own) - overlap), room - overlap)
    if len(first + own + last) <= max_length:
        starts, room = [0], len(own)
    tokens = []  # of each window, those that count: (n_layers, n_tokens, n_neurons)
    for number, start in enumerate(starts):
        stretch = own[start : start + room]
        with torch.no_grad():
            ids = torch.tensor([first + stretch + last])
            states = model(ids, output_hidden_states=True).hidden_states
        states = np.stack([state[0].numpy() for state in states])
        # The middle of what two windows share is where the contexts are equally long.
        shared = overlap if causal else (overlap + 1) // 2
        drop = list(range(len(first), len(first) + shared)) if number else []
        if start + room < len(own):
            end = len(first) + len(stretch)
            drop += range(end - (overlap - shared), end)
        tokens.append(np.delete(states, drop, axis=1))
    joined = np.concatenate(tokens, axis=1)
    pooled = {
        "mean": joined.mean(1),
        "max": joined.max(1),
        "first": joined[:, 0],
        "last": joined[:, -1],
    }
    return np.concatenate([pooled[how][i] for i in range(len(joined)) for how in POOLINGS])


@pytest.mark.parametrize(
    ("prompt", "overlap"),
    [
        (None, 0),
        (None, 3),
        (None, 4),
        ("review: {text} it is", 0),
        ("{text} !", 2),
        ("a: {text}", 1),
    ],
)
def test_windows_pool_to_what_all_their_tokens_pool_to(model, tokenizer, prompt, overlap):
    expected = [by_hand(model, tokenizer, text, 14, overlap, prompt or "{text}") for text in TEXTS]
    options = {"prompt": prompt, "max_length": 14, "long_texts": "windows", "overlap": overlap}
    for batch_tokens in (1, 40, "auto"):
        told = []
        recipe = recipe_of(model, tokenizer, batch_tokens=batch_tokens, **options)
        np.testing.assert_allclose(rows_of(recipe, TEXTS, LAYOUT, told), expected, atol=1e-5)
        assert not sum(rows.n_truncated for rows in told)


def test_a_text_of_one_window_is_what_it_is_truncated_to_the_bit(model, tokenizer):
    short = [text for text in TEXTS if len(tokenizer(text)["input_ids"]) <= 20]
    assert len(short) > 2
    rows = [
        rows_of(recipe_of(model, tokenizer, max_length=20, long_texts=how), short, LAYOUT)
        for how in ("truncate", "windows")
    ]
    np.testing.assert_array_equal(*rows)


def test_a_causal_models_shared_tokens_count_in_the_earlier_window():
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    config = GPT2Config(vocab_size=30522, n_embd=8, n_layer=2, n_head=2, n_positions=64)
    model = GPT2Model(config).eval()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    recipe = recipe_of(model, tokenizer, max_length=14, long_texts="windows", overlap=4)
    rows = rows_of(recipe, TEXTS[:4], LAYOUT)
    for text, row in zip(TEXTS, rows, strict=False):
        np.testing.assert_allclose(
            row, by_hand(model, tokenizer, text, 14, 4, causal=True), atol=1e-5
        )


def test_a_planted_word_in_a_late_window_changes_a_maximum(model, tokenizer):
    text = "so it goes " * 40
    planted = text + "zebra"
    recipe = recipe_of(model, tokenizer, max_length=14, long_texts="windows")
    layout = layout_of(poolings=("max",))
    plain, changed = rows_of(recipe, [text, planted], layout)
    assert (changed > plain + 1e-3).any()
    cut = recipe_of(model, tokenizer, max_length=14)
    np.testing.assert_array_equal(*rows_of(cut, [text, planted], layout))


def test_equal_long_texts_are_read_once(model, tokenizer):
    transformer = LLMActivationTransformer(
        model, tokenizer=tokenizer, max_length=14, long_texts="windows", cache=None
    )
    seen = []
    with watching(model, lambda ids: seen.append(len(ids))):
        rows = transformer.fit_transform([TEXTS[3]] * 20)
    n_tokens = len(tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"])
    assert sum(seen) == -(-n_tokens // 12)
    assert (rows == rows[0]).all()


def test_tokenizers_in_python_and_those_without_special_tokens_read_windows(model):
    tokenizer = ByT5Tokenizer()
    model = tiny(vocab_size=400)
    options = {"max_length": 6, "long_texts": "windows"}
    text = "abcdefghijklm"
    rows = rows_of(recipe_of(model, tokenizer, **options), [text], LAYOUT)
    # Five letters and the end's token at a time.
    cut = recipe_of(model, tokenizer)
    parts = rows_of(cut, ["abcde", "fghij", "klm"], LAYOUT)
    shares = np.array([6, 6, 4]) / 16
    for segment, columns in zip(LAYOUT.segments, LAYOUT.slices, strict=True):
        expected = {
            "mean": shares @ parts[:, columns],
            "max": parts[:, columns].max(0),
            "first": parts[0, columns],
            "last": parts[-1, columns],
        }
        np.testing.assert_allclose(rows[0, columns], expected[segment.pooling], atol=1e-6)
    with pytest.raises(ValueError, match="overlap=2 needs a fast tokenizer"):
        rows_of(recipe_of(model, tokenizer, overlap=2, **options), [text], LAYOUT)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"overlap": 3}, "overlap=3 is for windows"),
        (
            {"long_texts": "windows", "overlap": 12, "max_length": 14},
            "overlap=12.*larger max_length",
        ),
        ({"long_texts": "rows"}, "long_texts"),
        ({"long_texts": "windows", "overlap": -1}, "overlap"),
    ],
)
def test_windows_that_get_nowhere_are_refused(model, tokenizer, params, message):
    transformer = LLMActivationTransformer(model, tokenizer=tokenizer, cache=None, **params)
    with pytest.raises(ValueError, match=message):
        transformer.fit_transform(TEXTS)


def test_a_megabyte_is_read_in_time_that_grows_with_its_length(tokenizer):
    model = tiny(max_position_embeddings=512)
    recipe = recipe_of(model, tokenizer, long_texts="windows")
    took = []
    for n_bytes in (2**18, 2**20):
        text = ("a fine film that nobody saw, or so they say. " * (n_bytes // 45))[:n_bytes]
        started = time.process_time()
        assert np.isfinite(rows_of(recipe, [text], layout_of(1))).all()
        took.append(time.process_time() - started)
    assert took[1] < 12 * took[0]  # 16 times the squared length
