"""
Quickstart: classify text with a language model's salient neurons
=================================================================

A frozen language model has already learnt a lot about text. Here its inner
neurons tell from which of five Python libraries a docstring comes, with the
libraries' names masked. The model is a small MiniLM that comes with a Python
package, so nothing is downloaded.
"""

# %%
# Real text
# ---------
# The text is on every machine that has skspin: docstrings of the libraries it
# needs.

import tempfile
import time
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skspin import (
    LayerSalienceDisplay,
    LLMActivationTransformer,
    SparsityPathDisplay,
    make_spin_pipeline,
)
from skspin.datasets import demo_model, load_docstrings

docstrings = load_docstrings(n_per_class=400)
train, test, y_train, y_test = train_test_split(
    docstrings.data,
    docstrings.target,
    test_size=0.3,
    stratify=docstrings.target,
    random_state=0,
)
print(
    f"{len(train)} texts to learn from, {len(test)} to be tested on; "
    "one of them:"
)
print(f"  {docstrings.target_names[y_train[0]]}: {train[0]}\n")

# %%
# Search over sparsity
# --------------------
# The pipeline reads the hidden states and the feed-forward neurons of all
# layers, keeps the salient ones and trains a small classifier on them. The
# search tries eight sparsities with five folds: 41 fits, but each text goes
# through the model once, because its activations are kept.

spin = make_spin_pipeline(demo_model(), site=("hidden", "mlp"), verbose=1)
search = GridSearchCV(
    spin,
    {"select__sparsity": [0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9]},
    cv=5,
    verbose=1,
)
started = time.perf_counter()
search.fit(train, y_train)
print(
    f"Searched in {time.perf_counter() - started:.0f} s; "
    f"best: {search.best_params_}"
)

# %%
# Beside two baselines
# --------------------

last_layer = make_pipeline(
    LLMActivationTransformer(demo_model(), layers=-1),
    StandardScaler(),
    LogisticRegression(C=0.1, max_iter=1000),
).fit(train, y_train)
words = make_pipeline(
    TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
).fit(train, y_train)

selector = search.best_estimator_["select"]
print(f"\n{'':<34}{'columns':>8}{'test accuracy':>15}")
for name, columns, model in [
    ("SPIN, salient neurons", selector.n_selected_.sum(), search),
    (
        "last layer, mean over tokens",
        last_layer[0].layout_.n_columns,
        last_layer,
    ),
    ("TF-IDF", len(words[0].vocabulary_), words),
]:
    print(f"{name:<34}{columns:>8}{model.score(test, y_test):>15.3f}")

# %%
# Save it, load it
# ----------------
# The file holds no weights of the language model. It remembers which ones it
# needs, and refuses others.

here = (
    Path("docs/_build") if Path("docs").is_dir() else Path(tempfile.mkdtemp())
)
here.mkdir(exist_ok=True)
joblib.dump(search.best_estimator_, here / "quickstart.joblib")
loaded = joblib.load(here / "quickstart.joblib")
assert (loaded.predict(test) == search.predict(test)).all()
size = (here / "quickstart.joblib").stat().st_size / 1e6
print(
    f"\nSaved and loaded {here / 'quickstart.joblib'} ({size:.1f} MB): "
    "the same predictions."
)

# %%
# What sparsity does, and where the salient neurons are
# -----------------------------------------------------

figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4), layout="constrained"
)
SparsityPathDisplay.from_search(search, ax=left)
LayerSalienceDisplay.from_estimator(selector, ax=right)
figure.savefig(here / "quickstart.png", dpi=150)
print(f"Drew {here / 'quickstart.png'}.")
