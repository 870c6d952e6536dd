"""From texts to rows: every text once, whatever the batches, and whatever the texts are."""

import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from extracted_rows import TEXTS, expected_row, load_tiny, rows_of, segments, watching
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, FNetConfig, FNetModel

from skspin._model.batches import extract
from skspin._model.budget import TokenBudget
from skspin._model.files import Source
from skspin._model.registry import load_backbone
from skspin._model.tokens import replace_surrogates


@pytest.fixture
def backbone(tokenizer):
    return load_tiny(tokenizer)


@pytest.fixture(scope="module")
def shared_backbone(tokenizer):
    return load_tiny(tokenizer)


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
        TokenBudget(load_tiny(tokenizer, intermediate_size=width)).tokens for width in (96, 1536)
    )
    assert wide == 4096 and narrow == 16 * wide
    assert TokenBudget(load_tiny(tokenizer), 100).tokens == 100


# Faults, interruptions, progress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_name_their_layer_and_a_remedy(tokenizer, dtype):
    backbone = load_tiny(tokenizer)
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
    model = load_tiny(tokenizer).model
    expected = rows_of(load_backbone(Source(model, tokenizer=tokenizer)), texts)
    backbone = load_backbone(Source(model.cuda(), tokenizer=tokenizer))
    np.testing.assert_allclose(rows_of(backbone, texts, batch_tokens=500), expected, atol=1e-4)
