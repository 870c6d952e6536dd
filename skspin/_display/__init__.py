"""Displays in scikit-learn's style; matplotlib is imported when one is drawn."""

from skspin._display.scores import LayerSalienceDisplay, SparsityPathDisplay
from skspin._display.texts import PrefixScoresDisplay, TokenContributionDisplay

__all__ = [
    "LayerSalienceDisplay",
    "PrefixScoresDisplay",
    "SparsityPathDisplay",
    "TokenContributionDisplay",
]
