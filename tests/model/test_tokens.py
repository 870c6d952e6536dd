"""From texts to tokens: how long they may be, and whatever texts and tokenizers there are."""

import threading
import time
import warnings

import numpy as np
import pytest
from extracted_rows import SIZES, TEXTS, expected_row, load_tiny, rows_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    GPT2Config,
    GPT2Model,
    MPNetConfig,
    MPNetModel,
    OPTConfig,
    OPTModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from skspin._layout import Segment
from skspin._model.files import Source
from skspin._model.positions import most_tokens
from skspin._model.registry import load_backbone
from skspin._model.tokens import TextEncoder, replace_surrogates
from skspin.datasets import demo_model


@pytest.fixture
def backbone(tokenizer):
    return load_tiny(tokenizer)


# Length


@pytest.mark.parametrize("max_length", [3, 4, 9])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_is_the_tokenizers_own(tokenizer, max_length, side):
    other = AutoTokenizer.from_pretrained(demo_model(), truncation_side=side)
    texts = ["one two three four five six seven eight nine", "one", ""]
    ids, truncated = TextEncoder(other, max_length=max_length).encode(texts)
    expected = other(texts, truncation=True, max_length=max_length)["input_ids"]
    assert [row.tolist() for row in ids] == expected
    assert truncated.tolist() == [True, False, False]


def test_a_prompt_stays_whole_and_keeps_its_end(tokenizer):
    encoder = TextEncoder(tokenizer, "review: {text} sentiment:", max_length=9)
    ids, truncated = encoder.encode(["one two three four five six", "one {text}", "{}"])
    words = [tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert words[0] == "[CLS] review : one two three sentiment : [SEP]".split()
    assert truncated.tolist() == [True, True, False]
    assert words[1] == "[CLS] review : one { text sentiment : [SEP]".split()


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer):
    encoder = TextEncoder(tokenizer, "review: {text} sentiment:", max_length=6)
    with pytest.raises(ValueError, match="max_length=6 leaves no room for text.*take 6"):
        encoder.encode(["fine"])
    with pytest.raises(ValueError, match="max_length=2 leaves no room for text.*take 2"):
        TextEncoder(tokenizer, max_length=2).encode(["fine"])


def test_one_warning_counts_the_texts_that_were_cut(backbone):
    with pytest.warns(UserWarning, match="3 of 7 texts have more than max_length=6") as warned:
        rows_of(backbone, [*TEXTS, "no " * 30], max_length=6)
    assert len(warned) == 1
    told = []
    rows_of(backbone, [*TEXTS, "no " * 30], max_length=6, on_truncated=told.append)
    np.testing.assert_array_equal(np.sort(np.concatenate(told)), [2, 4, 6])


def roberta_like(config, model, **settings):
    sizes = {**SIZES, "vocab_size": 300, "max_position_embeddings": 14, **settings}
    return model(config(**sizes)).eval()


MODELS_WITH_12_POSITIONS = [
    lambda: roberta_like(RobertaConfig, RobertaModel),
    lambda: roberta_like(MPNetConfig, MPNetModel),
    lambda: roberta_like(BertConfig, BertModel, max_position_embeddings=12),
    lambda: GPT2Model(GPT2Config(vocab_size=300, n_positions=12, n_embd=8, n_layer=1, n_head=2)),
    lambda: OPTModel(
        OPTConfig(
            vocab_size=300,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=8,
            max_position_embeddings=12,
            word_embed_proj_dim=8,
        )
    ),
    lambda: BartModel(
        BartConfig(
            vocab_size=300,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            max_position_embeddings=12,
        )
    ),
]


@pytest.mark.parametrize("make", MODELS_WITH_12_POSITIONS)
def test_no_text_is_longer_than_the_model_has_positions(make):
    model = make().eval()
    assert most_tokens(model, 512) == 12 and most_tokens(model, 5) == 5
    backbone = load_backbone(Source(model, tokenizer=ByT5Tokenizer()))
    stack = "encoder" if model.config.is_encoder_decoder else None
    with pytest.warns(UserWarning, match="1 of 1 texts have more than max_length=12"):
        rows = rows_of(backbone, ["twenty characters..."], [Segment(stack, 1, "hidden", "mean", 8)])
    assert np.isfinite(rows).all()


