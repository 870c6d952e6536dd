"""Explanations of a fitted pipeline: what each token adds, what a neuron responds to."""

from skspin._explain.linear import (
    LinearForm,
    classes_of,
    linear_members,
    place_of,
    to_linear_form,
    weights_of,
)
from skspin._explain.neurons import explain_neurons
from skspin._explain.tokens import TokenExplanation, explain_tokens

__all__ = [
    "LinearForm",
    "TokenExplanation",
    "classes_of",
    "explain_neurons",
    "explain_tokens",
    "linear_members",
    "place_of",
    "to_linear_form",
    "weights_of",
]
