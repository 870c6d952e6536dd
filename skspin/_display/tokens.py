"""What each token of one text adds to a class's decision value."""

from __future__ import annotations

import numpy as np

from skspin._display.axes import BLUE, VERMILION, given_or_new
from skspin._explain import explain_tokens

_MOST_BARS = 40
_MOST_CHARACTERS = 28


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
        text : str
            The text.
        label : class label, default=None
            The class to explain; None for the one that is predicted.
        ax : matplotlib Axes, default=None
            Where to draw; None makes a new figure.

        Returns
        -------
        display : TokenContributionDisplay
        """
        explanation = explain_tokens(estimator, [text]).merge_words()
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
        n_hidden = len(self.tokens) - len(shown)
        self.ax_, self.figure_ = given_or_new(ax, figsize=(6.4, 1.2 + 0.22 * len(shown)))
        values = self.contributions[shown]
        self.bars_ = self.ax_.barh(
            range(len(shown)), values, color=np.where(values > 0, BLUE, VERMILION), height=0.8
        )
        # A long word would leave no space for bars; matplotlib would read a "$" as a formula.
        names = [_shorten(self.tokens[i]).replace("$", r"\$") for i in shown]
        self.ax_.set_yticks(range(len(shown)), names, fontsize="small")
        self.ax_.tick_params(axis="y", length=0)
        self.ax_.set_ylim(len(shown) - 0.5, -0.5)  # the first token on top
        self.ax_.grid(axis="x", alpha=0.3, linewidth=0.5)
        self.ax_.grid(visible=False, axis="y")
        self.ax_.spines["left"].set_visible(False)
        self.ax_.axvline(0, color="black", linewidth=0.8)
        self.ax_.set_xlabel(f"contribution to the decision value for {self.label}")
        total = self.contributions.sum() + self.intercept
        rest = f"\n{n_hidden} small ones not shown" if n_hidden else ""
        self.ax_.set_title(
            f"{total:+.2f} = tokens {self.contributions.sum():+.2f}, intercept "
            f"{self.intercept:+.2f}{rest}",
            fontsize="medium",
            loc="left",
        )
        return self


def _shorten(token: str) -> str:
    return token if len(token) <= _MOST_CHARACTERS else f"{token[: _MOST_CHARACTERS - 1]}…"
