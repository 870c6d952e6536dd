"""
Using a GPU
===========

There is nothing to set: with ``device=None`` and ``dtype="auto"`` a CUDA GPU
is used where PyTorch finds one, in bfloat16 where it multiplies that natively.
This script times the same texts on whatever this machine has, in both number
formats; on a machine without a GPU it shows the CPU alone.
"""

# %%

import time

import matplotlib.pyplot as plt
import numpy as np
import torch

from skspin import LLMActivationTransformer
from skspin.datasets import demo_model, load_docstrings

texts = load_docstrings(n_per_class=100).data
places = [("cpu", "float32"), ("cpu", "bfloat16")]
if torch.cuda.is_available():
    places += [("cuda", "float32"), ("cuda", "bfloat16")]
else:
    print("PyTorch finds no GPU here.")

# %%
# All hidden layers, every time anew
# ----------------------------------
# The first call loads the model, so it is not timed. ``cache=None`` keeps
# nothing, and both calls compute.

speed, activations = {}, {}
for device, dtype in places:
    transformer = LLMActivationTransformer(
        demo_model(), device=device, dtype=dtype, cache=None
    ).fit(texts)
    transformer.transform(texts[:50])
    started = time.perf_counter()
    activations[device, dtype] = transformer.transform(texts)
    speed[device, dtype] = len(texts) / (time.perf_counter() - started)
    print(
        f"{device:<5} dtype={dtype:<8} "
        f"{speed[device, dtype]:7.0f} texts per second"
    )

figure, ax = plt.subplots(figsize=(6.4, 2.4), layout="constrained")
names = [f'{device}, dtype="{dtype}"' for device, dtype in speed]
bars = ax.barh(names, list(speed.values()), color="C0", height=0.6)
ax.bar_label(bars, fmt="%.0f", padding=3)
ax.invert_yaxis()
ax.margins(x=0.12)
ax.set(xlabel="texts per second")
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# How far the numbers move
# ------------------------
# bfloat16 has two to three significant digits. Activations are pooled in
# float32, and their direction hardly changes. ``dtype="auto"`` takes bfloat16
# on GPUs of compute capability 8 and later and on CPUs with AMX. Other CPUs
# gain or lose by it; the figure above shows yours.

reference = activations["cpu", "float32"]
for (device, dtype), X in activations.items():
    cosine = (X * reference).sum(axis=1) / np.linalg.norm(X, axis=1)
    cosine /= np.linalg.norm(reference, axis=1)
    print(
        f"{device:<5} dtype={dtype:<8} "
        f"least cosine similarity {cosine.min():.5f}"
    )

# %%
# Several GPUs, small GPUs
# ------------------------
# ``device=["cuda:0", "cuda:1"]`` puts a copy of the model on each and divides
# the texts. A model that does not fit on one GPU can be spread over
# several by ``model_kwargs={"device_map": "auto"}``. A pipeline that was
# fitted on a GPU loads and predicts on a machine without one.
