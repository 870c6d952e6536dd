"""Pipelines whose decision values are weighted sums of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_selection import SelectorMixin
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler

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


@dataclass(frozen=True)
class LinearForm:
    """Decision values as sums over columns: ``sum_j (weights[k, j] * x[j] + offsets[k, j])``.

    Parameters
    ----------
    weights, offsets : ndarray of shape (n_decision_values, n_columns)
        What a column ``x[j]`` adds to decision value k. The offset is what centring the column
        subtracts, so a column at its centre adds nothing.
    intercept : ndarray of shape (n_decision_values,)
        What no column adds.
    """

    weights: np.ndarray
    offsets: np.ndarray
    intercept: np.ndarray

    @classmethod
    def of_head(cls, head: Any) -> LinearForm | None:
        """Read off a fitted classifier; None if it is not linear."""
        parts = linear_parts(head)
        if not parts:
            return None
        weights = np.vstack([weights_of(part) for part in parts]).astype(np.float64)
        intercept = np.concatenate(
            [np.broadcast_to(p.intercept_, len(weights_of(p))) for p in parts]
        )
        return cls(weights, np.zeros_like(weights), intercept)

    def before(self, step: Any) -> LinearForm | None:
        """Express the same decision values in the columns that a fitted step is given.

        None if the step is not known to be linear.
        """
        if step in (None, "passthrough"):
            return self
        if isinstance(step, SelectorMixin):
            return self._before_selection(step.get_support())
        rule = _RULES.get(type(step))
        return rule(self, step) if rule is not None else None

    def _before_selection(self, support: np.ndarray) -> LinearForm:
        weights, offsets = np.zeros((2, len(self.intercept), len(support)))
        weights[:, support], offsets[:, support] = self.weights, self.offsets
        return replace(self, weights=weights, offsets=offsets)

    def _before_scaling(self, center: Any, scale: Any) -> LinearForm:
        weights = self.weights * scale
        return replace(self, weights=weights, offsets=self.offsets - weights * center)

    def _before_mixing(self, center: Any, matrix: np.ndarray) -> LinearForm:
        """``matrix`` of shape (n_columns after, n_columns before)."""
        weights = self.weights @ matrix
        # A centre behind the mixing belongs to no single column before it.
        return LinearForm(weights, -weights * center, self.intercept + self.offsets.sum(axis=1))


def _standard(form: LinearForm, step: StandardScaler) -> LinearForm:
    center = step.mean_ if step.with_mean else 0.0
    return form._before_scaling(center, 1 / step.scale_ if step.with_std else 1.0)


def _robust(form: LinearForm, step: RobustScaler) -> LinearForm:
    center = step.center_ if step.with_centering else 0.0
    return form._before_scaling(center, 1 / step.scale_ if step.with_scaling else 1.0)


def _min_max(form: LinearForm, step: MinMaxScaler) -> LinearForm | None:
    if step.clip:
        return None
    return form._before_scaling(-step.min_ / step.scale_, step.scale_)


def _max_abs(form: LinearForm, step: MaxAbsScaler) -> LinearForm | None:
    if getattr(step, "clip", False):
        return None
    return form._before_scaling(0.0, 1 / step.scale_)


def _pca(form: LinearForm, step: PCA) -> LinearForm:
    matrix = step.components_  # (n_components, n_columns)
    if step.whiten:
        matrix = matrix / np.sqrt(step.explained_variance_)[:, None]
    return form._before_mixing(step.mean_, matrix)


def _svd(form: LinearForm, step: TruncatedSVD) -> LinearForm:
    return form._before_mixing(0.0, step.components_)


# By exact type, because a subclass may do something else.
_RULES: dict[type, Callable[[LinearForm, Any], LinearForm | None]] = {
    StandardScaler: _standard,
    RobustScaler: _robust,
    MinMaxScaler: _min_max,
    MaxAbsScaler: _max_abs,
    PCA: _pca,
    TruncatedSVD: _svd,
}
