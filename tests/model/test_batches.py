"""From texts to rows: every text once, whatever the batches, and whatever the texts are."""

import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from bert_files import tiny
from extracted_rows import TEXTS, expected_row, layout_of, recipe_of, rows_of, watching
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY, tiny_tokenizer
from transformers import ByT5Tokenizer, FNetConfig, FNetModel

from skspin import LLMActivationTransformer
from skspin._model import extract


@pytest.fixture
def recipe(tokenizer):
    return recipe_of(tiny(), tokenizer)


@pytest.fixture(scope="module")
def shared(tokenizer):
    model = tiny()
    return model, {n: recipe_of(model, tokenizer, batch_tokens=n) for n in (1, 30, 200, "auto")}


# What batches may not change


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(TEXTS),
        min_size=1,
        max_size=12,
    ),
    batch_tokens=st.sampled_from([1, 30, 200, "auto"]),
)
def test_rows_do_not_depend_on_batches_or_order(shared, tokenizer, texts, batch_tokens):
    model, recipes = shared
    rows = rows_of(recipes[batch_tokens], texts)
    for text, row in zip(texts, rows, strict=True):
        np.testing.assert_allclose(
            row, expected_row(model, tokenizer(text)["input_ids"]), atol=1e-5
        )


def test_equal_texts_go_through_the_model_once(tokenizer):
    model, seen = tiny(), []
    transformer = LLMActivationTransformer(model, tokenizer=tokenizer, cache=None)
    with watching(model, lambda ids: seen.append(len(ids))):
        rows = transformer.fit_transform(TEXTS * 50)
    assert sum(seen) == len(set(TEXTS))
    np.testing.assert_array_equal(rows, np.tile(rows[: len(TEXTS)], (50, 1)))


def test_no_text_is_no_work(recipe):
    assert list(extract(recipe, [], layout_of())) == []


def sentences(n_texts):
    """Texts about as long as SST-2's."""
    lengths = np.clip(np.random.default_rng(0).gamma(2.4, 10, n_texts).astype(int), 2, 64)
    return [f"{i} " + "w " * n for i, n in enumerate(lengths)]


def shapes_of(recipe, texts, **options):
    shapes = []
    with watching(recipe.source.model, lambda ids: shapes.append(tuple(ids.shape))):
        rows_of(recipe, texts, **options)
    return shapes


