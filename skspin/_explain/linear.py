"""Pipelines whose decision values are weighted sums of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_selection import SelectorMixin
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.svm import SVC, NuSVC

from skspin._pipeline import PrunedStep, flatten, instead_of
from skspin._sklearn import LinearClassifierMixin, _ConstantPredictor
from skspin._transformer import LLMActivationTransformer

# Heads that hold one classifier per decision value, or several per output.
_HEADS_OF_MEMBERS = (OneVsRestClassifier, MultiOutputClassifier)


def linear_members(head: Any) -> list[Any]:
    """List a head's classifiers, if all decide by a weighted sum of columns; else nothing."""
    members = head.estimators_ if isinstance(head, _HEADS_OF_MEMBERS) else [head]
    return members if all(_decides_as(member, LinearClassifierMixin) for member in members) else []


def weights_of(classifier: Any) -> np.ndarray:
    """Read a linear classifier's weights, dense, of shape (n_decision_values, n_columns)."""
    coef = classifier.coef_
    return np.atleast_2d(coef.toarray() if issparse(coef) else coef)


def classes_of(head: Any) -> np.ndarray:
    """Return a head's classes: for several outputs their numbers, or (number, class) pairs."""
    if not isinstance(head.classes_, list):
        return head.classes_
    if all(len(classes) == 2 for classes in head.classes_):
        return np.arange(len(head.classes_))
    pairs = [
        (output, label)
        for output, classes in enumerate(head.classes_)
        for label in (classes[1:] if len(classes) == 2 else classes).tolist()
    ]
    names = np.empty(len(pairs), dtype=object)
    names[:] = pairs
    return names


def column_and_sign(label: Any, classes: np.ndarray, n_values: int) -> tuple[int, int]:
    """Find a class's column among decision values, and its sign there (-1: against the class)."""
    labels = classes.tolist()
    if label not in labels:
        raise ValueError(
            f"label={label!r} must be one of the classes {labels}. Pass one of them, e.g. "
            f"label={labels[0]!r}."
        )
    number = labels.index(label)
    # Two classes may share one value, in favour of the second.
    return (0, 2 * number - 1) if (n_values, len(labels)) == (1, 2) else (number, 1)


@dataclass(frozen=True)
class LinearForm:
    """Decision values as sums over columns: ``sum_j (weights[k, j] * x[j] + offsets[k, j])``.

    ``intercept`` is added to that sum. An offset is what centring its column subtracts, so a column
    at its centre adds nothing.
    """

    weights: np.ndarray  # (n_decision_values, n_columns)
    offsets: np.ndarray  # (n_decision_values, n_columns)
    intercept: np.ndarray  # (n_decision_values,)

    @classmethod
    def of(cls, classifier: Any) -> LinearForm:
        """Read the form off a fitted classifier or pipeline, or refuse one that is not linear."""
        *steps, head = flatten(classifier)
        if isinstance(head, _HEADS_OF_MEMBERS):
            form = cls._of_members(head)
        elif _decides_as(head, LinearClassifierMixin, LinearDiscriminantAnalysis, SVC):
            weights = weights_of(head).astype(np.float64)
            intercept = np.broadcast_to(head.intercept_, len(weights))
            form = cls(weights, np.zeros_like(weights), intercept)
        else:
            raise ValueError(_why_not(head))
        for step in reversed(steps):
            form = form.before(step)
        return form

    @classmethod
    def _of_members(cls, head: Any) -> LinearForm:
        constant = [isinstance(member, _ConstantPredictor) for member in head.estimators_]
        if all(constant):
            raise ValueError(_why_not(head))
        linear = cls.of(head.estimators_[constant.index(False)])
        nothing = np.zeros((1, linear.weights.shape[1]))
        forms = [
            cls(nothing, nothing, np.ravel(member.y_)) if is_constant else cls.of(member)
            for member, is_constant in zip(head.estimators_, constant, strict=True)
        ]
        return cls(
            np.vstack([form.weights for form in forms]),
            np.vstack([form.offsets for form in forms]),
            np.concatenate([form.intercept for form in forms]),
        )

    def before(self, step: Any) -> LinearForm:
        """Express the same decision values in the columns that a fitted step is given."""
        if isinstance(step, SelectorMixin):
            support = step.get_support()
            weights, offsets = np.zeros((2, len(self.intercept), len(support)))
            weights[:, support], offsets[:, support] = self.weights, self.offsets
            form = replace(self, weights=weights, offsets=offsets)
            for inner in reversed([*flatten(step.left_)] if isinstance(step, PrunedStep) else []):
                form = form.before(inner)
            return form
        if type(step) in _MIXINGS:
            center, matrix = _MIXINGS[type(step)](step)
            weights = self.weights @ matrix
            # Offsets of columns after the mixing belong to no single column before it.
            return LinearForm(weights, -weights * center, self.intercept + self.offsets.sum(axis=1))
        if type(step) in _SCALINGS and not getattr(step, "clip", False):
            center, scale = _SCALINGS[type(step)](step)
            weights = self.weights / scale
            return replace(self, weights=weights, offsets=self.offsets - weights * center)
        raise ValueError(
            f"{type(step).__name__} is not known to be linear in its columns (with clipping no "
            "scaler is), so decisions are no sum over tokens. Selectors, scalers, PCA and "
            "TruncatedSVD may be between activations and classifier."
        )


