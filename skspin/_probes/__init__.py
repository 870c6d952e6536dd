"""Activations and labels in, salient neurons out."""