@pytest.fixture
def one_thread():
    """Have one batch at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_padding_is_under_three_percent(tokenizer, one_thread):
    texts = sentences(4000)
    real = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    recipe = recipe_of(tiny(), tokenizer, batch_tokens=4096)
    sizes = [n_texts * n_tokens for n_texts, n_tokens in shapes_of(recipe, texts)]
    assert max(sizes) <= 4096 and 1 - real / sum(sizes) < 0.03
    assert len(sizes) < 2 * real / 4096


def test_texts_are_in_one_batch_only_with_texts_of_their_length_where_padding_leaks():
    # FNet mixes all tokens of a row by a Fourier transform, padding included.
    config = FNetConfig(vocab_size=300, hidden_size=8, num_hidden_layers=2, intermediate_size=12)
    recipe = recipe_of(FNetModel(config).eval(), ByT5Tokenizer())
    texts = ["abc", "abcd", "ab", "dcb"]
    assert sorted(shapes_of(recipe, texts)) == [(1, 3), (1, 5), (2, 4)]
    np.testing.assert_allclose(rows_of(recipe, texts)[1], rows_of(recipe, texts[1:2])[0], atol=1e-6)


def test_a_text_whose_positions_are_scaled_is_in_one_batch_only_with_texts_of_its_length(
    one_thread,
):
    model, tokenizer = TINY["phi3-128k"].build(), tiny_tokenizer()  # scaled beyond 16 tokens
    recipe, layout = recipe_of(model, tokenizer), layout_of(3, 24)
    texts = [f"word{i} " * (n - 2) for i, n in enumerate([9, 18, 20, 5, 16, 18, 17])]
    expected = [expected_row(model, tokenizer(text)["input_ids"]) for text in texts]
    assert shapes_of(recipe, texts, layout=layout) == [(1, 20), (2, 18), (1, 17), (3, 16)]
    np.testing.assert_allclose(rows_of(recipe, texts, layout), expected, atol=1e-5)
    with watching(model, too_large(32, MemoryError())):  # after which batches are halved
        np.testing.assert_allclose(rows_of(recipe, texts, layout), expected, atol=1e-5)
    shapes = [(1, 20), (1, 18), (1, 18), (1, 17), (1, 16), (1, 9), (1, 5)]
    assert shapes_of(recipe, texts, layout=layout) == shapes


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
def test_a_batch_that_does_not_fit_is_halved_for_good_until_it_is_one_text(recipe, error):
    texts = sentences(200)
    expected = rows_of(recipe, texts)
    with watching(recipe.source.model, too_large(150, error)):
        np.testing.assert_allclose(rows_of(recipe, texts), expected, atol=1e-5)
    assert 75 <= max(np.prod(shape) for shape in shapes_of(recipe, texts)) <= 150
    with (
        watching(recipe.source.model, too_large(20, error)),
        pytest.raises(MemoryError, match="One text of 32 tokens does not fit.*max_length"),
    ):
        rows_of(recipe, TEXTS)


def test_the_budget_follows_the_models_width(tokenizer, one_thread):
    largest = {}
    for width in (96, 1536):
        recipe = recipe_of(tiny(intermediate_size=width), tokenizer)
        sizes = [np.prod(shape) for shape in shapes_of(recipe, ["w " * 30] * 2500)]
        largest[width] = max(sizes)
    assert 0.99 * 4096 < largest[1536] <= 4096
    assert 0.99 * 16 * 4096 < largest[96] <= 16 * 4096


# Faults, interruptions, progress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_name_their_layer_and_a_remedy(tokenizer, dtype):
    model = tiny()
    model.encoder.layer[1].output.LayerNorm.weight.data[3] = torch.inf
    recipe = recipe_of(model.to(getattr(torch, dtype)), tokenizer)
    remedy = "weights" if dtype == "float32" else "dtype='float32'"
    with pytest.raises(ValueError, match=f"layer 2 at site 'hidden'.*dtype='{dtype}'.*{remedy}"):
        rows_of(recipe, TEXTS)


def tokenizing_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("skspin-tokenize")]


def test_what_was_yielded_before_an_interruption_is_final(tokenizer):
    recipe = recipe_of(tiny(), tokenizer, batch_tokens=100)
    texts = [f"{i} " + "w " * 20 for i in range(100)]
    expected = rows_of(recipe, texts)
    kept = {}

    class Interruption(KeyboardInterrupt):
        pass

    def interrupt(ids):
        if len(kept) >= 40:
            raise Interruption

    with watching(recipe.source.model, interrupt), pytest.raises(Interruption):
        for rows in extract(recipe, texts, layout_of()):
            kept.update(zip(rows.positions.tolist(), rows.values, strict=True))
    assert 40 <= len(kept) < 100
    for position, row in kept.items():
        np.testing.assert_allclose(row, expected[position], atol=1e-5)
    assert not tokenizing_threads()


def test_a_caller_who_leaves_early_leaves_no_thread_behind(tokenizer):
    recipe = recipe_of(tiny(), tokenizer, batch_tokens=100)
    texts = [f"{i} " + "w " * 20 for i in range(3000)]
    with closing(extract(recipe, texts, layout_of(0))) as rows:
        next(rows)
        assert tokenizing_threads()
    assert not tokenizing_threads()


def test_nothing_is_shown_unless_asked_for(tokenizer, capfd):
    rows_of(recipe_of(tiny(), tokenizer), TEXTS)
    assert capfd.readouterr() == ("", "")
    rows_of(recipe_of(tiny(), tokenizer, verbose=1), TEXTS)
    out, shown = capfd.readouterr()
    assert out == ""
    assert "6/6" in shown and "texts" in shown and "tokens/s" in shown
