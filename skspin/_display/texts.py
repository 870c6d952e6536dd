"""One text's tokens: what each adds to a decision value, and the score after each of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from skspin._display.scores import BLUE, VERMILION, given_or_new
from skspin._explain import explain_tokens
from skspin._serving import check_threshold, score_prefixes

_MOST_BARS = 40
_MOST_CHARACTERS = 28  # of a token; a longer one would leave no space for bars
_MOST_NAMED = 48  # tokens; more can't be read below the axis
_SMALL = {"fontsize": "small", "parse_math": False}  # a "$" begins no formula
_NOTE = {"fontsize": "medium", "parse_math": False, "loc": "left"}


class TokenContributionDisplay:
    """The tokens of one text, in reading order, and what each adds to a class's decision value.

    It is best made with :meth:`from_estimator` or :meth:`from_explanation`. The parameters are kept
    as attributes. Read more in the user guide, :doc:`/user_guide/explaining`.

    Parameters
    ----------
    tokens : list of str of length n_tokens
        Tokens or words.
    contributions : ndarray of shape (n_tokens,)
        What each adds to the decision value.
    intercept : float
        The part of the decision value that does not come from tokens.
    label : class label
        The class.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes with the bars.
    figure_ : matplotlib Figure
        The figure that holds them.
    bars_ : matplotlib BarContainer
        One bar per token.

    See Also
    --------
    explain_tokens : The numbers behind the picture.

    Examples
    --------
    >>> from skspin import TokenContributionDisplay, make_spin_pipeline
    >>> from skspin.datasets import demo_model
    >>> good = ["A fine film.", "Lovely.", "What a joy."]
    >>> bad = ["A bore.", "Dreadful.", "It drags."]
    >>> texts, labels = (good + bad) * 2, [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model()).set_params(select__C=1.0)
    >>> spin = spin.fit(texts, labels)
    >>> display = TokenContributionDisplay.from_estimator(spin, "A lovely film.")
    >>> display.tokens
    ['[CLS]', 'A', 'lovely', 'film', '.', '[SEP]']
    """

    def __init__(self, *, tokens, contributions, intercept, label):
        self.tokens = tokens
        self.contributions = contributions
        self.intercept = intercept
        self.label = label

    @classmethod
    def from_estimator(cls, estimator, text, *, label=None, ax=None):
        """Explain one text, word by word, and draw it.

        Parameters
        ----------
        estimator : Pipeline
            Fitted; see :func:`explain_tokens`.
        text : str or conversation
            The text.
        label, ax : class label, matplotlib Axes, default=None
            See :meth:`from_explanation`.

        Returns
        -------
        display : TokenContributionDisplay
        """
        explanation = explain_tokens(estimator, _one(text)).merge_words()
        return cls.from_explanation(explanation, label=label, ax=ax)

    @classmethod
    def from_explanation(cls, explanation, *, text=0, label=None, ax=None):
        """Draw one text of an explanation.

        Parameters
        ----------
        explanation : TokenExplanation
            Of tokens or, after ``merge_words()``, of words.
        text : int, default=0
            Number of the text.
        label : class label, default=None
            The class to explain; None for the one that is predicted.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a new figure.

        Returns
        -------
        display : TokenContributionDisplay
        """
        one = explanation[text]
        label = one.predicted_classes()[0] if label is None else label
        display = cls(
            tokens=one.tokens[0].surfaces(),
            contributions=one.for_class(label)[0],
            intercept=one.intercept_for_class(label),
            label=label,
        )
        return display.plot(ax=ax)

    def plot(self, ax=None):
        """Draw; of a long text the 40 tokens with the largest contributions.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a new figure, higher for more tokens.

        Returns
        -------
        self : TokenContributionDisplay
            With ``ax_``, ``bars_`` and ``figure_``.
        """
        largest = np.argsort(-np.abs(self.contributions), kind="stable")[:_MOST_BARS]
        shown = np.sort(largest)  # back in reading order
        values, places = self.contributions[shown], range(len(shown))
        self.ax_, self.figure_ = given_or_new(ax, figsize=(6.4, 1.2 + 0.22 * len(shown)))
        colors = np.where(values > 0, BLUE, VERMILION)
        self.bars_ = self.ax_.barh(places, values, color=colors, height=0.8)
        self.ax_.set_yticks(places, [_shorten(self.tokens[i]) for i in shown], **_SMALL)
        self.ax_.tick_params(axis="y", length=0)
        self.ax_.set_ylim(len(shown) - 0.5, -0.5)  # the first token on top
        self.ax_.grid(axis="x", alpha=0.3, linewidth=0.5)
        self.ax_.grid(visible=False, axis="y")
        self.ax_.spines["left"].set_visible(False)
        self.ax_.axvline(0, color="black", linewidth=0.8)
        self.ax_.set_xlabel(f"contribution to the decision value for {self.label}")
        of_tokens, n_hidden = self.contributions.sum(), len(self.tokens) - len(shown)
        total = f"{of_tokens + self.intercept:+.2f}"
        rest = f"\n{n_hidden} small ones not shown" if n_hidden else ""
        note = f"{total} = tokens {of_tokens:+.2f}, intercept {self.intercept:+.2f}{rest}"
        self.ax_.set_title(note, **_NOTE)
        return self


def _one(text: Any) -> list[Any]:
    """Put one text or conversation into a list; refuse a container of str."""
    if not isinstance(text, str) and np.iterable(text) and isinstance(next(iter(text), None), str):
        raise TypeError(f"text is a {type(text).__name__}, but one str or conversation is needed.")
    return [text]


def _shorten(token: str) -> str:
    return token if len(token) <= _MOST_CHARACTERS else f"{token[: _MOST_CHARACTERS - 1]}…"


class PrefixScoresDisplay:
    """A class's score after every token of one text, with a threshold.

    It is best made with :meth:`from_estimator` or :meth:`from_scores`. The parameters are kept as
    attributes. Read more in the user guide, :doc:`/user_guide/growing`.

    Parameters
    ----------
    tokens : list of str of length n_tokens
        The text's tokens.
    scores : ndarray of shape (n_tokens,)
        The score of the prefix that ends with each token.
    name : str, default="score"
        What the scores are, for the axis.
    threshold : float or None, default=None
        Where to draw a line; None for none.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes with the line.
    figure_ : matplotlib Figure
        The figure that holds them.
    line_ : matplotlib Line2D
        The scores.
    threshold_line_ : matplotlib Line2D or None
        The threshold.

    See Also
    --------
    score_prefixes : The numbers behind the picture.

    Examples
    --------
    >>> import numpy as np
    >>> from skspin import PrefixScoresDisplay
    >>> display = PrefixScoresDisplay(
    ...     tokens=["It", "is", "a", "bore"],
    ...     scores=np.array([0.1, 0.0, -0.2, -1.5]),
    ...     threshold=-1,
    ... )
    >>> display.plot().ax_.get_ylabel()
    'score'
    """

    def __init__(self, *, tokens, scores, name="score", threshold=None):
        if threshold is not None:
            check_threshold(threshold)
        self.tokens = tokens
        self.scores = scores
        self.name = name
        self.threshold = threshold

    @classmethod
    def from_estimator(
        cls, estimator, text, *, label=None, threshold=None, response_method="auto", ax=None
    ):
        """Score the prefixes of one text, and draw them.

        Parameters
        ----------
        estimator : Pipeline
            Fitted; see :func:`score_prefixes`.
        text : str or conversation
            The text.
        label, threshold, response_method, ax : optional
            See :meth:`from_scores`.

        Returns
        -------
        display : PrefixScoresDisplay
        """
        return cls.from_scores(
            score_prefixes(estimator, _one(text)),
            label=label,
            threshold=threshold,
            response_method=response_method,
            ax=ax,
        )

    @classmethod
    def from_scores(
        cls, scores, *, text=0, label=None, threshold=None, response_method="auto", ax=None
    ):
        """Draw one text's scores.

        Parameters
        ----------
        scores : PrefixScores
            Of :func:`score_prefixes`, or the ``scores`` of a :class:`PrefixScorer`.
        text : int, default=0
            Number of the text.
        label : class label, default=None
            The class; None for the second of two.
        threshold : float or None, default=None
            Where to draw a line; None for none.
        response_method : {"auto", "decision_function", "predict_proba"}, default="auto"
            Which scores; "auto" for decision values, or probabilities if there are none.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a new figure.

        Returns
        -------
        display : PrefixScoresDisplay
        """
        options = {"label": label, "response_method": response_method}
        display = cls(
            tokens=scores.tokens[text].surfaces(),
            scores=scores.for_class(**options)[text],
            name=scores.describe(**options),
            threshold=threshold,
        )
        return display.plot(ax=ax)

    def plot(self, ax=None):
        """Draw; the tokens are named if there are at most 48.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; None makes a new figure.

        Returns
        -------
        self : PrefixScoresDisplay
            With ``ax_``, ``figure_``, ``line_`` and ``threshold_line_``.
        """
        named = len(self.tokens) <= _MOST_NAMED
        places = np.arange(len(self.tokens)) + (0 if named else 1)
        self.ax_, self.figure_ = given_or_new(ax, figsize=(8, 3.6))
        line = {"color": BLUE, "linewidth": 1.5, "marker": "o" if named else None, "markersize": 4}
        (self.line_,) = self.ax_.plot(places, self.scores, **line)
        self.threshold_line_ = None
        if self.threshold is not None:
            line = {"color": VERMILION, "linewidth": 1, "linestyle": "--"}
            self.threshold_line_ = self.ax_.axhline(self.threshold, **line)
            reached = "not reached"
            for at in np.flatnonzero(self.scores >= self.threshold)[:1]:
                reached = f"reached at token {at + 1}, “{self.tokens[at]}”"
                ring = {"markerfacecolor": "none", "markeredgecolor": VERMILION, "markersize": 9}
                self.ax_.plot(places[at], self.scores[at], "o", markeredgewidth=1.5, **ring)
            note = f"threshold {self.threshold:.3g}: {reached}"
            self.ax_.set_title(note, color=VERMILION, **_NOTE)
        if named:
            self.ax_.set_xticks(places, self.tokens, rotation=90, **_SMALL)
            self.ax_.tick_params(axis="x", length=0)
        self.ax_.set_xlabel("text so far" if named else "tokens so far")
        self.ax_.margins(x=0.02)
        self.ax_.set_ylabel(self.name)
        return self
