"""Displays in scikit-learn's style; matplotlib is imported when one is drawn."""

from skspin._display.layers import LayerSalienceDisplay
from skspin._display.prefixes import PrefixScoresDisplay
from skspin._display.sparsity import SparsityPathDisplay
from skspin._display.tokens import TokenContributionDisplay

__all__ = [
    "LayerSalienceDisplay",
    "PrefixScoresDisplay",
    "SparsityPathDisplay",
    "TokenContributionDisplay",
]
