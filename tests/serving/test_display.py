"""The picture of a growing text's scores, read back from what matplotlib was told to draw."""

import matplotlib
import numpy as np
import pytest
from growing_texts import growing

from skspin import PrefixScoresDisplay, score_prefixes

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

TEXT = "word3 word30 word31 word7 word8"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_scores_are_drawn_over_the_text():
    spin = growing()
    display = PrefixScoresDisplay.from_estimator(spin, TEXT, threshold=0.25)
    values = score_prefixes(spin, [TEXT]).for_class(1)[0]
    np.testing.assert_allclose(display.line_.get_ydata(), values, rtol=1e-5)
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == TEXT.split()
    assert display.ax_.get_ylabel() == "decision value for 1"
    assert set(display.threshold_line_.get_ydata()) == {0.25}
    scores = score_prefixes(spin, ["word1", TEXT])
    _, ax = plt.subplots()
    other = PrefixScoresDisplay.from_scores(
        scores, text=1, label=0, response_method="predict_proba", ax=ax
    )
    assert other.ax_ is ax and other.figure_ is ax.figure and other.threshold_line_ is None
    assert ax.get_ylabel() == "probability of 0"
    np.testing.assert_allclose(other.line_.get_ydata(), scores.probabilities[1][:, 0])


def test_the_first_token_that_reaches_the_threshold_is_marked():
    display = PrefixScoresDisplay(
        tokens=["a", "$b$", "c"], scores=np.array([0, 2, 3]), threshold=2
    ).plot()
    assert display.ax_.get_title("left") == "threshold 2: reached at token 2, “\\$b\\$”"
    mark = display.ax_.lines[-1]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (1, 2)
    display.threshold = 4
    assert display.plot().ax_.get_title("left") == "threshold 4: not reached"


def test_of_a_long_text_tokens_are_counted():
    display = PrefixScoresDisplay(tokens=["a"] * 300, scores=np.arange(300)).plot()
    assert display.ax_.get_xlabel() == "tokens so far"
    assert len(display.ax_.get_xticks()) < 20
