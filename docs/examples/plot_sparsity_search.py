"""
How many neurons? A search over sparsity
========================================

Sparsity decides how many neurons of each layer are kept. There are two rules
for it: keep the fewest neurons that hold a share of the layer's *salience*
(SPIN's rule), or keep a share of the layer's neurons by *count*. Both read the
same probes, so searching over all of this costs one pass through the language
model and one probe for each layer and fold.
"""

# %%
# Real text, and a small model that needs no download:

import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from skspin import SparsityPathDisplay, make_spin_pipeline
from skspin.datasets import demo_model, load_docstrings

docstrings = load_docstrings(n_per_class=120)
spin = make_spin_pipeline(demo_model(), site="hidden", pooling="mean")

# %%
# Search both rules
# -----------------
# The values differ, because they mean different things: at 0.9 the first rule
# keeps the neurons with the first tenth of the salience, often one or two; the
# second keeps a tenth of the neurons.

searches = {}
for criterion, values in [
    ("salience", [0.02, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9]),
    ("count", [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]),
]:
    spin.set_params(select__criterion=criterion)
    search = GridSearchCV(spin, {"select__sparsity": values}, cv=5)
    searches[criterion] = search.fit(docstrings.data, docstrings.target)
    print(
        f"{criterion}: best {search.best_params_}, "
        f"accuracy {search.best_score_:.3f}"
    )

# %%
# skspin draws a search as its score, with the standard deviation over folds,
# and the number of neurons that are kept. SPIN's rule is on the left.

figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
displays = {
    criterion: SparsityPathDisplay.from_search(search, ax=ax)
    for (criterion, search), ax in zip(searches.items(), axes, strict=True)
}
plt.show()

# %%
# The two rules by what they cost
# -------------------------------
# To compare the rules, put the number of neurons on the axis. How many columns
# the classifier sees matters much more than which rule chose them.

figure, ax = plt.subplots(layout="constrained")
for (criterion, display), marker in zip(displays.items(), "os", strict=True):
    ax.errorbar(
        display.n_neurons,
        display.score_mean,
        yerr=display.score_std,
        marker=marker,
        capsize=3,
        label=f'criterion="{criterion}"',
    )
ax.set(
    xscale="log",
    xlabel="neurons kept, of all layers",
    ylabel="accuracy, 5 folds",
)
ax.legend(frameon=False)
plt.show()

# %%
# The same neurons in every fold?
# -------------------------------
# A selection that changes with every fold says little about the model. So look
# at the share of neurons that two folds have in common; two random choices of
# the same sizes would share far fewer.

best = clone(searches["salience"].best_estimator_)
supports = []
for rows, _ in StratifiedKFold(5).split(docstrings.data, docstrings.target):
    best.fit([docstrings.data[row] for row in rows], docstrings.target[rows])
    supports.append(best["select"].get_support())
pairs = [(a, b) for i, a in enumerate(supports) for b in supports[:i]]
shared = np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])
by_chance = np.mean(
    [
        a.mean() * b.mean() / (a.mean() + b.mean() - a.mean() * b.mean())
        for a, b in pairs
    ]
)
print(
    f"Two folds share {shared:.0%} of their neurons; "
    f"by chance it would be {by_chance:.0%}."
)
