"""A fitted pipeline, understood: what tokens add, what neurons respond to, its linear form."""

from skspin._explain.linear import (
    LinearForm,
    classes_of,
    column_and_sign,
    linear_members,
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
    "column_and_sign",
    "to_linear_form",
    "weights_of",
]
