"""Classify text with the inner neurons of a frozen language model, inside scikit-learn."""

from skspin._display import (
    LayerSalienceDisplay,
    PrefixScoresDisplay,
    SparsityPathDisplay,
    TokenContributionDisplay,
)
from skspin._explain import explain_neurons, explain_tokens
from skspin._model import ModelMismatchError
from skspin._pickling import TRUSTED_TYPES
from skspin._pipeline import make_spin_pipeline
from skspin._prune import prune
from skspin._selector import SalientNeuronSelector
from skspin._serving import PrefixScorer, PrefixStreamer, export_onnx, score_prefixes, to_torch
from skspin._show_versions import show_versions
from skspin._store import open_store
from skspin._transformer import LLMActivationTransformer
from skspin._version import __version__ as __version__

__all__ = [
    "LLMActivationTransformer",
    "LayerSalienceDisplay",
    "ModelMismatchError",
    "PrefixScorer",
    "PrefixScoresDisplay",
    "PrefixStreamer",
    "SalientNeuronSelector",
    "SparsityPathDisplay",
    "TRUSTED_TYPES",
    "TokenContributionDisplay",
    "explain_neurons",
    "explain_tokens",
    "export_onnx",
    "make_spin_pipeline",
    "open_store",
    "prune",
    "score_prefixes",
    "show_versions",
    "to_torch",
]
