"""From texts to rows: every text once, whatever the batches, and whatever the texts are."""

import threading
import time
import warnings
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    FNetConfig,
    FNetModel,
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

from skspin._extraction.backbone import load_backbone
from skspin._extraction.batching import extract
from skspin._extraction.budget import TokenBudget
from skspin._extraction.positions import most_tokens
from skspin._extraction.source import Source
from skspin._extraction.tokens import TextEncoder, replace_surrogates
from skspin._layout import Segment
from skspin.datasets import demo_model

SIZES = {
    "vocab_size": 30522,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
TEXTS = ["a fine film", "", "two hours of my life", "a fine film", "no " * 30, "well, well"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model())


def tiny_bert(tokenizer, **settings):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{**SIZES, **settings})).eval()
    return load_backbone(Source(model, tokenizer=tokenizer))


@pytest.fixture
def backbone(tokenizer):
    return tiny_bert(tokenizer)


@pytest.fixture(scope="module")
def shared_backbone(tokenizer):
    return tiny_bert(tokenizer)


def segments(n_layers=2, width=8, poolings=("mean", "last")):
    return [
        Segment(None, layer, "hidden", pooling, width)
        for layer in range(n_layers + 1)
        for pooling in poolings
    ]


def rows_of(backbone, texts, wanted=None, **options):
    wanted = segments() if wanted is None else wanted
    rows = np.full((len(texts), sum(s.n_columns for s in wanted)), np.nan, dtype=np.float32)
    for positions, values in extract(backbone, texts, wanted, **options):
        assert np.isnan(rows[positions]).all(), "a text came twice"
        assert values.dtype == np.float32
        rows[positions] = values
    return rows


