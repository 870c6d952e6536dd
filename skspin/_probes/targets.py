"""From labels to the binary problems that probes solve, and the score of a probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import xxhash
from scipy.sparse import issparse
from sklearn.exceptions import DataConversionWarning
from sklearn.preprocessing import label_binarize
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from skspin._probes.tensors import to_host
from skspin._system import warn

_SOME_COLUMNS = 32
# Rows whose sums of products with these differ are not equal.
_FACTORS = np.random.RandomState(0).randint(2**63, size=1 + 2 * _SOME_COLUMNS, dtype=np.uint64) | 1


@dataclass(frozen=True)
class Targets:
    """One problem for a binary target, one per class or label for the others."""

    classes: np.ndarray  # (n_classes,), sorted; of a multilabel indicator the column numbers
    rows: slice | np.ndarray  # the rows of y with a weight above 0; n_texts of them
    signs: np.ndarray  # (n_texts, n_problems), float32: +1 where a text is in the class, or -1
    weights: np.ndarray  # (n_texts, n_problems): sample weight times class weight
    row_weights: np.ndarray  # (n_texts,): sample weight alone
    strata: np.ndarray  # (n_texts,), int: the same for the same label, or set of labels
    exclusive: bool  # whether a text has exactly one class

    @property
    def n_problems(self) -> int:
        """1 for a binary target, else the number of classes or labels."""
        return self.signs.shape[1]

    def score(self, decision: np.ndarray, rows: np.ndarray) -> float:
        """Compute the weighted accuracy of decisions (n_rows, n_problems), over all labels."""
        signs, weights = self.signs[rows], self.weights[rows]  # (n_rows, n_problems)
        if not weights.any():  # only classes of weight 0
            weights = np.ones(weights.shape)
        if self.exclusive and self.n_problems > 1:
            right = decision.argmax(axis=1) == signs.argmax(axis=1)  # (n_rows,)
            return float(np.average(right, weights=weights[:, 0]))
        right = (decision > 0) == (signs > 0)  # (n_rows, n_problems)
        return float(np.average(right, weights=weights))


def encode_targets(
    y: Any,  # array or sparse matrix of shape (n_texts,) or (n_texts, n_labels)
    sample_weight: np.ndarray | None = None,  # (n_texts,), not negative
    class_weight: Mapping[Any, float] | list[Mapping[Any, float]] | str | None = None,
) -> Targets:
    """Turn labels into binary problems; a text of weight 2 counts twice, of weight 0 not at all."""
    if issparse(y):
        y = y.toarray()
    if y.ndim == 2 and y.shape[1] == 1:
        warn(
            "A column-vector y was passed when a 1d array was expected. Please change the shape of "
            "y to (n_samples,), for example using ravel().",
            DataConversionWarning,
        )
        y = y.ravel()
    rows: slice | np.ndarray = slice(None)
    base = np.ones(len(y)) if sample_weight is None else sample_weight.astype(np.float64)
    if not base.all():
        rows = np.flatnonzero(base)
        y, base = y[rows], base[rows]
    check_classification_targets(y)
    _check_class_weight(class_weight)
    kind = type_of_target(y)
    if kind == "multiclass-multioutput":
        raise ValueError(
            "y has several columns of classes; allowed are one column of classes or a multilabel "
            "indicator of zeros and ones. Fit one selector per column."
        )
    if kind == "multilabel-indicator":
        if not np.isin(y, (0, 1)).all():
            raise ValueError(
                f"y is a multilabel indicator of {np.unique(y).tolist()}; allowed are 0 and 1."
            )
        indicator = np.asarray(y) != 0  # (n_texts, n_labels)
        weights = _label_weights(indicator, class_weight, base)
        strata = np.unique(indicator, axis=0, return_inverse=True)[1].reshape(-1)
        labels = np.arange(y.shape[1])
        return Targets(labels, rows, _signs(indicator), weights, base, strata, exclusive=False)

    classes, strata = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"y has one class ({classes[0]!r}), but a probe needs at least 2 classes to tell apart."
        )
    indicator = label_binarize(strata, classes=np.arange(len(classes))) != 0
    weights = _weights(class_weight, y, base)
    weights = np.repeat(weights[:, None], indicator.shape[1], axis=1)
    return Targets(classes, rows, _signs(indicator), weights, base, strata, exclusive=True)


def _check_class_weight(class_weight: Any) -> None:
    for table in class_weight if isinstance(class_weight, list) else [class_weight]:
        weights = table.values() if isinstance(table, Mapping) else []
        if not all(isinstance(weight, Real) and 0 <= float(weight) < np.inf for weight in weights):
            raise ValueError(
                f"class_weight={class_weight!r} must give each class a finite number that is not "
                "negative."
            )


def _signs(indicator: np.ndarray) -> np.ndarray:
    return np.where(indicator, np.float32(1), np.float32(-1))


def _weights(class_weight: Any, y: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Multiply sample weights by class weights, (n_texts,)."""
    if class_weight != "balanced":
        return compute_sample_weight(class_weight, y) * base
    classes, codes = np.unique(y, return_inverse=True)
    counts = np.bincount(codes, weights=base)  # (n_classes,): rows, each as often as it counts
    return (counts.sum() / (len(classes) * counts))[codes] * base


