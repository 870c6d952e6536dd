"""
Pruning a fitted pipeline, and what it saves
============================================

A fitted pipeline uses some neurons of some layers. :func:`~skspin.prune` makes
a pipeline that computes only those: the language model stops after the deepest
layer in use, and only the neurons in use are pooled. The predictions stay the
same.
"""

# %%
# A search for a shallow pipeline
# -------------------------------
# ``max_layer`` leaves out deep layers. The search needs all layers, once; the
# pruned pipeline will not.

import pickle
import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.model_selection import GridSearchCV, train_test_split

from skspin import make_spin_pipeline, prune
from skspin.datasets import demo_model, load_docstrings

docstrings = load_docstrings(n_per_class=150)
train, test, y_train, y_test = train_test_split(
    docstrings.data,
    docstrings.target,
    stratify=docstrings.target,
    random_state=0,
)
spin = make_spin_pipeline(demo_model(), site="hidden", dtype="float32")
search = GridSearchCV(spin, {"select__max_layer": range(1, 7)}, cv=3).fit(
    train, y_train
)
by_depth = dict(
    zip(range(1, 7), search.cv_results_["mean_test_score"], strict=True)
)
print({depth: round(float(score), 3) for depth, score in by_depth.items()})

# %%
# Time with and without pruning
# -----------------------------
# One pipeline for each depth, before and after pruning. ``cache=None`` makes
# every call run the model. The predictions are compared on the way.


def seconds_for(pipeline):
    """Time the quickest of three runs over the test texts."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        pipeline.decision_function(test)
        times.append(time.perf_counter() - started)
    return min(times)


rows = []
for depth in (2, 4, 6):
    whole = spin.set_params(select__max_layer=depth).fit(train, y_train)
    pruned = prune(whole)
    np.testing.assert_allclose(
        pruned.decision_function(test),
        whole.decision_function(test),
        atol=1e-4,
    )
    for pipeline in (whole, pruned):
        pipeline.set_params(activations__cache=None)
    rows.append(
        (
            depth,
            seconds_for(whole),
            seconds_for(pruned),
            whole.score(test, y_test),
        )
    )
    spin.set_params(activations__cache="memory")
    print(
        f"layers 0 to {depth}: "
        f"{rows[-1][1]:.2f} s whole, {rows[-1][2]:.2f} s pruned, "
        f"accuracy {rows[-1][3]:.3f}, "
        f"pickle {len(pickle.dumps(pruned)) / 1e3:.0f} KB"
    )

# %%
# The whole pipeline takes the same time at any depth, because it computes all
# layers and throws most away. The pruned one takes a time that grows with its
# depth.

depths, whole_seconds, pruned_seconds, accuracy = np.array(rows).T
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.6), layout="constrained"
)
left.plot(depths, len(test) / whole_seconds, marker="s", label="whole")
left.plot(depths, len(test) / pruned_seconds, marker="o", label="pruned")
left.set(
    xlabel="deepest layer in use", ylabel="texts per second", xticks=depths
)
left.set_ylim(bottom=0)
left.legend(frameon=False)
right.plot(list(by_depth), list(by_depth.values()), marker="o", color="C2")
right.set(xlabel="max_layer", ylabel="accuracy, 3 folds")
plt.show()