def expected_row(model, ids):
    """The oracle: one text alone, pooled by hand from transformers' own hidden states."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.cat([part for h in states for part in (h[0].mean(0), h[0, -1])]).numpy()


@contextmanager
def watching(model, see):
    """Call ``see(ids)`` with every batch of token ids that goes into a model."""
    word_embeddings = model.get_input_embeddings()
    handle = word_embeddings.register_forward_pre_hook(lambda module, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()


# What batches may not change


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30) | st.sampled_from(TEXTS), min_size=1, max_size=12),
    batch_tokens=st.integers(1, 200) | st.just("auto"),
)
def test_rows_do_not_depend_on_batches_or_order(shared_backbone, texts, batch_tokens):
    rows = rows_of(shared_backbone, texts, batch_tokens=batch_tokens)
    for text, row in zip(texts, rows, strict=True):
        ids = shared_backbone.tokenizer(*replace_surrogates([text]))["input_ids"]
        np.testing.assert_allclose(row, expected_row(shared_backbone.model, ids), atol=1e-5)


def test_equal_texts_go_through_the_model_once(backbone):
    texts = TEXTS * 50
    seen = []
    with watching(backbone.model, lambda ids: seen.append(len(ids))):
        rows = rows_of(backbone, texts)
    assert sum(seen) == len(set(TEXTS))
    np.testing.assert_array_equal(rows, np.tile(rows[: len(TEXTS)], (50, 1)))


def test_no_text_is_no_work(backbone):
    assert list(extract(backbone, [], segments())) == []


def lengths_like_sentences(n_texts):
    rng = np.random.default_rng(0)
    return np.clip(rng.gamma(2.4, 10, n_texts).astype(int), 2, 64)


def test_padding_is_under_three_percent(backbone):
    texts = [f"{i} " + "w " * n for i, n in enumerate(lengths_like_sentences(4000))]
    real = sum(len(ids) for ids in backbone.tokenizer(texts)["input_ids"])
    seen = []
    with watching(backbone.model, lambda ids: seen.append(ids.shape)):
        rows_of(backbone, texts, segments(1), batch_tokens=4096)
    assert all(n_texts * n_tokens <= 4096 for n_texts, n_tokens in seen)
    assert 1 - real / sum(n_texts * n_tokens for n_texts, n_tokens in seen) < 0.03
    assert len(seen) < 2 * real / 4096


def test_texts_are_in_one_batch_only_with_texts_of_their_length_where_padding_leaks():
    # FNet mixes all tokens of a row by a Fourier transform, padding included.
    config = FNetConfig(vocab_size=300, hidden_size=8, num_hidden_layers=2, intermediate_size=12)
    model = FNetModel(config).eval()
    backbone = load_backbone(Source(model, tokenizer=ByT5Tokenizer()))
    lengths = np.array([7, 7, 6, 6, 6, 1])
    budget = TokenBudget(backbone, 1000)
    assert [budget.n_texts(lengths[start:]) for start in (0, 2, 5)] == [2, 3, 1]
    rows = rows_of(backbone, ["abc", "abcd", "ab", "dcb"])
    np.testing.assert_allclose(rows[1], rows_of(backbone, ["abcd"])[0], atol=1e-6)


# Memory


def too_large(limit, error):
    def see(ids):
        if ids.numel() > limit:
            raise error

    return see


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved_and_that_is_remembered(backbone, error):
    texts = [f"{i} " + "w " * n for i, n in enumerate(lengths_like_sentences(200))]
    expected = rows_of(backbone, texts)
    fails = too_large(150, error)
    with watching(backbone.model, fails):
        np.testing.assert_allclose(rows_of(backbone, texts), expected, atol=1e-5)
    sizes = []
    with watching(backbone.model, lambda ids: sizes.append(ids.numel())):
        rows_of(backbone, texts)
    assert 75 <= max(sizes) <= 150


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_one_text_that_does_not_fit_is_an_error_that_says_so(backbone, error):
    with (
        watching(backbone.model, too_large(20, error)),
        pytest.raises(MemoryError, match="One text of 32 tokens does not fit.*max_length"),
    ):
        rows_of(backbone, TEXTS)


def test_other_errors_pass_unchanged(backbone):
    fault = RuntimeError("a fault of the model")
    with watching(backbone.model, too_large(0, fault)), pytest.raises(RuntimeError) as raised:
        rows_of(backbone, TEXTS)
    assert raised.value is fault


def test_the_budget_follows_the_models_width(tokenizer):
    narrow, wide = (
        TokenBudget(tiny_bert(tokenizer, intermediate_size=width)).tokens for width in (96, 1536)
    )
    assert wide == 4096 and narrow == 16 * wide
    assert TokenBudget(tiny_bert(tokenizer), 100).tokens == 100


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
    backbone = tiny_bert(words_only(**special), vocab_size=6)
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
    backbone = tiny_bert(tokenizer, vocab_size=400)
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


# Faults, interruptions, progress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_name_their_layer_and_a_remedy(tokenizer, dtype):
    backbone = tiny_bert(tokenizer)
    backbone.model.encoder.layer[1].output.LayerNorm.weight.data[3] = torch.inf
    backbone.model.to(getattr(torch, dtype))
    backbone = load_backbone(Source(backbone.model, tokenizer=tokenizer))
    remedy = "weights" if dtype == "float32" else "dtype='float32'"
    with pytest.raises(ValueError, match=f"layer 2 at site 'hidden'.*dtype='{dtype}'.*{remedy}"):
        rows_of(backbone, TEXTS)


def tokenizing_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("skspin-tokenize")]


def test_what_was_yielded_before_an_interruption_is_kept(backbone):
    texts = [f"{i} " + "w " * 20 for i in range(100)]
    expected = rows_of(backbone, texts)
    kept = {}

    class Interruption(KeyboardInterrupt):
        pass

    def interrupt(ids):
        if len(kept) >= 40:
            raise Interruption

    with watching(backbone.model, interrupt), pytest.raises(Interruption):
        for positions, rows in extract(backbone, texts, segments(), batch_tokens=100):
            kept.update(zip(positions.tolist(), rows, strict=True))
    assert 40 <= len(kept) < 100
    for position, row in kept.items():
        np.testing.assert_allclose(row, expected[position], atol=1e-5)
    assert not tokenizing_threads()


def test_a_caller_who_leaves_early_leaves_no_thread_behind(backbone):
    texts = [f"{i} " + "w " * 20 for i in range(3000)]
    with closing(extract(backbone, texts, segments(0), batch_tokens=100)) as batches:
        next(batches)
        assert tokenizing_threads()
    assert not tokenizing_threads()


def test_nothing_is_shown_unless_asked_for(backbone, capfd):
    rows_of(backbone, TEXTS)
    assert capfd.readouterr() == ("", "")
    rows_of(backbone, TEXTS, verbose=1)
    out, shown = capfd.readouterr()
    assert out == ""
    assert "6/6" in shown and "texts" in shown and "tokens/s" in shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives(tokenizer):
    texts = [f"{i} " + "w " * n for i, n in enumerate(lengths_like_sentences(500))]
    model = tiny_bert(tokenizer).model
    expected = rows_of(load_backbone(Source(model, tokenizer=tokenizer)), texts)
    backbone = load_backbone(Source(model.cuda(), tokenizer=tokenizer))
    np.testing.assert_allclose(rows_of(backbone, texts, batch_tokens=500), expected, atol=1e-4)
