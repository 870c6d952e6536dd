"""Activations at tokens, pooled by hand, are what the transformer gives for the text."""

import numpy as np
import pytest
from growing_texts import POOL, POOLINGS
from tiny_models import TINY, tiny_tokenizer

from skspin import LLMActivationTransformer
from skspin._model import token_activations

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
