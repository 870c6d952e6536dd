"""Classifiers whose decision values are weighted sums of columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.multiclass import OneVsRestClassifier

from skspin._sklearn import LinearClassifierMixin


def linear_parts(head: Any) -> list[Any]:
    """List the linear classifiers that a head is made of, in the order of its decision values.

    Parameters
    ----------
    head : classifier
        Fitted.

    Returns
    -------
    list of classifier
        The head itself, the members of a one-vs-rest head, or nothing if the head or one of its
        members is not linear.
    """
    parts = head.estimators_ if isinstance(head, OneVsRestClassifier) else [head]
    return parts if all(_is_linear(part) for part in parts) else []


def weights_of(part: Any) -> np.ndarray:
    """Read a linear classifier's weights, dense, of shape (n_decision_values, n_columns)."""
    coef = part.coef_.toarray() if issparse(part.coef_) else part.coef_
    return np.atleast_2d(coef)


def _is_linear(head: Any) -> bool:
    # Not every classifier with a coef_ is linear in its input, and a subclass may decide otherwise.
    decide = getattr(type(head), "decision_function", None)
    return decide is LinearClassifierMixin.decision_function and hasattr(head, "coef_")
