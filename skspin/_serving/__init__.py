"""A fitted pipeline, at work elsewhere."""

from skspin._serving.module import to_torch

__all__ = ["to_torch"]
