"""What each token adds to a linear classifier's decision values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skspin._explain.explanation import TokenExplanation
from skspin._explain.linear import LinearForm
from skspin._layout import Layout
from skspin._steps import flatten
from skspin._texts import TextTokens, open_texts
from skspin._transformer import LLMActivationTransformer


def explain_tokens(pipeline, texts):
    """Split a linear classifier's decision values into what each token adds.

    The contributions are exact: over all tokens of a text they add up, with the intercept, to what
    ``pipeline.decision_function`` gives. A neuron's value goes to the tokens that it came from:
    under mean pooling each token takes its share, under max pooling the token that attains the
    maximum (the first of several) takes all, and so does the first or the last token under those
    poolings. Where a step centres the columns, contributions count from that centre: a token
    that leaves every neuron at its average adds nothing.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted: an :class:`LLMActivationTransformer`, steps that are linear in the columns
        (selectors; :class:`~sklearn.preprocessing.StandardScaler` and other scalers;
        :class:`~sklearn.decomposition.PCA`), and a linear classifier, such as
        :class:`~sklearn.linear_model.LogisticRegression`, :class:`~sklearn.svm.LinearSVC`, or
        :class:`~sklearn.multiclass.OneVsRestClassifier` around one. A pruned pipeline will do.
    texts : list, tuple, array, Series or one-column frame of str
        The texts to explain. They go through the model once more, as tokens are not stored.

    Returns
    -------
    explanation : TokenExplanation
        One entry per text.

    Raises
    ------
    ValueError
        If the classifier or a step is not linear, or the tokenizer does not tell where in the text
        its tokens are.
    NotFittedError
        If the pipeline is not fitted.

    Notes
    -----
    A token's activations depend on the whole text, as the model mixes the tokens: contributions say
    through which tokens' activations the decision came about, not what would change without them.

    Examples
    --------
    >>> from skspin import explain_tokens, make_spin_pipeline
    >>> from skspin.datasets import demo_model
    >>> texts = ["A fine film.", "Lovely.", "What a joy.", "A bore.", "Dreadful.", "It drags."] * 2
    >>> labels = [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model(), dtype="float32")
    >>> spin = spin.set_params(select__C=1.0).fit(texts, labels)
    >>> text = "A lovely film, and a dreadful bore."
    >>> explanation = explain_tokens(spin, [text])
    >>> added = sum(explanation.for_class(1)[0]) + explanation.intercept_for_class(1)
    >>> bool(abs(added - spin.decision_function([text])[0]) < 1e-4)
    True
    """
    if not isinstance(pipeline, Pipeline):
        raise TypeError(
            f"pipeline is a {type(pipeline).__name__}, but explain_tokens takes a fitted Pipeline."
        )
    check_is_fitted(pipeline)
    transformer, form = _to_linear_form(pipeline)
    used = np.any(form.weights, axis=0)  # (n_columns,)
    used[0] |= not used.any()  # something has to be read for the tokens to be known
    transformer = transformer._restrict_to(used)
    shares = _Shares(transformer.layout_, form.weights[:, used].T, form.offsets[:, used].T)
    texts = open_texts(texts).to_list()
    distinct = list(dict.fromkeys(texts))
    pooled = dict(zip(distinct, np.asarray(transformer.transform(distinct)), strict=True))
    tokens: dict[str, TextTokens] = {}
    contributions: dict[str, np.ndarray] = {}
    for text, found, activations in transformer._read_tokens(distinct):
        tokens[text] = found
        contributions[text] = shares.of_tokens(activations, pooled[text])
    return TokenExplanation(
        tokens=[tokens[text] for text in texts],
        contributions=[contributions[text] for text in texts],
        intercept=form.intercept,
        classes=pipeline.classes_,
    )


def _to_linear_form(pipeline: Pipeline) -> tuple[LLMActivationTransformer, LinearForm]:
    """Express a pipeline's decision values in the columns of its activation transformer."""
    *steps, head = flatten(pipeline)
    form = LinearForm.of_head(head)
    if form is None:
        raise ValueError(
            f"{type(head).__name__} is not linear in its columns, so its decisions are no sum over "
            "tokens. Use a linear classifier such as LogisticRegression, or look at whole columns "
            "with sklearn.inspection.permutation_importance."
        )
    for step in reversed(steps):
        if isinstance(step, LLMActivationTransformer):
            return step, form
        form = form.before(step)
        if form is None:
            raise ValueError(
                f"{type(step).__name__} is not known to be linear in its columns (with clipping no "
                "scaler is), so decisions are no sum over tokens. Selectors, scalers, PCA and "
                "TruncatedSVD may be between activations and classifier."
            )
    raise ValueError("No step of the pipeline is an LLMActivationTransformer.")


@dataclass(frozen=True)
class _Shares:
    """Gives every column's part in the decision values to the tokens that it came from.

    Parameters
    ----------
    layout : Layout
        The columns.
    weights, offsets : ndarray of shape (n_columns, n_decision_values)
        See `LinearForm`.
    """

    layout: Layout
    weights: np.ndarray
    offsets: np.ndarray

    def of_tokens(self, activations: np.ndarray, pooled: np.ndarray) -> np.ndarray:
        """Split one text's decision values.

        Parameters
        ----------
        activations : ndarray of shape (n_tokens, n_columns)
            At each token; they decide how a column is split.
        pooled : ndarray of shape (n_columns,)
            What the classifier sees; it decides what there is to split. The two differ by the
            rounding of two passes through the model, which a scaler may magnify.

        Returns
        -------
        ndarray of shape (n_tokens, n_decision_values)
        """
        total = np.zeros((len(activations), self.weights.shape[1]))
        for segment, columns in zip(self.layout.segments, self.layout.slices, strict=True):
            values = activations[:, columns].astype(np.float64)  # (n_tokens, n_neurons)
            parts, shares = _SPLITS[segment.pooling](values, pooled[columns])
            total += parts @ self.weights[columns] + shares @ self.offsets[columns]
        return total


# Each takes a column's values at the tokens, (n_tokens, n_neurons), and pooled, (n_neurons,). It
# gives the tokens' parts, which add up to the pooled value, and their shares, which add up to 1.


def _evenly(values: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = (values - values.mean(axis=0) + pooled) / len(values)
    return parts, np.full_like(values, 1 / len(values))


def _to_largest(values: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _to_one(values.argmax(axis=0), values, pooled)


def _to_first(values: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _to_one(np.zeros(len(pooled), dtype=int), values, pooled)


def _to_last(values: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _to_one(np.full(len(pooled), len(values) - 1), values, pooled)


def _to_one(
    token: np.ndarray, values: np.ndarray, pooled: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give each column whole to one token; ``token`` of shape (n_neurons,) says which."""
    shares = np.zeros_like(values)
    shares[token, np.arange(len(token))] = 1
    return shares * pooled, shares


_SPLITS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "mean": _evenly,
    "max": _to_largest,
    "first": _to_first,
    "last": _to_last,
}
