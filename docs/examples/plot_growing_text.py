"""
A verdict after every token: scores of a growing text
=====================================================

What does a classifier say of a text while it is being written? A causal
language model reads from left to right, so one pass tells what the pipeline
would have said after each token. Here a review begins well and ends badly, and
the scores show where it turns.
"""

# %%
# A pipeline on a causal model
# ----------------------------
# Short opinions, for and against. The model is SmolLM2-135M-Instruct where it
# is installed. Without it, a small random decoder shows the calls, and its
# scores mean nothing.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_curve
from sklearn.model_selection import train_test_split

from skspin import (
    PrefixScorer,
    PrefixScoresDisplay,
    make_spin_pipeline,
    prune,
    score_prefixes,
)
from skspin.datasets import demo_llm, demo_model

try:
    model = {"model": demo_llm()}
except ModuleNotFoundError:
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
    }
    config = LlamaConfig(vocab_size=30522, num_attention_heads=4, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = {"model": LlamaModel(config), "tokenizer": tokenizer}

GOOD = (
    "wonderful charming gripping moving clever hilarious beautiful brilliant"
)
BAD = "dreadful clumsy boring shallow tedious annoying ugly awful"
GOOD, BAD = GOOD.split(), BAD.split()
FRAMES = [
    "The story was {} from start to finish.",
    "The lead gave a {} performance.",
    "I found the music {}, and my friends agreed.",
    "It is a {} film about two brothers and a boat.",
    "The dialogue is {}, if you ask me.",
    "We saw it on Friday. It was {}.",
]
texts = [frame.format(word) for frame in FRAMES for word in GOOD + BAD]
labels = [
    "good" if word in GOOD else "harsh" for _ in FRAMES for word in GOOD + BAD
]
train, held_out, y_train, y_held_out = train_test_split(
    texts, labels, test_size=0.3, stratify=labels, random_state=0
)
# Many models have unusual activations at the very first token. With a prompt
# in front, that token is not part of the text.
spin = make_spin_pipeline(
    **model, prompt="Review: {text}", pool_over="text", pooling="mean"
)
spin.set_params(select__C=1.0, classify__C=0.03)
spin = prune(spin.fit(train, y_train))
print(f"held-out accuracy {spin.score(held_out, y_held_out):.2f}")

# %%
# A threshold for few false alarms
# --------------------------------
# A guard raises the alarm if *any* prefix reaches the threshold. So what
# counts is each text's highest score, and the threshold is chosen on the
# highest scores of held-out texts: at most one good text in ten may raise it.

scores = score_prefixes(spin, held_out)
highest = scores.to_frame().groupby("text").score.max()
false_alarms, found, thresholds = roc_curve(
    y_held_out, highest, pos_label="harsh", drop_intermediate=False
)
best = np.flatnonzero(false_alarms <= 0.1)[-1]
threshold = thresholds[best]
print(
    f"threshold {threshold:.2f}: {found[best]:.0%} found, "
    f"{false_alarms[best]:.0%} false alarms"
)

# %%
# The score rises and falls with the text
# ---------------------------------------

review = (
    "The opening is lovely, and the lead is charming. Then comes the second "
    "half: awful, tedious, clumsy and ugly. The ending is the most annoying "
    "of all."
)
display = PrefixScoresDisplay.from_estimator(spin, review, threshold=threshold)
plt.show()

# %%
# The last value is what the pipeline says of the whole review:

print(
    f"{display.scores[-1]:.3f} and {spin.decision_function([review])[0]:.3f}"
)

# %%
# The same while it is written
# ----------------------------
# :class:`~skspin.PrefixScorer` takes the text in pieces, and reads each token
# once. A word may go on in the next piece, so it is held back until the next
# word begins.

scorer = PrefixScorer(spin)
pieces = [review[at : at + 12] for at in range(0, len(review), 12)]
for piece in pieces:
    crossing = scorer.push(piece).first_crossing(threshold)[0]
    if crossing is not None:
        print(f"stopped after: ...{review[: crossing.end][-40:]!r}")
        break
print(f"{scorer.n_tokens} of {len(display.tokens)} tokens read")
