"""A fitted pipeline, at work elsewhere: as a torch module, and on a text while it grows."""

from skspin._serving.growing import PrefixScorer, PrefixStreamer
from skspin._serving.module import to_torch
from skspin._serving.prefixes import PrefixScores, score_prefixes

__all__ = ["PrefixScorer", "PrefixScores", "PrefixStreamer", "score_prefixes", "to_torch"]
