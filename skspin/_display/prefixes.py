"""A class's score after every token of one text, and where it reaches a threshold."""

from __future__ import annotations

import numpy as np

from skspin._display.axes import BLUE, VERMILION, given_or_new
from skspin._serving import score_prefixes

_MOST_NAMED = 48  # tokens; more can't be read below the axis


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
        return cls.from_scores(
            score_prefixes(estimator, [text]),
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
        n_tokens = len(self.tokens)
        named = n_tokens <= _MOST_NAMED
        self.ax_, self.figure_ = given_or_new(ax, figsize=(8, 3.6))
        places = np.arange(n_tokens) if named else np.arange(1, n_tokens + 1)
        (self.line_,) = self.ax_.plot(
            places,
            self.scores,
            color=BLUE,
            linewidth=1.5,
            marker="o" if named else None,
            markersize=4,
        )
        self.threshold_line_ = None
        if self.threshold is not None:
            self._draw_threshold(places)
        if named:
            # Matplotlib would read a "$" as the start of a formula.
            names = [token.replace("$", r"\$") for token in self.tokens]
            self.ax_.set_xticks(places, names, rotation=90, fontsize="small")
            self.ax_.tick_params(axis="x", length=0)
            self.ax_.set_xlabel("text so far")
        else:
            self.ax_.set_xlabel("tokens so far")
        self.ax_.margins(x=0.02)
        self.ax_.set_ylabel(self.name)
        return self

    def _draw_threshold(self, places: np.ndarray) -> None:
        """Draw the threshold, and mark the first token that reaches it."""
        self.threshold_line_ = self.ax_.axhline(
            self.threshold, color=VERMILION, linewidth=1, linestyle="--"
        )
        above = np.flatnonzero(self.scores >= self.threshold)
        note = f"threshold {self.threshold:.3g}: not reached"
        if len(above):
            at = above[0]
            word = self.tokens[at].replace("$", r"\$")
            note = f"threshold {self.threshold:.3g}: reached at token {at + 1}, “{word}”"
            self.ax_.plot(
                places[at],
                self.scores[at],
                marker="o",
                markersize=9,
                markerfacecolor="none",
                markeredgecolor=VERMILION,
                markeredgewidth=1.5,
            )
        self.ax_.set_title(note, fontsize="medium", loc="left", color=VERMILION)
