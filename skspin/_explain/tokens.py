"""What each token adds to a linear classifier's decision values, and tokens in colour as HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from numbers import Integral
from typing import NamedTuple

import numpy as np
from sklearn.utils import check_scalar

from skspin._explain.linear import LinearForm, classes_of, column_and_sign, to_linear_form
from skspin._layout import Layout
from skspin._model import token_activations
from skspin._pipeline import fitted_pipeline, flatten, read_texts
from skspin._texts import TextTokens, tabulate

_MOST_SHOWN = 20  # texts in a notebook


class TopToken(NamedTuple):
    """A token's (or word's) contributions to a class, over a corpus."""

    token: str
    total: float
    n_occurrences: int


@dataclass(frozen=True, eq=False, repr=False)
class TokenExplanation:
    """What each token adds to each class's decision value; :func:`~skspin.explain_tokens` makes it.

    In a notebook it shows the texts with coloured tokens.

    Parameters
    ----------
    tokens : list of TextTokens of length n_texts
        The tokens, special tokens included, and where in their text they are.
    contributions : list of ndarray of shape (n_tokens, n_decision_values)
        What each token adds to each decision value.
    intercept : ndarray of shape (n_decision_values,)
        The part of each decision value that does not come from tokens.
    classes : ndarray of shape (n_classes,)
        The classifier's classes. Two classes share one decision value, which is in favour of the
        second. For a :class:`~sklearn.multioutput.MultiOutputClassifier` the numbers of its outputs
        or, where one has more than two classes, pairs of output and class.
    """

    tokens: list[TextTokens]
    contributions: list[np.ndarray]
    intercept: np.ndarray
    classes: np.ndarray

    @property
    def decision_values(self) -> np.ndarray:
        """The sums, of shape (n_texts, n_decision_values)."""
        sums = np.array([part.sum(axis=0) for part in self.contributions])
        return sums.reshape(-1, len(self.intercept)) + self.intercept  # without texts, too

    def __repr__(self) -> str:
        """Say what is explained."""
        return f"<TokenExplanation of {len(self)} texts for the classes {self.classes.tolist()}>"

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.tokens)

    def __getitem__(self, texts) -> TokenExplanation:
        """Choose one text by its number, or several by a slice."""
        chosen = texts
        if not isinstance(texts, slice):
            number = range(len(self))[texts]  # or IndexError
            chosen = slice(number, number + 1)
        return replace(self, tokens=self.tokens[chosen], contributions=self.contributions[chosen])

    def merge_words(self) -> TokenExplanation:
        """Add up the tokens of each word.

        Words are runs of letters and digits; other marks are words of their own.

        Returns
        -------
        explanation : TokenExplanation
            The same explanation, with words in place of tokens.
        """
        texts = zip(self.tokens, self.contributions, strict=True)
        merged = [tokens.merge(tokens.words(), values) for tokens, values in texts]
        words, contributions = [words for words, _ in merged], [values for _, values in merged]
        return replace(self, tokens=words, contributions=contributions)

    def predicted_classes(self) -> np.ndarray:
        """Say which class has the largest decision value.

        Returns
        -------
        ndarray of shape (n_texts,)
            One of ``classes`` for each text.
        """
        values = self.decision_values
        best = (values[:, 0] > 0).astype(int) if self._two_sided else values.argmax(axis=1)
        return self.classes[best]

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
        column, sign = column_and_sign(label, self.classes, len(self.intercept))
        return [sign * part[:, column] for part in self.contributions]

    def intercept_for_class(self, label) -> float:
        """Look up the intercept in favour of one class.

        Parameters
        ----------
        label : class label
            One of ``classes``.

        Returns
        -------
        float
            What the class's decision value is without tokens.
        """
        column, sign = column_and_sign(label, self.classes, len(self.intercept))
        return float(sign * self.intercept[column])

    @property
    def _two_sided(self) -> bool:
        return len(self.intercept) == 1 and len(self.classes) == 2

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
            With ``token`` (as the texts write it, without spaces around it), ``total`` (the sum of
            its contributions) and ``n_occurrences``, largest total first. Special tokens and those
            of the prompt are left out.
        """
        check_scalar(n, "n", Integral, min_val=1)
        totals: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for part, values in zip(self.tokens, self.for_class(label), strict=True):
            for token, value, in_text in zip(part.surfaces(), values, part.in_text, strict=True):
                if in_text:
                    totals[token] += value
                    counts[token] += 1
        return [
            TopToken(token, float(total), counts[token]) for token, total in totals.most_common(n)
        ]

    def to_frame(self):
        """Tabulate every contribution.

        Returns
        -------
        pandas.DataFrame
            One row per text, token and decision value, with the columns ``text`` (its number),
            ``token``, ``start`` and ``end`` (characters; both 0 for special tokens), ``class`` and
            ``contribution``.
        """
        classes = self.classes[-len(self.intercept) :]  # of two classes the second
        return tabulate(self.tokens, classes, "contribution", self.contributions)

    def _repr_html_(self) -> str:
        entries = []
        for number, label in enumerate(self.predicted_classes()[:_MOST_SHOWN]):
            # Of two classes always the second, so that colours mean the same in every text.
            label = self.classes[1] if self._two_sided else label
            values = self[number].for_class(label)[0]
            total = values.sum() + self.intercept_for_class(label)
            heading = f"for <b>{escape(str(label))}</b>: {total:+.3g}"
            entries.append((heading, _text_to_html(self.tokens[number], values)))
        legend = (
            f"Tokens speak {_swatch(1, 'for')} or {_swatch(-1, 'against')} a class; with the "
            "intercept they add up to its decision value."
        )
        return page_to_html(legend, entries, max(0, len(self) - _MOST_SHOWN))


