"""A fitted pipeline, at work: the scores of a text while it grows."""

from skspin._serving.growing import PrefixScorer, PrefixStreamer
from skspin._serving.prefixes import PrefixScores, score_prefixes

__all__ = ["PrefixScorer", "PrefixScores", "PrefixStreamer", "score_prefixes"]
