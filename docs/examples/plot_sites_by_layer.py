"""
Where does the model know it? Sites and layers
==============================================

A block of a transformer can be read in three places: the *hidden* state that
it passes on, the neurons of its feed-forward part (*mlp*), and the outputs of
its *attention* heads. Here a sparse probe is fitted to each of them in every
layer. All of it is read in one pass through the model.
"""

# %%
# One pass reads three sites of all layers. The selector fits one probe to each
# and measures it on a held-out part of the texts.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skspin import LLMActivationTransformer, SalientNeuronSelector
from skspin.datasets import demo_model, load_docstrings

docstrings = load_docstrings(n_per_class=150)
sites = ("hidden", "mlp", "attention")
transformer = LLMActivationTransformer(demo_model(), site=sites)
X = transformer.fit_transform(docstrings.data)
X_train, X_test, y_train, y_test = train_test_split(
    X, docstrings.target, stratify=docstrings.target, random_state=0
)
selector = SalientNeuronSelector(sparsity=0.2, validation_fraction=0.4).fit(
    X_train, y_train
)
print(
    f"{X.shape[1]:,} columns, {selector.n_selected_.sum():,} of them selected"
)

# %%
# The probes by layer
# -------------------
# Layer 0 holds the embeddings, which have no feed-forward neurons and no
# attention. On so few texts a score is uncertain by about three points either
# way, so small ups and downs mean nothing.

figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 4), layout="constrained"
)
for site, marker in zip(sites, "os^", strict=True):
    chosen = [name.endswith(site) for name in selector.layer_names_]
    layers = [
        int(name.split("_")[0].removeprefix("layer"))
        for name in selector.layer_names_
    ]
    layers = np.array(layers)[chosen]
    left.plot(
        layers, selector.layer_scores_[chosen], marker=marker, label=site
    )
    right.plot(layers, selector.n_selected_[chosen], marker=marker, label=site)
left.set(xlabel="layer", ylabel="held-out accuracy of the probe")
right.set(xlabel="layer", ylabel="neurons selected")
left.legend(frameon=False)
plt.show()

# %%
# What a classifier makes of them
# -------------------------------
# The same head on the selected neurons of one site, of all sites, and on the
# last layer alone. The transformer gives a NumPy array that also knows which
# column is which, and still does once rows are chosen, as above. Once columns
# are chosen it does not, but ``get_feature_names_out`` names them.

names = transformer.get_feature_names_out()
last = np.array([name.startswith("layer6_hidden") for name in names])
choices = {
    site: selector.support_ & [f"_{site}_" in name for name in names]
    for site in sites
}
choices |= {"all three": selector.support_, "last hidden layer": last}
for name, columns in choices.items():
    head = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)
    )
    score = head.fit(X_train[:, columns], y_train).score(
        X_test[:, columns], y_test
    )
    print(f"{name:<18}{columns.sum():>6} columns{score:>8.3f}")