def explain_tokens(pipeline, texts):
    """Split a linear classifier's decision values into what each token adds.

    The contributions are exact: over all tokens of a text they add up, with the intercept, to what
    ``pipeline.decision_function`` returns. A neuron's value is divided among the tokens that it
    came from: under mean pooling each token takes its share; under max pooling the token with the
    maximum (the first of several) takes all; under first or last pooling that token takes all. If a
    step centres the columns, contributions count from that centre: a token with every neuron at its
    average adds nothing. Read more in the user guide, :doc:`/user_guide/explaining`.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted: an :class:`LLMActivationTransformer`, steps that are linear in the columns
        (selectors; :class:`~sklearn.preprocessing.StandardScaler` and other scalers;
        :class:`~sklearn.decomposition.PCA`), and a linear classifier, such as
        :class:`~sklearn.linear_model.LogisticRegression`, :class:`~sklearn.svm.LinearSVC`,
        :class:`~sklearn.discriminant_analysis.LinearDiscriminantAnalysis`,
        :class:`~sklearn.svm.SVC` with ``kernel="linear"`` and two classes (with more it takes
        votes), or :class:`~sklearn.multiclass.OneVsRestClassifier` or
        :class:`~sklearn.multioutput.MultiOutputClassifier` around one. It may be pruned or frozen.
        Steps that act in ``fit`` only, such as samplers, are ignored.
    texts : list, tuple, array, Series or one-column frame of str
        The texts to explain. They go through the model once more, as tokens are not stored. Steps
        before the transformer are applied first; the tokens are those that the model reads.

    Returns
    -------
    explanation : TokenExplanation
        One entry per text.

    Raises
    ------
    TypeError, NotFittedError
        If ``pipeline`` is no fitted Pipeline. Of a search, pass its ``best_estimator_``.
    ValueError
        If the classifier or a step is not linear, or the tokenizer does not tell where in the text
        its tokens are.

    See Also
    --------
    explain_neurons : The tokens that activate a neuron most.
    TokenContributionDisplay : A picture of one text's contributions.

    Notes
    -----
    A token's activations depend on the whole text, because the model mixes tokens. Contributions
    say which tokens' activations led to the decision, not what would change without these tokens.

    Examples
    --------
    >>> from skspin import explain_tokens, make_spin_pipeline
    >>> from skspin.datasets import demo_model
    >>> good = ["A fine film.", "Lovely.", "What a joy."]
    >>> bad = ["A bore.", "Dreadful.", "It drags."]
    >>> texts, labels = (good + bad) * 2, [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model(), dtype="float32")
    >>> spin = spin.set_params(select__C=1.0).fit(texts, labels)
    >>> text = "A lovely film, and a dreadful bore."
    >>> explanation = explain_tokens(spin, [text])
    >>> added = sum(explanation.for_class(1)[0])
    >>> added += explanation.intercept_for_class(1)
    >>> bool(abs(added - spin.decision_function([text])[0]) < 1e-4)
    True
    """
    pipeline = fitted_pipeline(pipeline, "explain_tokens")
    transformer, form = to_linear_form(pipeline)
    texts = read_texts(pipeline, texts)
    distinct = texts.distinct()
    rows = np.asarray(transformer.transform(distinct))
    pooled = dict(zip(distinct.to_list(), rows, strict=True))
    recipe = transformer._fitted_recipe(texts.conversations)
    found: dict[str, tuple[TextTokens, np.ndarray]] = {}
    for text, tokens, activations in token_activations(recipe, [*pooled], transformer.layout_):
        # Two passes through the model differ by rounding, which a scaler may magnify. So the pooled
        # pass, which the classifier sees, gives the values, and this one only each token's share.
        found[text] = tokens, _split(transformer.layout_, activations, pooled[text], form)
    *_, head = flatten(pipeline)
    parts, contributions = zip(*(found[text] for text in texts.to_list()), strict=True)
    return TokenExplanation([*parts], [*contributions], form.intercept, classes_of(head))