def _label_weights(indicator: np.ndarray, class_weight: Any, base: np.ndarray) -> np.ndarray:
    # scikit-learn multiplies the weights of all labels into one; here each label is a problem by
    # itself and takes only its own weights.
    per_label = (
        class_weight if isinstance(class_weight, list) else [class_weight] * indicator.shape[1]
    )
    if len(per_label) != indicator.shape[1]:
        raise ValueError(
            f"class_weight has {len(per_label)} dicts for {indicator.shape[1]} labels; "
            "give one dict per label, 'balanced' or None."
        )
    columns = [
        _weights(weight, label.astype(int), base)
        for weight, label in zip(per_label, indicator.T, strict=True)
    ]
    return np.stack(columns, axis=1)


def validation_rows(
    X: Any, targets: Targets, fraction: float, random_state: np.random.RandomState
) -> np.ndarray:
    """Choose a share of the targets' distinct rows, at least one, stratified, in ascending order.

    Copies of a row are chosen together. So repeating a row has the same effect as a larger weight,
    and no probe is scored on a row that it was fitted to.
    """
    numbers = _number_distinct_rows(X, targets)  # (n_texts,)
    strata = targets.strata[np.unique(numbers, return_index=True)[1]]  # (n_distinct,)
    # Rows are sorted by stratum, shuffled within it, and every (1 / fraction)-th is taken. So each
    # stratum, however rare, gives its share to within one row; scikit-learn's splitters refuse
    # strata of one row.
    order = random_state.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[np.diff(np.ceil(np.arange(len(order) + 1) * fraction)) > 0]] = True
    return np.flatnonzero(chosen[numbers])


def _number_distinct_rows(X: Any, targets: Targets) -> np.ndarray:
    """Give equal rows with equal labels one number, by first appearance: (n_texts,)."""
    some = to_host(X[:, -_SOME_COLUMNS:][targets.rows])  # (n_texts, n_some)
    some = np.ascontiguousarray(some).view(np.uint32)
    words = np.column_stack([targets.strata, some]).astype(np.uint64)
    codes = (words * _FACTORS[: words.shape[1]]).sum(axis=1)  # (n_texts,)
    _, code, counts = np.unique(codes, return_inverse=True, return_counts=True)
    alike = np.flatnonzero(counts[code] > 1)
    if not alike.size:
        return np.arange(len(codes))
    # Most rows differ in a few columns already. The others are read whole.
    keys: list[Any] = codes.tolist()
    rows = np.arange(len(X))[targets.rows]  # (n_texts,)
    for i in alike:
        keys[i] = targets.strata[i], xxhash.xxh3_128_digest(to_host(X[rows[i]]).tobytes())
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])
