"""
Several labels at once
======================

A text may be about several things. Here a document is one, two or three
paragraphs from different libraries' docstrings, and the labels say which
libraries occur in it. The selector takes the indicator matrix as it is: it
fits one probe for each label and layer, and a neuron's salience is summed over
labels.
"""

# %%
# Documents with several labels
# -----------------------------

import matplotlib.pyplot as plt
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import train_test_split
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline

from skspin import make_spin_pipeline
from skspin.datasets import demo_model, load_docstrings

docstrings = load_docstrings(n_per_class=250)
libraries = np.array(docstrings.target_names)
rng = np.random.default_rng(0)
documents, labels = [], []
position = 0
while position + 3 <= len(docstrings.data):
    parts = range(position, position + rng.integers(1, 4))
    documents.append(" ".join(docstrings.data[part] for part in parts))
    labels.append(np.isin(np.arange(5), docstrings.target[parts]))
    position = parts.stop
Y = np.array(labels).astype(int)  # (n_documents, n_labels)
train, test, Y_train, Y_test = train_test_split(documents, Y, random_state=0)
print(
    f"{len(train)} documents to learn from, "
    f"with {Y_train.sum(axis=1).mean():.1f} labels each"
)

# %%
# One pipeline for all labels
# ---------------------------
# Only the head has to be told: scikit-learn's
# :class:`~sklearn.multiclass.OneVsRestClassifier` takes an indicator matrix.
# The pipeline also takes the maximum over tokens, because a library may be the
# subject of one sentence only.

spin = make_spin_pipeline(
    demo_model(),
    site="hidden",
    pooling=("mean", "max"),
    sparsity=0.1,
    head=OneVsRestClassifier(LogisticRegression(C=0.003, max_iter=1000)),
).fit(train, Y_train)
words = make_pipeline(
    TfidfVectorizer(sublinear_tf=True),
    OneVsRestClassifier(LogisticRegression(C=10)),
).fit(train, Y_train)

precision = {
    name: average_precision_score(
        Y_test, model.predict_proba(test), average=None
    )
    for name, model in [("SPIN", spin), ("TF-IDF", words)]
}
for name, values in precision.items():
    print(f"{name:<8}mean average precision {values.mean():.3f}")

# %%
# Which layers each label looks at
# --------------------------------
# The probes' squared weights, summed within each layer, show where the
# knowledge about a label sits. Rows add up to 1.

selector = spin["select"]
shares = np.array(
    [
        [np.square(coef[columns]).sum() for columns in selector.layer_columns_]
        for coef in selector.coef_
    ]
)
shares /= shares.sum(axis=1, keepdims=True)

figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.6), layout="constrained"
)
heights = np.arange(5)
for offset, (name, values) in zip([-0.2, 0.2], precision.items(), strict=True):
    left.barh(heights + offset, values, height=0.38, label=name)
left.set_yticks(heights, libraries)
left.invert_yaxis()
left.set(xlabel="average precision", xlim=(0, 1))
left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
image = right.imshow(shares, cmap="cividis", aspect="auto")
right.set_yticks(heights, libraries)
right.set_xticks(range(shares.shape[1]))
right.set(xlabel="layer", title="share of the label's salience")
figure.colorbar(image, ax=right)
plt.show()