def _split(
    layout: Layout,
    activations: np.ndarray,  # (n_tokens, n_columns)
    pooled: np.ndarray,  # (n_columns,)
    form: LinearForm,
) -> np.ndarray:  # (n_tokens, n_decision_values)
    """Divide every column's part in one text's decision values among the text's tokens."""
    total = np.zeros((len(activations), len(form.intercept)))
    for segment, columns in zip(layout.segments, layout.slices, strict=True):
        values = activations[:, columns].astype(np.float64)  # (n_tokens, n_neurons)
        if segment.pooling == "mean":
            parts = (values - values.mean(axis=0) + pooled[columns]) / len(values)
            shares = np.full_like(values, 1 / len(values))
        else:
            shares = np.zeros_like(values)
            shares[_TAKES_ALL[segment.pooling](values), np.arange(values.shape[1])] = 1
            parts = shares * pooled[columns]
        total += parts @ form.weights[:, columns].T + shares @ form.offsets[:, columns].T
    return total


# Which token each column's value came from, (n_neurons,), given its values (n_tokens, n_neurons).
_TAKES_ALL = {
    "max": lambda values: values.argmax(axis=0),
    "first": lambda values: 0,
    "last": lambda values: len(values) - 1,
}


# Texts with coloured tokens, as HTML that reads well on light and on dark pages

# Okabe and Ito's sky blue and vermilion, half transparent: on light and dark pages, text in the
# page's own colour stays legible over them.
_FOR, _AGAINST = "86,180,233", "213,94,0"
_DEEPEST = 0.65
_AROUND = 60  # characters before and after a single token
_LINE = "line-height:1.8;white-space:pre-wrap;overflow-wrap:anywhere"
_OUTSIDE = ";font-size:75%;border:1px dotted rgba(128,128,128,0.8);padding:0 3px;margin:0 2px"
_NOTE = '<div style="font-size:85%;opacity:0.75">'


def _text_to_html(tokens: TextTokens, values: np.ndarray) -> str:
    """Write one text, its tokens blue for positive values and vermilion for negative ones."""
    unit = float(np.abs(values).max()) or 1.0  # what gets the deepest colour
    # Tokens that share characters, as the bytes of an emoji do, are written once.
    reach = np.maximum.accumulate(tokens.ends)  # (n_tokens,)
    shared = tokens.in_text[1:] & tokens.in_text[:-1] & (tokens.starts[1:] < reach[:-1])
    tokens, values = tokens.merge(np.cumsum(np.append(False, ~shared)), values)
    parts = []
    done = 0  # characters written
    for token, start, end, value in zip(
        tokens.tokens, tokens.starts, tokens.ends, values, strict=True
    ):
        start = max(start, done)  # a character that two windows share
        if end > start:
            parts.append(escape(tokens.text[done:start]))
            done = end
        style = "" if end > start else _OUTSIDE
        label = escape(tokens.text[start:end] or token)
        parts.append(_swatch(value / unit, label, style, f"{value:+.3g}"))
    parts.append(escape(tokens.text[done:]))
    return f'<div style="{_LINE};margin:0.3em 0 0.8em 0">{"".join(parts)}</div>'


def token_to_html(text: str, start: int, end: int, value: float, *, unit: float) -> str:
    """Write one token, ``text[start:end]``, with some of the text around it."""
    before, behind = text[:start][-_AROUND:], text[end:][:_AROUND]
    before = before if len(before) == start else f"…{before}"
    behind = behind if len(behind) == len(text) - end else f"{behind}…"
    token = _swatch(value / unit, escape(text[start:end]))
    number = f'<span style="font-size:75%;opacity:0.75">{value:.3g}</span>'
    return f'<div style="{_LINE}">{number}  {escape(before)}{token}{escape(behind)}</div>'


def page_to_html(legend: str, entries: Sequence[tuple[str, str]], n_left_out: int = 0) -> str:
    """Put entries, each a heading and its HTML, under one another."""
    parts = [f"{_NOTE}{legend}</div>"]
    for heading, body in entries:
        parts.append(f'<div style="font-size:85%;margin-top:0.6em">{heading}</div>{body}')
    if n_left_out:
        parts.append(f"{_NOTE}… and {n_left_out} more</div>")
    return f'<div style="max-width:60em">{"".join(parts)}</div>'


def _swatch(share: float, label: str, style: str = "", title: str = "") -> str:
    """Put the colour of a value between -1 and 1 behind some HTML."""
    color = f"rgba({_FOR if share > 0 else _AGAINST},{min(abs(share), 1.0) * _DEEPEST:.2f})"
    style = f"border-radius:3px;background:{color}{style}"
    return f'<span style="{style}" title="{title}">{label}</span>'
