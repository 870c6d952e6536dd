"""A fitted pipeline in use: as a torch module or ONNX, and on a text while it grows."""

from skspin._serving.export import export_onnx, to_torch
from skspin._serving.growing import PrefixScorer, PrefixStreamer
from skspin._serving.prefixes import PrefixScores, check_threshold, score_prefixes

__all__ = [
    "PrefixScorer",
    "PrefixScores",
    "PrefixStreamer",
    "check_threshold",
    "export_onnx",
    "score_prefixes",
    "to_torch",
]
