"""
Which words decide, and what a neuron looks for
===============================================

A linear classifier on pooled activations can be taken apart exactly: every
token's share in the decision value is known, and the shares add up to it. Here
reviews of two kinds are told apart, one of them is explained word by word, and
a selected neuron gets a name.
"""

# %%
# A pipeline to explain
# ---------------------
# Short opinions, for and against. A few dozen are enough, since the language
# model knows what the words mean.

import matplotlib.pyplot as plt
import numpy as np

from skspin import (
    TokenContributionDisplay,
    explain_neurons,
    explain_tokens,
    make_spin_pipeline,
)
from skspin.datasets import demo_model

GOOD = (
    "wonderful charming gripping moving clever hilarious beautiful brilliant"
)
BAD = "dreadful clumsy boring shallow tedious annoying ugly awful"
GOOD, BAD = GOOD.split(), BAD.split()
FRAMES = [
    "The story was {} from start to finish.",
    "What a {} performance by the lead!",
    "I found the music {}, and my friends agreed.",
    "A {} film about two brothers and a boat.",
    "The dialogue is {}, if you ask me.",
]
texts = [frame.format(word) for frame in FRAMES for word in GOOD + BAD]
labels = np.array([word in GOOD for _ in FRAMES for word in GOOD + BAD])
labels = np.where(labels, "good", "bad")

spin = make_spin_pipeline(demo_model(), dtype="float32").set_params(
    classify__C=0.03
)
spin.fit(texts, labels)

# %%
# One prediction, word by word
# ----------------------------
# No training text had these words of praise and blame. Contributions and
# intercept add up to what ``decision_function`` gives, which is in favour of
# the second class, ``good``.

new = [
    "A delightful opening, but the second half is a dull, lifeless mess.",
    "Nothing about it is lovely.",
    "Every minute of it was a joy; I laughed until I cried.",
]
explanation = explain_tokens(spin, new).merge_words()
print(
    np.round(explanation.decision_values[:, 0], 3),
    np.round(spin.decision_function(new), 3),
)

TokenContributionDisplay.from_explanation(explanation, text=0, label="good")
plt.show()

# %%
# In a notebook the explanation shows itself as text. Blue speaks for the
# class, vermilion against.

explanation

# %%
# Contributions tell which tokens' activations led to the decision. The model
# has mixed the tokens by then: "Nothing" above may have changed the
# activations at "lovely".
#
# The words of a class
# --------------------
# ``to_frame`` gives every number. Averaged over all texts, contributions show
# what the classifier looks for; ``top_tokens`` adds them up instead, and so
# lists the words that decided most, which favours frequent ones.

frame = explain_tokens(spin, texts).merge_words().to_frame()
by_word = (
    frame[frame.end > 0].groupby("token").contribution.mean().sort_values()
)
print("for bad: ", ", ".join(by_word.index[:8]))
print("for good:", ", ".join(by_word.index[:-9:-1]))

# %%
# Naming a neuron
# ---------------
# The neuron with the largest weight in the classifier, and the tokens that
# activate it most. ``explain_neurons`` works with any classifier.

weights = spin["classify"].coef_[0]
name = spin[:-1].get_feature_names_out()[np.argmax(np.abs(weights))]
print(f"{name}, weight {weights[np.argmax(np.abs(weights))]:+.3f}")
neurons = explain_neurons(spin, texts + new, name, n_top=8)
print(neurons.to_frame()[["token", "activation"]].to_string(index=False))

# %%

neurons
