"""A fitted pipeline, understood: tokens, neurons, linear form, HTML."""
