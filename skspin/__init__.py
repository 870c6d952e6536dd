"""Classify text with the inner neurons of a frozen language model, inside scikit-learn."""

from skspin._display import (
    LayerSalienceDisplay,
    SparsityPathDisplay,
    TokenContributionDisplay,
)
from skspin._explain import explain_tokens
from skspin._frozen_model import ModelMismatchError
from skspin._neurons import explain_neurons
from skspin._persistence import TRUSTED_TYPES
from skspin._pipeline import make_spin_pipeline
from skspin._prune import prune
from skspin._selector import SalientNeuronSelector
from skspin._show_versions import show_versions
from skspin._store import open_store
from skspin._transformer import LLMActivationTransformer

__all__ = [
    "LLMActivationTransformer",
    "LayerSalienceDisplay",
    "ModelMismatchError",
    "SalientNeuronSelector",
    "SparsityPathDisplay",
    "TRUSTED_TYPES",
    "TokenContributionDisplay",
    "explain_neurons",
    "explain_tokens",
    "make_spin_pipeline",
    "open_store",
    "prune",
    "show_versions",
]
__version__ = "0.1.0.dev0"
