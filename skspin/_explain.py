"""What each token adds to a linear classifier's decision values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skspin._layout import Layout
from skspin._linear import LinearForm
from skspin._text_tokens import TextTokens
from skspin._texts import check_texts
from skspin._token_html import contributions_to_html
from skspin._tokenwise import read_tokens
from skspin._transformer import LLMActivationTransformer


class TopToken(NamedTuple):
    """A token's (or word's) contributions to a class, over a corpus."""

    token: str
    total: float
    count: int


@dataclass(frozen=True, eq=False)
class TokenExplanation:
    """What each token adds to each class's decision value; :func:`explain_tokens` makes it.

    In a notebook it shows the texts with coloured tokens.

    Parameters
    ----------
    tokens : list of TextTokens of length n_texts
        The tokens, special tokens included, and where in their text they are.
    contributions : list of ndarray of shape (n_tokens, n_decision_values)
        What each token adds to each decision value.
    intercept : ndarray of shape (n_decision_values,)
        What no token adds.
    classes : ndarray of shape (n_classes,)
        The classifier's classes. Two classes share one decision value, which is in favour of the
        second.

    Examples
    --------
    See :func:`explain_tokens`.
    """

    tokens: list[TextTokens]
    contributions: list[np.ndarray]
    intercept: np.ndarray
    classes: np.ndarray

    @property
    def decision_values(self) -> np.ndarray:
        """The sums, of shape (n_texts, n_decision_values)."""
        return np.stack([part.sum(axis=0) for part in self.contributions]) + self.intercept

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.tokens)

    def __getitem__(self, texts) -> TokenExplanation:
        """Choose one text by its number, or several by a slice."""
        chosen = texts if isinstance(texts, slice) else slice(texts, texts + 1 or None)
        return replace(
            self, tokens=self.tokens[chosen], contributions=self.contributions[chosen]
        )

    def merge_words(self) -> TokenExplanation:
        """Add up the tokens of each word.

        Words are runs of letters and digits; other marks are words of their own.

        Returns
        -------
        explanation : TokenExplanation
            The same explanation, with words for tokens.
        """
        words = [part.words() for part in self.tokens]
        return replace(
            self,
            tokens=[part.merge(groups) for part, groups in zip(self.tokens, words, strict=True)],
            contributions=[
                np.add.reduceat(part, np.flatnonzero(np.diff(groups, prepend=-1)))
                for part, groups in zip(self.contributions, words, strict=True)
            ],
        )

    def for_class(self, label) -> list[np.ndarray]:
        """Look up the contributions in favour of one class.

        Parameters
        ----------
        label : class label
            One of ``classes``.

        Returns
        -------
        list of ndarray of shape (n_tokens,)
            One array per text.
        """
        places = np.flatnonzero(self.classes == label)
        if not len(places):
            raise ValueError(f"{label!r} is not among the classes {self.classes.tolist()}.")
        if len(self.intercept) == 1 and len(self.classes) == 2:
            sign = 1.0 if places[0] == 1 else -1.0
            return [sign * part[:, 0] for part in self.contributions]
        return [part[:, places[0]] for part in self.contributions]

    def top_tokens(self, label, n: int = 10) -> list[TopToken]:
        """List the tokens that add most to one class over all texts.

        Parameters
        ----------
        label : class label
            One of ``classes``.
        n : int, default=10
            How many.

        Returns
        -------
        list of TopToken
            With ``token`` (as it is written in the texts, without spaces around it), ``total`` (its
            contributions' sum) and ``count`` (how often it occurs), largest total first. Special
            tokens and the prompt are left out.
        """
        totals: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for part, values in zip(self.tokens, self.for_class(label), strict=True):
            for i in np.flatnonzero(part.in_text):
                totals[part.surface(i).strip()] += values[i]
                counts[part.surface(i).strip()] += 1
        return [TopToken(token, float(total), counts[token]) for token, total in totals.most_common(n)]

    def to_frame(self):
        """Tabulate every contribution.

        Returns
        -------
        pandas.DataFrame
            One row per text, token and decision value, with the columns ``text`` (its number),
            ``token``, ``start`` and ``end`` (characters; both 0 for special tokens), ``class`` and
            ``contribution``.
        """
        import pandas as pd

        classes = self.classes[-len(self.intercept) :]  # of two classes the second
        frames = [
            pd.DataFrame(
                {
                    "text": number,
                    "token": np.repeat([part.surface(i) for i in range(len(part.tokens))], len(classes)),
                    "start": np.repeat(part.starts, len(classes)),
                    "end": np.repeat(part.ends, len(classes)),
                    "class": np.tile(classes, len(part.tokens)),
                    "contribution": values.ravel(),
                }
            )
            for number, (part, values) in enumerate(
                zip(self.tokens, self.contributions, strict=True)
            )
        ]
        return pd.concat(frames, ignore_index=True)

    def _repr_html_(self) -> str:
        return contributions_to_html(self)


def explain_tokens(pipeline, texts):
    """Split a linear classifier's decision values into what each token adds.

    The contributions are exact: over all tokens of a text they add up, with the intercept, to what
    ``pipeline.decision_function`` gives. A neuron's value goes to the tokens that it came from: under
    mean pooling each token takes its share, under max pooling the token that attains the maximum
    (the first of several) takes all, and so does the first or the last token under those poolings.
    Where a step centres the columns, contributions count from that centre: a token that leaves
    every neuron at its average adds nothing.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted: an :class:`LLMActivationTransformer`, steps that are linear in the columns
        (selectors; :class:`~sklearn.preprocessing.StandardScaler` and other scalers;
        :class:`~sklearn.decomposition.PCA`), and a linear classifier, such as
        :class:`~sklearn.linear_model.LogisticRegression`, :class:`~sklearn.svm.LinearSVC`, or
        :class:`~sklearn.multiclass.OneVsRestClassifier` around one. A pruned pipeline will do.
    texts : list, tuple, array, Series or one-column frame of str
        The texts to explain. They go through the model; the store is not asked.

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
    In a number format of 16 bits, the sums differ from ``decision_function`` by its rounding.

    Examples
    --------
    >>> from skspin import explain_tokens, make_spin_pipeline
    >>> from skspin.datasets import demo_model
    >>> texts = ["A fine film.", "Lovely.", "What a joy.", "A bore.", "Dreadful.", "It drags."] * 2
    >>> labels = [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model(), dtype="float32")
    >>> spin = spin.set_params(select__C=1.0).fit(texts, labels)
    >>> explanation = explain_tokens(spin, ["A lovely film, and a dreadful bore."])
    >>> [top.token for top in explanation.merge_words().top_tokens(0, n=2)]
    ['bore', 'dreadful']
    """
    if not isinstance(pipeline, Pipeline):
        raise TypeError(
            f"pipeline is a {type(pipeline).__name__}, but explain_tokens takes a fitted Pipeline."
        )
    check_is_fitted(pipeline)
    transformer, form = _to_linear_form(pipeline)
    used = form.weights.any(axis=0)  # (n_columns,)
    if not used.any():
        used[0] = True
    shares = _Shares(
        transformer.layout_.keep(used), form.weights[:, used].T, form.offsets[:, used].T
    )
    texts = check_texts(texts)
    tokens: dict[str, TextTokens] = {}
    contributions: dict[str, np.ndarray] = {}
    for text, found, activations in read_tokens(transformer, texts, shares.layout):
        tokens[text], contributions[text] = found, shares.of_tokens(activations)
    return TokenExplanation(
        tokens=[tokens[text] for text in texts],
        contributions=[contributions[text] for text in texts],
        intercept=form.intercept,
        classes=pipeline.classes_,
    )


def _to_linear_form(pipeline: Pipeline) -> tuple[LLMActivationTransformer, LinearForm]:
    """Express a pipeline's decision values in the columns of its activation transformer."""
    *steps, head = _flatten(pipeline)
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
                f"The step {step!r} is not known to be linear in its columns, so decisions are no "
                "sum over tokens. Between activations and classifier may be selectors, scalers, PCA "
                "and TruncatedSVD."
            )
    raise ValueError("No step of the pipeline is an LLMActivationTransformer.")


