"""From texts to tokens: how long they may be, and whatever texts and tokenizers there are."""

import sys
import threading
import time

import numpy as np
import pytest
import torch
from bert_files import tiny
from extracted_rows import TEXTS, expected_row, layout_of, recipe_of, rows_of, watching
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from skspin._model import text_encoder
from skspin.datasets import demo_model

LONG = "one two three four five six seven eight nine"


def seen_ids(model, tokenizer, texts, **options):
    """Read the token ids that go into the model, text by text, in the order of the texts."""
    seen = {}
    for text in texts:
        with watching(model, lambda ids, text=text: seen.update({text: ids[0].tolist()})):
            rows_of(recipe_of(model, tokenizer, **options), [text], layout_of(0))
    return [seen[text] for text in texts]


# Length


@pytest.mark.parametrize("max_length", [3, 4, 9])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_is_the_tokenizers_own(max_length, side):
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), truncation_side=side)
    texts = [LONG, "one", "", LONG * 50, "a\0b", "naïve 🤷", "\ufffd"]
    expected = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    assert seen_ids(tiny(), tokenizer, texts, max_length=max_length) == expected


def test_special_tokens_in_a_text_are_split_if_the_tokenizer_says_so():
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    texts = ["one [SEP] two", "[MASK]"]
    for splits in (True, False):
        tokenizer.split_special_tokens = splits
        expected = tokenizer(texts)["input_ids"]
        assert seen_ids(tiny(), tokenizer, texts) == expected


def test_tokens_of_blanks_that_only_have_an_end_are_the_texts():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spans = tokenizer("a  b ", return_offsets_mapping=True)["offset_mapping"]
    assert spans == [(0, 1), (2, 2), (3, 3), (3, 4), (5, 5)]
    for prompt, end in ((None, 5), ("A: {text}", 5), ("A: {text} B", 5)):
        model = GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2))
        recipe = recipe_of(model, tokenizer, prompt=prompt, pool_over="text")
        windows, tokens = text_encoder(recipe).locate("a  b ")
        assert tokens.starts.tolist() == [0, 2, 3, 3, 5] and tokens.ends.tolist()[-1] == end
        assert tokens.in_text.tolist() == [True, False, False, True, False]
        assert windows[0].n_pooled == 5


def test_a_prompt_stays_whole_and_keeps_its_end(tokenizer):
    ids = seen_ids(
        tiny(),
        tokenizer,
        ["one two three four five six", "one {text}", "{}"],
        prompt="review: {text} sentiment:",
        max_length=9,
    )
    words = [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in ids]
    assert words == [
        "[CLS] review : one two three sentiment : [SEP]",
        "[CLS] review : one { text sentiment : [SEP]",
        "[CLS] review : { } sentiment : [SEP]",
    ]


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer):
    recipe = recipe_of(tiny(), tokenizer, prompt="review: {text} sentiment:", max_length=6)
    with pytest.raises(ValueError, match="max_length=6 leaves no room for text.*take 6"):
        rows_of(recipe, ["fine"])
    with pytest.raises(ValueError, match="max_length=2 leaves no room for text.*take 2"):
        rows_of(recipe_of(tiny(), tokenizer, max_length=2), ["fine"])


@pytest.mark.parametrize("max_length", [512, 10_000])
def test_no_larger_max_length_is_advised_than_the_model_reads(max_length, tokenizer):
    model = tiny(max_position_embeddings=512)
    recipe = recipe_of(model, tokenizer, prompt="a " * 600 + "{text}", max_length=max_length)
    advice = "limit of 512 tokens leaves no room for text.*take 602. Use a shorter prompt"
    with pytest.raises(ValueError, match=advice):
        rows_of(recipe, ["fine"])


def test_relative_positions_have_no_end():
    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    told = []
    recipe = recipe_of(T5EncoderModel(config).eval(), ByT5Tokenizer(), max_length=10_000)
    rows_of(recipe, ["x" * 2000], layout_of(1), told)
    assert told[0].n_tokens == 2001 and not told[0].n_truncated


# Unusual texts and tokenizers


