"""Text in, pooled activations out: the only folder that touches torch models."""