def _flatten(pipeline: Pipeline) -> Iterator[Any]:
    for _, step in pipeline.steps:
        if isinstance(step, Pipeline):
            yield from _flatten(step)
        else:
            yield step


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

    def of_tokens(self, activations: np.ndarray) -> np.ndarray:
        """Turn activations (n_tokens, n_columns) into contributions (n_tokens, n_values)."""
        total = np.zeros((len(activations), self.weights.shape[1]))
        for segment, columns in zip(self.layout.segments, self.layout.slices, strict=True):
            share = _SHARES[segment.pooling]
            values = activations[:, columns].astype(np.float64)
            total += share(values, self.weights[columns], self.offsets[columns])
        return total


def _evenly(values: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return (values @ weights + offsets.sum(axis=0)) / len(values)


def _to_largest(values: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return _to_place(values.argmax(axis=0), values, weights, offsets)


def _to_first(values: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return _to_place(np.zeros(len(weights), dtype=int), values, weights, offsets)


def _to_last(values: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return _to_place(np.full(len(weights), len(values) - 1), values, weights, offsets)


def _to_place(
    place: np.ndarray, values: np.ndarray, weights: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """Give each column whole to one token; ``place`` of shape (n_columns,) says which."""
    pooled = values[place, np.arange(len(place))]  # (n_columns,)
    total = np.zeros((len(values), weights.shape[1]))
    np.add.at(total, place, pooled[:, None] * weights + offsets)
    return total


_SHARES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": _evenly,
    "max": _to_largest,
    "first": _to_first,
    "last": _to_last,
}
