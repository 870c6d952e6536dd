"""
Text beside numbers: SPIN in a ColumnTransformer
================================================

Tables often have a text column among others. Here a table of docstrings has a
few words of text and seven numbers. A
:class:`~sklearn.compose.ColumnTransformer` sends the text to the language
model and the numbers past it; one classifier sees both.
"""

# %%
# A table with text and numbers
# -----------------------------
# The numbers are counted from whole docstrings, and only the first four words
# of each are left in the text column, so that no column says everything.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skspin import LLMActivationTransformer, SalientNeuronSelector
from skspin.datasets import demo_model, load_docstrings

docstrings = load_docstrings(n_per_class=120)
whole = pd.Series(docstrings.data)
words = whole.str.split()
table = pd.DataFrame(
    {
        "text": words.str[:4].str.join(" "),
        "log_characters": np.log(whole.str.len()),
        "letters_per_word": words.str.join("").str.len() / words.str.len(),
        "log_backticks": np.log1p(whole.str.count("`")),
        "log_digits": np.log1p(whole.str.count(r"\d")),
        "brackets": whole.str.count(r"\["),
        "capitals": whole.str.count("[A-Z]") / whole.str.len(),
        "own_name": whole.str.count("LIBRARY"),
    }
)
numbers = list(table.columns[1:])
print(table.head(3).to_string())

# %%
# Each column to its own transformer
# ----------------------------------
# The text needs both of SPIN's steps: the selector has to come right after the
# transformer, where it can see which column belongs to which layer.

spin = make_pipeline(
    LLMActivationTransformer(demo_model(), layers=[0, 2, 4, 6]),
    SalientNeuronSelector(sparsity=0.2),
)
branches = {
    "numbers": [("numbers", "passthrough", numbers)],
    "text": [("text", spin, "text")],
    "text and numbers": [
        ("text", spin, "text"),
        ("numbers", "passthrough", numbers),
    ],
}

# %%
# The texts go through the model once for all that follows, folds and branches
# alike.

scores = {}
for name, branch in branches.items():
    model = make_pipeline(
        ColumnTransformer(branch),
        StandardScaler(),
        LogisticRegression(C=0.03, max_iter=1000),
    )
    scores[name] = cross_val_score(model, table, docstrings.target, cv=5)
    print(f"{name:<18}{scores[name].mean():.3f} ± {scores[name].std():.3f}")

figure, ax = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
for height, values in enumerate(scores.values()):
    ax.barh(height, values.mean(), height=0.6, color="C0", alpha=0.4)
    ax.plot(values, np.full(5, height), "o", color="C0", markersize=5)
ax.axvline(0.2, linestyle=":", color="black")
ax.text(0.205, 2.42, "chance", va="bottom")
ax.set_yticks(range(3), list(scores))
ax.set(xlabel="accuracy: each fold, and the mean", xlim=(0, 1))
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# Names all the way
# -----------------
# The fitted model can name every column that the classifier sees.

model.fit(table, docstrings.target)
print(*model[0].get_feature_names_out()[[0, 1, -2, -1]])
