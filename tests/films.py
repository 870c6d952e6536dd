"""A few short texts about films, and steps on the demo model that are soon fitted to them."""

from skspin import LLMActivationTransformer, SalientNeuronSelector
from skspin.datasets import demo_model

TEXTS = ["A fine film.", "Lovely.", "What a joy.", "A bore.", "Dreadful.", "It drags on."] * 3
LABELS = [1, 1, 1, 0, 0, 0] * 3
NEW = ["A lovely film, unbelievably dreadful.", "", "Bore!", "x" * 40]


def activations(**params):
    params = {"layers": [1, 2], "dtype": "float32", "device": "cpu"} | params
    return LLMActivationTransformer(demo_model(), **params)


def select(**params):
    return SalientNeuronSelector(**({"sparsity": 0.2, "C": 1.0, "tol": 0.05} | params))