def test_relative_positions_have_no_end():
    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert most_tokens(T5EncoderModel(config), 10_000) == 10_000


# Odd texts and odd tokenizers


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
    backbone = load_tiny(words_only(**special), vocab_size=6)
    rows = rows_of(backbone, ["", "good", "  "])
    np.testing.assert_allclose(rows[0], expected_row(backbone.model, [stands_in]), atol=1e-6)
    np.testing.assert_array_equal(rows[2], rows[0])


def test_a_tokenizer_with_nothing_to_stand_in_says_so():
    with pytest.raises(ValueError, match="A text has no tokens.*eos_token"):
        TextEncoder(words_only()).encode([""])


def test_padding_needs_no_padding_token():
    tokenizer = words_only(eos_token="<e>")
    config = GPT2Config(vocab_size=6, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    model = GPT2Model(config).eval()
    rows = rows_of(load_backbone(Source(model, tokenizer=tokenizer)), ["good", "bad good bad"])
    np.testing.assert_allclose(rows[0], expected_row(model, [4]), atol=1e-6)
    assert tokenizer.pad_token is None


def test_lone_surrogates_count_as_the_replacement_character(backbone):
    rows = rows_of(backbone, ["a \ud800 b", "a \ufffd b", "\ud83d\ude00", "😀"])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[2], rows[3])


def test_texts_without_surrogates_are_left_alone():
    texts = ["", "a\0b", "naïve 🤷", "\ufffd"]
    assert replace_surrogates(texts) == texts


def test_a_word_of_a_megabyte_takes_seconds_at_most(backbone):
    started = time.perf_counter()
    rows = rows_of(backbone, ["x" * 2**20, "\0", "\0" * 1000])
    assert np.isfinite(rows).all()
    assert time.perf_counter() - started < 20


def test_a_tokenizer_is_left_as_it_was(backbone):
    tokenizer = backbone.tokenizer
    tokenizer(["a b c d"], padding="max_length", truncation=True, max_length=3)
    before = tokenizer.backend_tokenizer.to_str()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows_of(backbone, TEXTS, max_length=5)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_threads_may_share_a_tokenizer(backbone):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(rows_of(backbone, TEXTS))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for rows in found:
        np.testing.assert_allclose(rows, found[0], atol=1e-6)


def test_tokenizers_in_python_work_too():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    backbone = load_tiny(tokenizer, vocab_size=400)
    texts = ["", "naïve", "\ud800", "a longer text"]
    for text, row in zip(replace_surrogates(texts), rows_of(backbone, texts), strict=True):
        ids = tokenizer(text)["input_ids"]
        np.testing.assert_allclose(row, expected_row(backbone.model, ids), atol=1e-5)
    ids, truncated = TextEncoder(tokenizer, max_length=5).encode(["abcdefg", "abc"])
    assert ids[0].tolist() == tokenizer("abcd")["input_ids"] and truncated.tolist() == [True, False]
    ids, truncated = TextEncoder(tokenizer, "<{text}>", max_length=6).encode(["abcdefg"])
    assert ids[0].tolist() == tokenizer("<abc>")["input_ids"] and truncated.tolist() == [True]
    with pytest.raises(ValueError, match="no room"):
        TextEncoder(tokenizer, "<{text}>", max_length=3).encode(["abcdefg"])


def test_special_tokens_at_the_end_survive_truncation():
    tokenizer = words_only(eos_token="<e>", bos_token="<b>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<b> $A <e>", special_tokens=[("<b>", 3), ("<e>", 1)]
    )
    ids, _ = TextEncoder(tokenizer, max_length=4).encode(["good bad good bad good"])
    assert ids[0].tolist() == [3, 4, 5, 1]
