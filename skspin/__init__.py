"""Classify text with the inner neurons of a frozen language model, inside scikit-learn."""

__version__ = "0.1.0.dev0"
