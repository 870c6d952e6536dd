"""Quantised models, made by the libraries that people use for it, on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from skspin import LLMActivationTransformer
from skspin._model.registry import forget_models
from skspin.datasets import demo_model

pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries warn of what they do not find
TEXTS = ["A fine film.", "Dreadful.", "It drags on and on, and then it ends."]
SITES = ("hidden", "mlp", "attention")


@pytest.fixture(params=["torchao", "bitsandbytes"])
def quantization(request):
    pytest.importorskip(request.param)
    if request.param == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def cosine(one, other):
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def test_a_quantised_model_is_another_model_with_activations_of_its_own(quantization):
    settings = {"site": SITES, "dtype": "float32", "cache": None}
    quantised = LLMActivationTransformer(
        demo_model(), **settings, model_kwargs={"quantization_config": quantization}
    )
    X = np.asarray(quantised.fit_transform(TEXTS))
    plain = LLMActivationTransformer(demo_model(), **settings)
    whole = np.asarray(plain.fit_transform(TEXTS))
    assert quantised.model_fingerprint_ != plain.model_fingerprint_
    assert X.shape == whole.shape and not np.allclose(X, whole, rtol=1e-4)
    assert cosine(X, whole).min() > 0.995

    model = transformers.AutoModel.from_pretrained(
        demo_model(), quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model())
    hidden = LLMActivationTransformer(model, tokenizer=tokenizer, cache=None)
    rows = np.asarray(hidden.fit_transform(TEXTS))  # the same model, passed in
    for text, row in zip(TEXTS, rows, strict=True):
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt")
            states = model(**inputs, output_hidden_states=True).hidden_states
        expected = torch.cat([state[0].mean(0) for state in states]).float().numpy()
        # 8-bit products depend on what else is in a batch, as they share a scale.
        assert cosine(row[None], expected[None]).min() > 0.999


@pytest.fixture(autouse=True)
def _release():
    yield
    forget_models()
