"""SPIN as one pipeline, and how to find the steps inside a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import SelectorMixin
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import FixedThresholdClassifier, TunedThresholdClassifierCV
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from skspin._selector import SalientNeuronSelector
from skspin._sklearn import _check_feature_names_in, _safe_indexing
from skspin._texts import TextChunks, open_texts
from skspin._transformer import LLMActivationTransformer

_Step = TypeVar("_Step")
_THRESHOLDED = FixedThresholdClassifier | TunedThresholdClassifierCV


def make_spin_pipeline(
    model="distilbert/distilbert-base-uncased",
    *,
    sparsity=0.1,
    head=None,
    site="mlp",
    pooling=("mean", "max"),
    **transformer_params,
):
    """Classify texts by a language model's salient neurons: SPIN as a scikit-learn Pipeline.

    The steps of SPIN [1]_ are ``activations`` (:class:`LLMActivationTransformer`), ``select``
    (:class:`SalientNeuronSelector`), ``scale`` (:class:`~sklearn.preprocessing.StandardScaler`) and
    ``classify``. The defaults are near the best values on validation parts of four data sets
    (sparsity 0, 0.1, 0.1 and 0.2; ``C`` of the head 0.003 three times, 0.1 once); search both.
    Texts beyond ``max_length`` are cut off, with a warning, because reading all of them in windows
    (``long_texts="windows"``) gained less than a standard error there. Read more in the user guide,
    :doc:`/user_guide/how_it_works`, and in :doc:`/how_to/index`.

    Parameters
    ----------
    model : str, path or PreTrainedModel, default="distilbert/distilbert-base-uncased"
        See :class:`LLMActivationTransformer`.
    sparsity : float in [0, 1), default=0.1
        See :class:`SalientNeuronSelector`; larger keeps fewer neurons.
    head : classifier or None, default=None
        The last step; None for a strongly regularised
        :class:`~sklearn.linear_model.LogisticRegression` (``C=0.003``).
    site : str or tuple of str, default="mlp"
        See :class:`LLMActivationTransformer`.
    pooling : str or tuple of str, default=("mean", "max")
        See :class:`LLMActivationTransformer`.
    **transformer_params : dict
        Further parameters of :class:`LLMActivationTransformer`.

    Returns
    -------
    pipeline : Pipeline
        Not fitted.

    See Also
    --------
    LLMActivationTransformer : The first step, and all of its parameters.
    SalientNeuronSelector : The second step.
    prune : Makes a fitted pipeline compute only what it uses.

    References
    ----------
    .. [1] Jiao et al., "SPIN: Sparsifying and Integrating Internal Neurons in Large Language Models
       for Text Classification", Findings of ACL 2024, :arxiv:`2311.15983`.

    Examples
    --------
    >>> from skspin import make_spin_pipeline
    >>> from skspin.datasets import demo_model
    >>> good = ["A fine film.", "Lovely.", "What a joy."]
    >>> bad = ["A bore.", "Dreadful.", "It drags."]
    >>> texts, labels = (good + bad) * 2, [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model())
    >>> spin = spin.set_params(select__C=1.0)  # few texts, large C
    >>> spin = spin.fit(texts, labels)
    >>> spin.predict(["A lovely film.", "A dreadful bore."])
    array([1, 0])
    """
    transformer = LLMActivationTransformer(model, site=site, pooling=pooling, **transformer_params)
    return Pipeline(
        [
            ("activations", transformer),
            ("select", SalientNeuronSelector(sparsity)),
            ("scale", StandardScaler()),
            ("classify", LogisticRegression(C=0.003, max_iter=1000) if head is None else head),
        ]
    )


def fitted_pipeline(pipeline: Any, caller: str) -> Pipeline:
    """Return a fitted pipeline, taken out of a FrozenEstimator; raise for anything else."""
    bare = pipeline.estimator if isinstance(pipeline, FrozenEstimator) else pipeline
    if not isinstance(bare, Pipeline):
        raise TypeError(
            f"pipeline is a {type(bare).__name__}, but {caller} takes a fitted Pipeline."
            f"{instead_of(bare)}"
        )
    check_is_fitted(bare)
    return bare


def instead_of(estimator: Any) -> str:
    """Advise which inner estimator to pass instead of this one, if that is known."""
    if is_search(estimator):
        fitted = "" if hasattr(estimator, "best_estimator_") else ", after a fit with refit=True"
        return f" Pass its best_estimator_{fitted}."
    if isinstance(estimator, _THRESHOLDED):
        return f" Pass its estimator_{'' if hasattr(estimator, 'estimator_') else ', after a fit'}."
    if isinstance(estimator, CalibratedClassifierCV):
        return " Pass one of those inside it, such as calibrated_classifiers_[0].estimator."
    return ""


def is_search(estimator: Any) -> bool:
    """Whether an estimator searches the parameters of another one that it holds."""
    searches = hasattr(estimator, "refit") and hasattr(estimator, "estimator")
    return searches and not isinstance(estimator, _THRESHOLDED)


def acts_in_fit_only(step: Any) -> bool:
    """Whether a step, such as a sampler of imbalanced-learn, is skipped at prediction."""
    return hasattr(step, "fit_resample") and not hasattr(step, "transform")


def flatten(estimator: Any) -> Iterator[Any]:
    """List the steps that act at prediction, in order, with pipelines and wrappers unpacked."""
    is_whole = isinstance(estimator, PrunedStep) and estimator.support_ is None
    if is_whole or isinstance(estimator, Pipeline | FrozenEstimator):
        for member in _members(estimator):
            yield from flatten(member)
    elif hasattr(estimator, "best_estimator_"):
        yield from flatten(estimator.best_estimator_)
    elif estimator not in (None, "passthrough") and not acts_in_fit_only(estimator):
        yield estimator


def find_steps(estimator: Any, kind: type[_Step]) -> Iterator[_Step]:
    """Find the fitted steps of one kind in pipelines, column transformers and unions."""
    if isinstance(estimator, kind):
        yield estimator
    for member in _members(estimator):
        yield from find_steps(member, kind)


def _members(estimator: Any) -> list[Any]:
    if isinstance(estimator, Pipeline):
        return [step for _, step in estimator.steps]
    if isinstance(estimator, ColumnTransformer):
        return [member for _, member, _ in estimator.transformers_]
    if isinstance(estimator, FeatureUnion):
        return [member for _, member in estimator.transformer_list]
    if isinstance(estimator, FrozenEstimator):
        return [estimator.estimator]
    return [estimator.left_] if isinstance(estimator, PrunedStep) else []


def only_step(estimator: Any, kind: type[_Step]) -> _Step:
    """Find the fitted step of a kind, or raise if there is not exactly one."""
    found = list(find_steps(estimator, kind))
    if len(found) != 1:
        advice = f" Pass the one {kind.__name__} that you mean, or a Pipeline that holds it."
        raise ValueError(
            f"{type(estimator).__name__} has {len(found)} steps of type {kind.__name__}, but one "
            f"is needed.{instead_of(estimator) or advice}"
        )
    return found[0]


def read_texts(estimator: Any, texts: Any) -> TextChunks:
    """Apply the steps of a pipeline that come before its activation transformer to texts."""
    steps = list(flatten(estimator))
    is_reader = [isinstance(step, LLMActivationTransformer) for step in steps]
    for step in steps[: is_reader.index(True) if any(is_reader) else 0]:
        texts = step.transform(texts)
    return open_texts(texts)


class PrunedStep(SelectorMixin, BaseEstimator):
    """A fitted step of which pruning kept some columns; a refit fits the whole step again.

    ``left_`` is the fitted step that computes columns (None for a selector, whose input now holds
    the selected columns only), and ``support_`` says which of these are kept (None for all).
    """

    def __init__(self, step=None):
        self.step = step

    @classmethod
    def of(cls, step: Any, left: Any, support: Any) -> PrunedStep:
        """Make a fitted instance."""
        pruned = cls(step)
        pruned.left_, pruned.support_ = left, support
        if left is None:
            pruned.n_features_in_ = len(support)
        return pruned

    def fit(self, X, y=None, **params):
        """Fit the step as it was before pruning."""
        self.left_, self.support_ = clone(self.step).fit(X, y, **params), None
        return self

    def fit_transform(self, X, y=None, **params):
        """Fit the step as it was before pruning, and transform as it does in training."""
        if not hasattr(self.step, "fit_transform"):
            return self.fit(X, y, **params).transform(X)
        self.left_, self.support_ = clone(self.step), None
        return self.left_.fit_transform(X, y, **params)

    def get_metadata_routing(self):
        """Ask for the metadata that the step asks for."""
        return self.step.get_metadata_routing()

    def transform(self, X):
        """Compute the columns that are kept, in the same kind of array, sparse matrix or frame."""
        X = X if self.left_ is None else self.left_.transform(X)
        return X if self.support_ is None else _safe_indexing(X, self.get_support(True), axis=1)

    def get_feature_names_out(self, input_features=None):
        """Name the columns that are kept."""
        if self.left_ is None:
            names = _check_feature_names_in(self, input_features)
        else:
            names = self.left_.get_feature_names_out(input_features)
        return names if self.support_ is None else names[self.support_]

    def _get_support_mask(self):
        check_is_fitted(self, "support_")
        return self.left_.get_support() if self.support_ is None else self.support_

    def __getattr__(self, name):
        """Look up what the step has learnt, as FrozenEstimator does."""
        left = vars(self).get("left_")
        if name.startswith("_") or left is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(left, name)
