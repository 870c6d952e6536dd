"""
The paper's protocol on a data set from the hub
===============================================

SPIN chooses on validation texts: the probes' ``C``, the threshold on salience
and how many layers to use. Here that is done on SST-2 with GPT-2. The script
is shown and not run, because it downloads a data set and a model of half a
gigabyte; it also needs ``pip install datasets``.
"""

# %%
# Data and splits
# ---------------
# Settings are chosen on the validation part of the training data. The hub's
# test split has no labels, so its validation split is the test set here. It is
# used once.

import numpy as np
from datasets import load_dataset
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    PredefinedSplit,
    train_test_split,
)

from skspin import SparsityPathDisplay, make_spin_pipeline

sst2 = load_dataset("stanfordnlp/sst2")
texts, y = list(sst2["train"]["sentence"]), np.array(sst2["train"]["label"])
test, y_test = (
    list(sst2["validation"]["sentence"]),
    np.array(sst2["validation"]["label"]),
)
texts, _, y, _ = train_test_split(
    texts, y, train_size=20_000, stratify=y, random_state=0
)
rows = np.arange(len(texts))
held_out = train_test_split(rows, test_size=0.2, stratify=y, random_state=0)[1]
folds = PredefinedSplit(np.where(np.isin(rows, held_out), 0, -1))

# %%
# The method
# ----------
# Feed-forward neurons, averaged over tokens; sparse probes whose ``C`` is
# chosen for each layer; the neurons that hold a share eta of the salience,
# which is ``1 - sparsity``; layers 0 to *l*. The texts go through the model
# once, into a folder, so that the script can be stopped and started again.

spin = make_spin_pipeline(
    "openai-community/gpt2",
    revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
    site="mlp",
    pooling="mean",
    head=LogisticRegression(C=0.01, max_iter=1000),
    cache="activations",
    verbose=1,
)
spin.set_params(select__C=[0.1, 0.2, 1, 10, 100])
search = GridSearchCV(
    spin,
    {
        "select__sparsity": [0.2, 0.4, 0.6, 0.8, 0.9, 0.99, 0.999],
        "select__max_layer": range(1, 13),
    },
    cv=folds,
    verbose=1,
).fit(texts, y)

# %%
# The result
# ----------

print(search.best_params_)
print(
    f"validation {search.best_score_:.4f}, "
    f"test {search.score(test, y_test):.4f}"
)
best_layer = search.best_params_["select__max_layer"]
path = GridSearchCV(
    spin.set_params(select__max_layer=best_layer),
    {"select__sparsity": search.param_grid["select__sparsity"]},
    cv=folds,
).fit(texts, y)
SparsityPathDisplay.from_search(path).plot()