def words_only(**special):
    """A tokenizer of words that adds no special tokens, so that spaces alone are nothing at all."""
    vocabulary = {word: i for i, word in enumerate(["<p>", "<e>", "<c>", "<b>", "good", "bad"])}
    rust = Tokenizer(models.WordLevel(vocabulary, unk_token="bad"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=rust, **special)


@pytest.mark.parametrize(
    ("special", "stands_in"),
    [
        ({"bos_token": "<b>", "cls_token": "<c>", "eos_token": "<e>", "pad_token": "<p>"}, 3),
        ({"cls_token": "<c>", "eos_token": "<e>", "pad_token": "<p>"}, 2),
        ({"eos_token": "<e>", "pad_token": "<p>"}, 1),
        ({"pad_token": "<p>"}, 0),
    ],
)
def test_a_special_token_stands_for_a_text_without_tokens(special, stands_in):
    model = tiny(vocab_size=6)
    rows = rows_of(recipe_of(model, words_only(**special)), ["", "good", "  "])
    np.testing.assert_allclose(rows[0], expected_row(model, [stands_in]), atol=1e-6)
    np.testing.assert_array_equal(rows[2], rows[0])


def test_a_tokenizer_with_nothing_to_stand_in_says_so():
    with pytest.raises(ValueError, match="A text has no tokens.*eos_token"):
        rows_of(recipe_of(tiny(vocab_size=6), words_only()), [""])


def test_padding_needs_no_padding_token():
    tokenizer = words_only(eos_token="<e>")
    config = GPT2Config(vocab_size=6, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    model = GPT2Model(config).eval()
    rows = rows_of(recipe_of(model, tokenizer), ["good", "bad good bad"])
    inputs = tokenizer("good", return_tensors="pt")  # with token types before transformers 5
    ids = inputs.pop("input_ids")[0].tolist()
    np.testing.assert_allclose(rows[0], expected_row(model, ids, **inputs), atol=1e-6)
    assert tokenizer.pad_token is None


def with_template(single, types):
    tokenizer = words_only(eos_token="<e>", bos_token="<b>", pad_token="<p>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<b>", 3), ("<e>", 1)]
    )
    tokenizer.model_input_names = ["input_ids", *types, "attention_mask"]
    return tokenizer


@pytest.mark.parametrize("types", [["token_type_ids"], []])
def test_token_types_of_the_tokenizers_template_reach_the_model(types):
    model = tiny(vocab_size=6, type_vocab_size=3)
    tokenizer = with_template("<b>:2 $A:1 <e>:2", types)
    texts = ["good", "bad good bad", "good bad good bad good good", ""]
    rows = rows_of(recipe_of(model, tokenizer, max_length=5), texts)
    for text, row in zip(texts, rows, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=5)
        ids = inputs.pop("input_ids")[0].tolist()
        assert set(inputs) == {*types, "attention_mask"}
        np.testing.assert_allclose(row, expected_row(model, ids, **inputs), atol=1e-5)


def test_lone_surrogates_count_as_the_replacement_character(tokenizer):
    recipe = recipe_of(tiny(), tokenizer)
    rows = rows_of(recipe, ["a \ud800 b", "a \ufffd b", "\ud83d\ude00", "😀"])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[2], rows[3])


def test_a_word_of_a_megabyte_takes_seconds_at_most(tokenizer):
    started = time.perf_counter()
    rows = rows_of(recipe_of(tiny(), tokenizer), ["x" * 2**20, "\0", "\0" * 1000])
    assert np.isfinite(rows).all()
    assert time.perf_counter() - started < 20


def test_a_long_text_is_tokenized_once():
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    recipe = recipe_of(tiny(max_position_embeddings=512), tokenizer)
    rows_of(recipe, ["a"], layout_of(0))  # a loaded model is tried on texts of its own
    given = []

    def note(frame, event, called):
        if event == "c_call" and isinstance(getattr(called, "__self__", None), Tokenizer):
            given.append(called.__name__)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        rows_of(recipe, ["a fine film that nobody saw " * 30_000], layout_of(0))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert [name for name in given if name.startswith("encode")] == ["encode_batch"]


def test_a_tokenizer_is_left_as_it_was(tokenizer):
    tokenizer(["a b c d"], padding="max_length", truncation=True, max_length=3)
    before = tokenizer.backend_tokenizer.to_str()
    rows_of(recipe_of(tiny(), tokenizer, max_length=5), TEXTS)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_threads_may_share_a_tokenizer(tokenizer):
    recipe, found = recipe_of(tiny(), tokenizer), []
    threads = [
        threading.Thread(target=lambda: found.append(rows_of(recipe, TEXTS))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for rows in found:
        np.testing.assert_allclose(rows, found[0], atol=1e-6)


def test_tokenizers_in_python_work_too():
    tokenizer, model = ByT5Tokenizer(), tiny(vocab_size=400)
    assert not tokenizer.is_fast
    texts = ["", "naïve", "\ufffd", "a longer text"]
    assert seen_ids(model, tokenizer, texts) == tokenizer(texts)["input_ids"]
    assert seen_ids(model, tokenizer, ["abcdefg", "abc"], max_length=5) == [
        tokenizer("abcd")["input_ids"],
        tokenizer("abc")["input_ids"],
    ]
    cut = seen_ids(model, tokenizer, ["abcdefg"], prompt="<{text}>", max_length=6)
    assert cut == [tokenizer("<abc>")["input_ids"]]
    with pytest.raises(ValueError, match="no room"):
        rows_of(recipe_of(model, tokenizer, prompt="<{text}>", max_length=3), ["abcdefg"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_activations(side):
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), padding_side=side)
    model = tiny()
    for text, row in zip(TEXTS, rows_of(recipe_of(model, tokenizer), TEXTS), strict=True):
        ids = tokenizer(text)["input_ids"]
        np.testing.assert_allclose(row, expected_row(model, ids), atol=1e-5)
    assert torch.is_grad_enabled()
