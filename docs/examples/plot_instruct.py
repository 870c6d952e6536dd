"""
Where in thirty blocks is the answer? An instruct model
=======================================================

We ask an instruct model about each text. It would write its answer after the
last token: where in the model can it be read, and is the last token better
than the mean over the text? The model is SmolLM2-135M-Instruct, a GGUF file,
the format of llama.cpp and Ollama.
"""

# %%
# Texts about deep learning or not
# --------------------------------
# Docstrings of PyTorch and Transformers against those of NumPy, SciPy and
# scikit-learn, with the libraries' names masked. One pass reads the last token
# and the mean in all layers.

import matplotlib.pyplot as plt
import numpy as np

from skspin import LLMActivationTransformer, SalientNeuronSelector
from skspin.datasets import demo_llm, load_docstrings

docstrings = load_docstrings(n_per_class=60)
texts = [text[:200] for text in docstrings.data]
deep = np.isin(docstrings.target, [3, 4])  # torch, transformers
question = "{text}\nIs this about neural networks? Answer yes or no:"


def read(**params):
    transformer = LLMActivationTransformer(
        demo_llm(), pooling=("mean", "last"), **params
    )
    return transformer.fit(texts), transformer.transform(texts)


asked, X_asked = read(prompt=question)
plain, X_plain = read()
print(
    f"{len(texts)} texts, {asked.n_layers_} blocks, "
    f"{X_asked.shape[1]:,} columns"
)

# %%
# One probe per layer
# -------------------
# Each probe sees one layer under one pooling, and is measured on a held-out
# half of the texts. With so few of them, a score is uncertain by about five
# points either way.


def scores(fitted, X, pooling):
    chosen = [
        segment.pooling == pooling for segment in fitted.layout_.segments
    ]
    columns = [
        c for c, use in zip(fitted.layout_.slices, chosen, strict=True) if use
    ]
    part = np.hstack([X[:, c] for c in columns])
    sizes = [c.stop - c.start for c in columns]
    selector = SalientNeuronSelector(
        layer_sizes=sizes, validation_fraction=0.5
    )
    return selector.fit(part, deep).layer_scores_


figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
ax.plot(
    scores(asked, X_asked, "last"),
    marker="o",
    markersize=4,
    label="question, last token",
)
ax.plot(
    scores(plain, X_plain, "last"),
    marker="^",
    markersize=4,
    label="text alone, last token",
)
ax.plot(
    scores(plain, X_plain, "mean"),
    marker="s",
    markersize=4,
    label="text alone, mean",
)
ax.axhline(
    max(deep.mean(), 1 - deep.mean()),
    color="gray",
    linestyle=":",
    label="larger class",
)
ax.set(xlabel="layer (0: embeddings)", ylabel="held-out accuracy of the probe")
ax.legend(frameon=False)
plt.show()

# %%
# The mean over the text is best in the middle of the model. The last blocks
# lose some of that again, because they turn to the next word. Asking a
# question and reading its last token does not help so small a model with so
# broad a topic. On reviews, a question helps the mean (see "A real decoder" in
# the benchmarks).
