"""A fitted pipeline without what its classifier does not use.

Pruning runs backwards, from the classifier to the language model: each step is told which of its
output columns are needed, is narrowed to them, and says which input columns it needs for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, clone
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import SelectorMixin
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.utils.validation import check_is_fitted

from skspin._diagram import model_name
from skspin._explain.linear import linear_parts, weights_of
from skspin._pickling import shallow_copy
from skspin._selector import SalientNeuronSelector
from skspin._sklearn import LinearClassifierMixin, _safe_indexing
from skspin._steps import activation_steps
from skspin._transformer import LLMActivationTransformer

# What these have learnt about each column; by exact type, because a subclass may do something else.
_BY_COLUMN: dict[type, tuple[str, ...]] = {
    StandardScaler: ("mean_", "var_", "scale_", "n_samples_seen_"),
    MinMaxScaler: ("min_", "scale_", "data_min_", "data_max_", "data_range_"),
    MaxAbsScaler: ("max_abs_", "scale_"),
    RobustScaler: ("center_", "scale_"),
    QuantileTransformer: ("quantiles_",),
}


@dataclass(frozen=True)
class Need:
    """The columns that a step must give.

    Parameters
    ----------
    columns : ndarray of shape (n_columns,), bool, or None
        True for the columns needed; None for all.
    by : str
        The step that decides so.
    """

    columns: np.ndarray | None
    by: str


def prune(pipeline):
    """Leave out of a fitted pipeline whatever its classifier does not use.

    The language model then stops after the deepest layer in use, and only the neurons in use are
    pooled. Predictions stay the same.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted, with an :class:`LLMActivationTransformer` that a selector follows; for instance the
        ``best_estimator_`` of a search. The transformer may be inside a
        :class:`~sklearn.compose.ColumnTransformer` or a :class:`~sklearn.pipeline.FeatureUnion`.
        Steps in between that treat each column by itself (such as
        :class:`~sklearn.preprocessing.StandardScaler`) are narrowed, others stay whole. Columns to
        which a linear classifier gives no weight in any class, as under an L1 penalty, are left out
        as well.

    Returns
    -------
    pruned : Pipeline
        A new fitted pipeline with the same steps, of which the selector selects all that is left
        (one of another kind than :class:`SalientNeuronSelector` is inside a step that does so). It
        shares the language model, and fitted parts that did not change, with ``pipeline``, which is
        left as it was. Fitting it again does what fitting ``pipeline`` does, from all layers on;
        only the members of a FeatureUnion that were of no use have become "drop" for good.

    Raises
    ------
    TypeError
        If ``pipeline`` is no Pipeline.
    ValueError
        If it has no activation transformer, or needs all columns of one.
    NotFittedError
        If it is not fitted.

    Examples
    --------
    >>> from skspin import make_spin_pipeline, prune
    >>> from skspin.datasets import demo_model
    >>> texts = ["A fine film.", "Lovely.", "What a joy.", "A bore.", "Dreadful.", "It drags."] * 2
    >>> labels = [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model()).set_params(select__C=1.0).fit(texts, labels)
    >>> pruned = prune(spin)
    >>> pruned["activations"].layout_.n_columns < spin["activations"].layout_.n_columns / 100
    True
    >>> pruned.predict(["A lovely film.", "A dreadful bore."]).tolist()
    [1, 0]
    """
    if not isinstance(pipeline, Pipeline):
        advice = " Pass its best_estimator_." if hasattr(pipeline, "best_estimator_") else ""
        raise TypeError(
            f"pipeline is a {type(pipeline).__name__}, but prune takes a fitted Pipeline.{advice}"
        )
    check_is_fitted(pipeline)
    if not _reads_activations(pipeline):
        raise ValueError(
            f"None of the steps {list(pipeline.named_steps)} is an LLMActivationTransformer, or a "
            "Pipeline, ColumnTransformer or FeatureUnion that holds one, so there is nothing to "
            "prune."
        )
    return _narrow(pipeline, Need(None, "the caller"))[0]


@singledispatch
def _narrow(step: Any, need: Need) -> tuple[Any, Need]:
    """Narrow a fitted step to the columns needed; also say which columns it needs itself."""
    attributes = _BY_COLUMN.get(type(step))
    if step not in (None, "passthrough") and attributes is None:
        # Not known to treat each column by itself, so it may need all of them.
        return _whole(step, need), Need(None, type(step).__name__)
    if attributes is None or need.columns is None:
        return _copy(step), need
    return _take_columns(step, need.columns, attributes), need


@_narrow.register
def _(step: LLMActivationTransformer, need: Need) -> tuple[Any, Need]:
    if need.columns is None:
        raise ValueError(
            f"The activations of {model_name(step.model)!r} can't be pruned, because {need.by} "
            "needs all of them. Put a SalientNeuronSelector directly behind the "
            "LLMActivationTransformer."
        )
    return step._restrict_to(need.columns), Need(None, type(step).__name__)


@_narrow.register
def _(step: SelectorMixin, need: Need) -> tuple[Any, Need]:
    support = step.get_support().copy()  # (n_columns,)
    if need.columns is not None:
        support[support] = need.columns
    if isinstance(step, SalientNeuronSelector):
        return step._restrict_to(support), Need(support, type(step).__name__)
    selector = step.selector if isinstance(step, KeptColumns) else step
    everything = np.ones(support.sum(), dtype=bool)
    return KeptColumns.of(everything, selector), Need(support, type(step).__name__)


@_narrow.register(LinearClassifierMixin)
@_narrow.register(OneVsRestClassifier)
def _(step: Any, need: Need) -> tuple[Any, Need]:
    by = type(step).__name__
    parts = linear_parts(step)
    if not parts:
        return _copy(step), Need(None, by)
    used = np.any([weights_of(part).any(axis=0) for part in parts], axis=0)  # (n_columns,)
    if not used.any():
        used[0] = True  # scikit-learn's estimators take no input that has no column
    if used.all():
        return _copy(step), Need(None, by)
    narrowed = [_take_columns(part, used, ("coef_",)) for part in parts]
    if not isinstance(step, OneVsRestClassifier):
        return narrowed[0], Need(used, by)
    members = _take_columns(step, used, ())
    members.estimators_ = narrowed
    return members, Need(used, by)


@_narrow.register
def _(step: Pipeline, need: Need) -> tuple[Any, Need]:
    members = []
    for name, member in reversed(step.steps):
        member, need = _narrow(member, need)
        members.append((name, member))
    narrowed = _copy(step)
    narrowed.steps = members[::-1]
    return narrowed, need


@_narrow.register
def _(step: ColumnTransformer, need: Need) -> tuple[Any, Need]:
    members, outputs, start = [], dict.fromkeys(step.output_indices_, slice(0, 0)), 0
    for name, member, columns in step.transformers_:
        part = _part(need, step.output_indices_[name])
        members.append((name, _narrow_branch(member, part), columns))
        given = step.output_indices_[name]
        n_given = given.stop - given.start if part.columns is None else int(part.columns.sum())
        outputs[name] = slice(start, start := start + n_given)
    narrowed = _copy(step)
    narrowed.transformers_ = members
    narrowed.output_indices_ = outputs
    return narrowed, Need(None, type(step).__name__)


@_narrow.register
def _(step: FeatureUnion, need: Need) -> tuple[Any, Need]:
    members, start = [], 0
    for name, member in step.transformer_list:
        part = need
        if need.columns is not None and member != "drop":
            end = start + len(member.get_feature_names_out())
            part, start = _part(need, slice(start, end)), end
        members.append((name, _narrow_branch(member, part)))
    narrowed = _copy(step)
    narrowed.transformer_list = members
    return narrowed, Need(None, type(step).__name__)


def _narrow_branch(member: Any, need: Need) -> Any:
    """Narrow what stands beside others and reads the same input, which stays as it is."""
    if member == "drop" or (need.columns is not None and not need.columns.any()):
        return "drop"
    if _reads_activations(member):
        return _narrow(member, need)[0]
    return _whole(member, need)


def _part(need: Need, outputs: slice) -> Need:
    return need if need.columns is None else Need(need.columns[outputs], need.by)


def _whole(step: Any, need: Need) -> Any:
    """Leave a step as it is, and take away behind it what is not needed."""
    if need.columns is None or need.columns.all():
        return _copy(step)
    return Pipeline([("whole", _copy(step)), ("keep", KeptColumns.of(need.columns))])


def _take_columns(step: Any, columns: np.ndarray, attributes: tuple[str, ...]) -> Any:
    """Copy a fitted step as if only some of its input columns had been there."""
    narrowed = _copy(step)
    for name in (*attributes, "feature_names_in_"):
        learnt: Any = getattr(step, name, None)
        if np.ndim(learnt) or issparse(learnt):  # neither absent, nor one number for all columns
            setattr(narrowed, name, learnt[..., columns])
    narrowed.n_features_in_ = int(columns.sum())
    return narrowed


def _copy(step: Any) -> Any:
    return step if step is None or isinstance(step, str) else shallow_copy(step)


def _reads_activations(step: Any) -> bool:
    return next(activation_steps(step), None) is not None


class KeptColumns(SelectorMixin, BaseEstimator):
    """A selection that pruning made; fitted again, it is what was there before.

    Parameters
    ----------
    selector : selector or None, default=None
        What selects when this is fitted; None for all columns.

    Attributes
    ----------
    support_ : ndarray of shape (n_columns,), bool
        True for the columns kept.
    """

    def __init__(self, selector=None):
        self.selector = selector

    @classmethod
    def of(cls, columns: np.ndarray, selector: Any = None) -> KeptColumns:
        """Make one that is fitted, and keeps ``columns`` of shape (n_columns,), bool."""
        kept = cls(selector)
        kept.support_, kept.n_features_in_ = columns, columns.size
        return kept

    def fit(self, X, y=None):
        """Select afresh."""
        self.n_features_in_ = X.shape[1]
        self.support_ = np.ones(self.n_features_in_, dtype=bool)
        if self.selector is not None:
            self.support_ = clone(self.selector).fit(X, y).get_support()
        return self

    def transform(self, X):
        """Keep the columns; arrays, sparse matrices and frames stay what they are."""
        return _safe_indexing(X, np.flatnonzero(self._get_support_mask()), axis=1)

    def _get_support_mask(self):
        check_is_fitted(self, "support_")
        return self.support_
