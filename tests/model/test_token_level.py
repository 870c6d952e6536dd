"""Activations at tokens, pooled by hand, are what the transformer gives for the text."""

import numpy as np
import pytest
import torch
from growing_texts import POOL, POOLINGS
from tiny_models import TINY, tiny_tokenizer

from skspin import LLMActivationTransformer
from skspin._model import batches, token_activations

# Absolute, learnt, rotary and relative positions, mixing without attention, one stack and two.
NAMES = ["bert", "roberta", "deberta-v2", "gpt2", "llama", "gemma2", "xlnet", "fnet", "t5", "bart"]
TEXTS = [
    "word1 word2 word3",
    "word4",
    "",
    "word5 word6 word7 word8 word9 word5",
    "word4",  # again
    "word2 " * 40,  # is cut
    "unknown 😀 שלום word1",
]


def fitted(name, prompt, padding_side):
    tiny = TINY[name]
    model = tiny.build()
    transformer = LLMActivationTransformer(
        model,
        tokenizer=tiny_tokenizer(padding_side),
        site=("hidden", *(site for site in ("mlp", "attention") if getattr(tiny, site))),
        pooling=POOLINGS,
        stack=("encoder", "decoder") if model.config.is_encoder_decoder else "encoder",
        prompt=prompt,
        max_length=12,
        dtype="float32",
        cache=None,
    )
    return transformer.fit(TEXTS)


@pytest.mark.filterwarnings("ignore:.*were truncated")
@pytest.mark.parametrize(
    ("prompt", "padding_side"), [(None, "left"), ("word9 {text} word8", "right")]
)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_pool_to_the_transformers_output(name, prompt, padding_side):
    transformer = fitted(name, prompt, padding_side)
    pooled = np.asarray(transformer.transform(TEXTS))
    recipe, seen = transformer._fitted_recipe(conversations=False), set()
    for text, tokens, activations in token_activations(recipe, TEXTS, transformer.layout_):
        seen.add(text)
        row = pooled[TEXTS.index(text)]
        assert len(tokens.tokens) == len(activations) <= 12
        layout = transformer.layout_
        for segment, columns in zip(layout.segments, layout.slices, strict=True):
            by_hand = POOL[segment.pooling](activations[:, columns].astype(np.float64))
            size = 1 + np.abs(activations[:, columns]).max()
            np.testing.assert_allclose(
                row[columns], by_hand, atol=2e-5 * size, err_msg=str(segment)
            )
    assert seen == set(TEXTS)


@pytest.mark.parametrize("batch_tokens", [20, "auto"])
def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch, batch_tokens):
    transformer = fitted("bert", None, "right").set_params(batch_tokens=batch_tokens)
    texts = [f"word{i} word2 word3" for i in range(30)]
    recipe, sizes, run = transformer._fitted_recipe(conversations=False), [], batches.read

    def read(anatomy, inputs, *others, **options):
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(anatomy, inputs, *others, **options)

    monkeypatch.setattr(batches, "read", read)
    found = {text: a for text, _, a in token_activations(recipe, texts, transformer.layout_)}
    assert found.keys() == set(texts) and sizes[-1] <= 40
    assert max(sizes) > 40 if batch_tokens == "auto" else max(sizes) <= 20


def test_activations_that_are_not_finite_are_refused():
    transformer = fitted("gpt2", None, "right")
    with torch.no_grad():
        transformer.model.h[1].mlp.c_proj.weight.fill_(float("inf"))
    recipe = transformer.fit(TEXTS)._fitted_recipe(conversations=False)
    with pytest.raises(ValueError, match="layer 2 at site 'hidden' are not finite"):
        list(token_activations(recipe, TEXTS[:2], transformer.layout_))
