"""A fitted pipeline without what its classifier does not use.

Pruning runs backwards, from the classifier to the language model: each step is told which of its
output columns are needed, is narrowed to them, and says which input columns it needs for that.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import issparse
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import SelectorMixin
from sklearn.frozen import FrozenEstimator
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)

from skspin._explain import linear_members, weights_of
from skspin._pickling import shallow_copy
from skspin._pipeline import PrunedStep, acts_in_fit_only, find_steps, fitted_pipeline
from skspin._selector import SalientNeuronSelector
from skspin._sklearn import LinearClassifierMixin
from skspin._transformer import LLMActivationTransformer

# Attributes with a value per column; by exact type, because a subclass may do something else.
_BY_COLUMN: dict[type, tuple[str, ...]] = {
    StandardScaler: ("mean_", "var_", "scale_", "n_samples_seen_"),
    MinMaxScaler: ("min_", "scale_", "data_min_", "data_max_", "data_range_"),
    MaxAbsScaler: ("max_abs_", "scale_"),
    RobustScaler: ("center_", "scale_"),
    QuantileTransformer: ("quantiles_",),
}


class Need(NamedTuple):
    """The columns that a step must return, and the name of the step that needs them."""

    columns: np.ndarray | None  # (n_columns,), True for those needed; None for all
    by: str


def prune(pipeline):
    """Remove from a fitted pipeline what its classifier does not use.

    The language model then stops after the deepest layer in use, and only the neurons in use are
    pooled. Predictions stay the same. Read more in the user guide, :doc:`/user_guide/deploying`.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted, with an :class:`LLMActivationTransformer` and a selector after it; for instance the
        ``best_estimator_`` of a search. The transformer may be inside a
        :class:`~sklearn.compose.ColumnTransformer` or a :class:`~sklearn.pipeline.FeatureUnion`.
        Steps that treat each column by itself (such as
        :class:`~sklearn.preprocessing.StandardScaler`) are narrowed, others stay whole, and those
        that act in ``fit`` only, such as samplers, are ignored. Columns to which a linear
        classifier gives no weight in any class, as under an L1 penalty, are left out as well.
        Pipeline and steps may be inside a :class:`~sklearn.frozen.FrozenEstimator`.

    Returns
    -------
    pruned : Pipeline
        A new fitted pipeline with the same steps. Its selector selects all columns that are left;
        a step of another kind may be wrapped in one that returns only the columns in use.
        The new pipeline shares the language model, and fitted parts that did not change, with
        ``pipeline``, which is left as it was. Fitting it again fits all layers, as fitting
        ``pipeline`` again would. Dropped members of a FeatureUnion stay dropped.

    Raises
    ------
    TypeError, NotFittedError
        If ``pipeline`` is no fitted Pipeline. Of a search, pass its ``best_estimator_``.
    ValueError
        If it has no activation transformer, or needs all columns of one, or if several members of a
        FeatureUnion do not name their columns.

    See Also
    --------
    to_torch : A torch module of a pipeline with a linear head.
    make_spin_pipeline : Makes a pipeline that can be pruned.

    Examples
    --------
    >>> from skspin import make_spin_pipeline, prune
    >>> from skspin.datasets import demo_model
    >>> good = ["A fine film.", "Lovely.", "What a joy."]
    >>> bad = ["A bore.", "Dreadful.", "It drags."]
    >>> texts, labels = (good + bad) * 2, [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model()).set_params(select__C=1.0)
    >>> spin = spin.fit(texts, labels)
    >>> pruned = prune(spin)
    >>> n_before = spin["activations"].layout_.n_columns
    >>> pruned["activations"].layout_.n_columns < n_before / 100
    True
    >>> pruned.predict(["A lovely film.", "A dreadful bore."]).tolist()
    [1, 0]
    """
    steps = fitted_pipeline(pipeline, "prune").named_steps
    if not _reads_activations(pipeline):
        raise ValueError(
            f"None of the steps {list(steps)} is an LLMActivationTransformer, or a "
            "Pipeline, ColumnTransformer or FeatureUnion that holds one, so there is nothing to "
            "prune."
        )
    return _narrow(pipeline, Need(None, "the caller"))[0]


@singledispatch
def _narrow(step: Any, need: Need) -> tuple[Any, Need]:
    """Narrow a fitted step to the columns needed; also say which columns it needs itself."""
    attributes = _BY_COLUMN.get(type(step))
    if step not in (None, "passthrough") and attributes is None and not acts_in_fit_only(step):
        # Not known to treat each column by itself, so it may need all of them.
        return _keep_whole(step, need)
    if attributes is None or need.columns is None:
        return _copy(step), need
    return _take_columns(step, need.columns, attributes), need


@_narrow.register
def _(step: LLMActivationTransformer, need: Need) -> tuple[Any, Need]:
    if need.columns is None:
        raise ValueError(
            f"The activations of {step._model_name!r} can't be pruned, because {need.by} needs all "
            "of them. Put a SalientNeuronSelector directly behind the LLMActivationTransformer."
        )
    return step._restrict_to(need.columns), Need(None, type(step).__name__)


@_narrow.register
def _(step: SelectorMixin, need: Need) -> tuple[Any, Need]:
    before, left = (step.step, step.left_) if isinstance(step, PrunedStep) else (step, None)
    if left is not None and step.support_ is None:  # another step, all of whose columns are kept
        left, needed = _narrow(left, need)
        return PrunedStep.of(before, left, None), needed
    support = step.get_support().copy()  # (n_columns,)
    if need.columns is not None:
        support[support] = need.columns
    if left is not None:  # another step, which needs its whole input to compute some columns
        return PrunedStep.of(before, left, support), Need(None, type(left).__name__)
    needed = Need(support, type(step).__name__)
    if isinstance(step, SalientNeuronSelector):
        return step._restrict_to(support), needed
    narrowed = PrunedStep.of(before, None, np.ones(support.sum(), dtype=bool))
    if hasattr(step, "feature_names_in_"):
        narrowed.feature_names_in_ = step.feature_names_in_[support]
    return narrowed, needed


@_narrow.register
def _(step: FrozenEstimator, need: Need) -> tuple[Any, Need]:
    if hasattr(step.estimator, "predict") and need.columns is None:
        # A refit leaves a frozen classifier as it is, so it must go on taking all its columns.
        if not _reads_activations(step):
            return step, Need(None, type(step.estimator).__name__)
        return FrozenEstimator(_narrow(step.estimator, need)[0]), Need(None, type(step).__name__)
    narrowed, needed = _narrow(step.estimator, need)
    return PrunedStep.of(step, narrowed, None), needed


@_narrow.register(LinearClassifierMixin)
@_narrow.register(OneVsRestClassifier)
@_narrow.register(MultiOutputClassifier)
def _(step: Any, need: Need) -> tuple[Any, Need]:
    members = linear_members(step)
    if not members or need.columns is not None:  # LinearDiscriminantAnalysis also transforms
        return _keep_whole(step, need)
    used = np.any([weights_of(member).any(axis=0) for member in members], axis=0)  # (n_columns,)
    used[0] |= not used.any()  # scikit-learn's estimators refuse an input without columns
    if used.all():
        return _keep_whole(step, need)
    narrowed = [_take_columns(member, used, ("coef_",)) for member in members]
    head = narrowed[0]
    if members[0] is not step:
        head = _take_columns(step, used)
        head.estimators_ = narrowed
    return head, Need(used, type(step).__name__)


@_narrow.register
def _(step: Pipeline, need: Need) -> tuple[Any, Need]:
    narrowed = _copy(step)
    narrowed.steps = []
    for name, member in reversed(step.steps):
        member, need = _narrow(member, need)
        narrowed.steps.insert(0, (name, member))
    return narrowed, need


@_narrow.register
def _(step: ColumnTransformer, need: Need) -> tuple[Any, Need]:
    narrowed = _copy(step)
    narrowed.transformers_, start = [], 0
    narrowed.output_indices_ = dict.fromkeys(step.output_indices_, slice(0, 0))
    for name, member, columns in step.transformers_:
        given = step.output_indices_[name]
        n_before = given.stop - given.start
        member, n_given = _narrow_branch(member, need, given)
        narrowed.transformers_.append((name, member, columns))
        narrowed.output_indices_[name] = slice(start, start := start + n_given)
        if member == "drop" and n_before:  # maybe the only sparse columns
            narrowed.sparse_output_ = False
    return narrowed, Need(None, type(step).__name__)


@_narrow.register
def _(step: FeatureUnion, need: Need) -> tuple[Any, Need]:
    narrowed = _copy(step)
    narrowed.transformer_list, end = [], 0
    n_columns = [0] * len(step.transformer_list)
    if need.columns is not None:
        n_columns = _count_columns(step, len(need.columns))
    for (name, member), n_given in zip(step.transformer_list, n_columns, strict=True):
        start, end = end, end + n_given
        member, _ = _narrow_branch(member, need, slice(start, end))
        narrowed.transformer_list.append((name, member))
    return narrowed, Need(None, type(step).__name__)


def _count_columns(union: FeatureUnion, n_columns: int) -> list[int]:
    """Count the columns of each member of a union; one that does not name them has the rest."""
    counts = {name: _count_names(member) for name, member in union.transformer_list}
    unnamed = [name for name, count in counts.items() if count is None]
    if len(unnamed) > 1:
        raise ValueError(
            f"The members {unnamed} of a FeatureUnion do not name their columns, so it can't be "
            "told how many each has. Give them get_feature_names_out (a FunctionTransformer has "
            "feature_names_out=), or use a ColumnTransformer."
        )
    rest = n_columns - sum(count or 0 for count in counts.values())
    return [rest if count is None else count for count in counts.values()]


def _count_names(member: Any) -> int | None:
    try:
        return 0 if member == "drop" else len(member.get_feature_names_out())
    except (AttributeError, ValueError):  # so says a step that does not know them
        return None


def _narrow_branch(member: Any, need: Need, given: slice) -> tuple[Any, int]:
    """Narrow one of several steps with the same input; count the columns that it then returns."""
    columns = None if need.columns is None else need.columns[given]
    n_given = given.stop - given.start if columns is None else int(columns.sum())
    if member == "drop" or (columns is not None and not n_given):
        return "drop", n_given
    narrow = _narrow if _reads_activations(member) else _keep_whole
    return narrow(member, Need(columns, need.by))[0], n_given


def _keep_whole(step: Any, need: Need) -> tuple[Any, Need]:
    """Keep a step as it is, and drop the columns of its output that are not needed."""
    needed = Need(None, type(step).__name__)
    if need.columns is None or need.columns.all():
        return _copy(step), needed
    left = None if step == "passthrough" else _copy(step)
    return PrunedStep.of(step, left, need.columns), needed


def _take_columns(step: Any, columns: np.ndarray, attributes: tuple[str, ...] = ()) -> Any:
    """Copy a fitted step as if it had been fitted to some of its input columns only."""
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
    return next(find_steps(step, LLMActivationTransformer), None) is not None