def to_linear_form(pipeline: Any) -> tuple[LLMActivationTransformer, LinearForm]:
    """Split a pipeline into the activations in use, and its decision values as sums over them."""
    *steps, head = flatten(pipeline)
    form = LinearForm.of(head)
    for step in reversed(steps):
        if isinstance(step, LLMActivationTransformer):
            used = np.any(form.weights, axis=0)  # (n_columns,)
            used[0] |= not used.any()  # without a column, no tokens would be read
            weights, offsets = form.weights[:, used], form.offsets[:, used]
            return step._restrict_to(used), LinearForm(weights, offsets, form.intercept)
        form = form.before(step)
    raise ValueError("No step of the pipeline is an LLMActivationTransformer.")


# A scaler's centre and scale, and a mixing's centre and matrix (n_columns after, n_columns before);
# by exact type, because a subclass may do something else.
_SCALINGS: dict[type, Callable[[Any], tuple[Any, Any]]] = {
    StandardScaler: lambda step: (
        step.mean_ if step.with_mean else 0.0,
        step.scale_ if step.with_std else 1.0,
    ),
    RobustScaler: lambda step: (
        step.center_ if step.with_centering else 0.0,
        step.scale_ if step.with_scaling else 1.0,
    ),
    MinMaxScaler: lambda step: (-step.min_ / step.scale_, 1 / step.scale_),
    MaxAbsScaler: lambda step: (0.0, step.scale_),
}
_MIXINGS: dict[type, Callable[[Any], tuple[Any, Any]]] = {
    PCA: lambda step: (
        step.mean_,
        step.components_ / (_deviations(step)[:, None] if step.whiten else 1.0),
    ),
    TruncatedSVD: lambda step: (0.0, step.components_),
}


def _deviations(pca: PCA) -> np.ndarray:
    """Return what whitening divides by, which is never 0."""
    variance = pca.explained_variance_
    return np.maximum(np.sqrt(variance), np.finfo(variance.dtype).eps)


def _decides_as(classifier: Any, *kinds: Any) -> bool:
    """Whether a classifier decides by a weighted sum of columns, as one of some kinds does."""
    if isinstance(classifier, SVC | NuSVC) and len(classifier.classes_) > 2:
        return False  # it counts votes of pairs of classes
    # Not every classifier with a coef_ is linear in its input, and a subclass may decide otherwise.
    decide = getattr(type(classifier), "decision_function", None)
    return hasattr(classifier, "coef_") and decide in [kind.decision_function for kind in kinds]


def _why_not(head: Any) -> str:
    name = type(head).__name__
    if not hasattr(head, "classes_"):
        return f"The pipeline ends in a {name}, but a linear classifier is needed at its end."
    if inside := instead_of(head):
        return (
            f"{name} changes what a classifier inside it decides, so decisions are no sums over "
            f"tokens. Explain a pipeline that ends in that classifier.{inside}"
        )
    if isinstance(head, OneVsOneClassifier) or getattr(head, "kernel", None) == "linear":
        return (
            f"{name} with {len(head.classes_)} classes takes the votes of classifiers, one for "
            "each pair of classes, which are no sums over tokens. Use OneVsRestClassifier around a "
            "linear classifier, or LinearSVC: they have a decision value for each class."
        )
    return (
        f"{name} is not linear in its columns, so its decisions are no sum over tokens. Use a "
        "linear classifier such as LogisticRegression, or look at whole columns with "
        "sklearn.inspection.permutation_importance."
    )
