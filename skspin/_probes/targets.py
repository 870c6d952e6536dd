"""From labels to the binary problems that probes solve, and the score of a probe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import xxhash
from scipy.sparse import issparse
from sklearn.exceptions import DataConversionWarning
from sklearn.preprocessing import label_binarize
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from skspin._probes.columns import to_host
from skspin._system import warn
from skspin._texts import is_missing

_SOME_COLUMNS = 32


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


def check_labels(y: Any) -> None:
    """Refuse a row of ``y`` that holds no label or several, and strings among other labels."""
    y = to_host(y)
    if len(getattr(y, "shape", (0,))) != 1 or (isinstance(y, np.ndarray) and y.dtype != object):
        return  # several columns, or labels of one type
    labels = np.asarray(y, dtype=object)  # lists of several lengths, too
    for row, label in enumerate(labels if labels.ndim == 1 else []):
        if is_missing(label):
            raise ValueError(f"y[{row}] is {label!r}, but must be a label. Drop texts without one.")
        is_one = isinstance(label, str | bytes) or getattr(label, "shape", None) == ()
        if isinstance(label, Collection) and not is_one:
            raise ValueError(
                f"y[{row}] is {label!r:.40}, but must be one label. For several, pass "
                "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y)."
            )
        if isinstance(label, str) != isinstance(labels[0], str):
            raise ValueError(
                f"y[{row}] is {label!r}, but y[0] is {labels[0]!r}; labels must be all str, or all "
                "numbers. Convert them first, e.g. with str(label)."
            )


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
    kind = type_of_target(y)
    if kind == "multiclass-multioutput":
        raise ValueError(
            "y has several columns of classes; allowed are one column of classes or a multilabel "
            "indicator of zeros and ones. Fit one selector per column; for lists of labels, pass "
            "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y)."
        )
    exclusive = kind != "multilabel-indicator"
    classes, indicator, strata = _one_class_each(y) if exclusive else _several_labels(y)
    # scikit-learn multiplies the class weights of all labels into one; here each label is a problem
    # by itself and takes only its own weights.
    columns = [y] if exclusive else list(indicator.T)
    by_label = isinstance(class_weight, list) and not exclusive
    tables: Any = class_weight if by_label else [class_weight] * len(columns)
    if len(tables) != len(columns):
        raise ValueError(
            f"class_weight has {len(tables)} dicts for {len(columns)} labels; "
            "give one dict per label, 'balanced' or None."
        )
    weights = [_weigh(table, column, base) for table, column in zip(tables, columns, strict=True)]
    return Targets(
        classes=classes,
        rows=rows,
        signs=np.where(indicator, np.float32(1), np.float32(-1)),
        weights=np.broadcast_to(np.stack(weights, axis=1), indicator.shape),
        row_weights=base,
        strata=strata,
        exclusive=exclusive,
    )


def _one_class_each(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the classes, which problem's class each text is in, and the strata."""
    classes, codes = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"y has one class ({classes.tolist()[0]!r}), but a probe needs at least 2 classes to "
            "tell apart. Add texts of another class."
        )
    return classes, label_binarize(codes, classes=np.arange(len(classes))), codes


def _several_labels(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the numbers of the labels, which of them each text has, and the strata."""
    if not np.isin(y, (0, 1)).all():
        raise ValueError(
            f"y is a multilabel indicator of {np.unique(y).tolist()}; allowed are 0 and 1."
        )
    strata = np.unique(y, axis=0, return_inverse=True)[1].reshape(-1)
    return np.arange(y.shape[1]), y.astype(int), strata


def _weigh(class_weight: Any, y: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Multiply sample weights by class weights, (n_texts,)."""
    given = class_weight.values() if isinstance(class_weight, Mapping) else []
    if not all(isinstance(weight, Real) and 0 <= float(weight) < np.inf for weight in given):
        raise ValueError(
            f"class_weight={class_weight!r} must give each class a finite number that is not "
            "negative."
        )
    classes, codes = np.unique(y, return_inverse=True)
    by_class = compute_class_weight(class_weight, classes=classes, y=y, sample_weight=base)
    return by_class[codes] * base


def validation_rows(
    X: Any, targets: Targets, fraction: float, random_state: np.random.RandomState
) -> np.ndarray:
    """Choose a share of the targets' distinct rows, at least one, stratified, in ascending order.

    Copies of a row and its label are chosen together. So repeating them has the same effect as a
    larger weight, and no probe is scored on a row and label that it was fitted to.
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
    if chosen.all() and len(chosen) > 1:
        raise ValueError(
            f"validation_fraction={fraction} holds out all {len(chosen)} distinct rows, so none is "
            "left to fit a probe to. Use a smaller one."
        )
    return np.flatnonzero(chosen[numbers])


def _number_distinct_rows(X: Any, targets: Targets) -> np.ndarray:
    """Give equal rows with equal labels one number, by first appearance: (n_texts,)."""
    # Most rows differ in a few columns already. The others are read whole.
    some = to_host(X[:, -_SOME_COLUMNS:][targets.rows]) + 0.0  # (n_texts, n_some), without -0.0
    keys: list[Any] = [
        (stratum, row.tobytes()) for stratum, row in zip(targets.strata.tolist(), some, strict=True)
    ]
    counts = Counter(keys)
    rows = np.arange(len(X))[targets.rows]  # (n_texts,)
    for i, key in enumerate(keys):
        if counts[key] > 1:
            keys[i] = key[0], xxhash.xxh3_128_digest((to_host(X[rows[i]]) + 0.0).tobytes())
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])
