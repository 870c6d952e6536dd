"""
A Dask cluster
==============

Reading texts is the heavy part, and it can be divided: each worker takes some
texts, runs them through its own copy of the model and gives rows of
activations back. skspin leaves this to joblib, so it runs wherever joblib
runs: in processes on this machine, or on `Dask
<https://distributed.dask.org>`__ workers on many machines.
"""

# %%
# A cluster
# ---------
# Two workers, each a process of its own that shares nothing with this one. For
# a real cluster give ``Client`` its scheduler's address. Workers need skspin
# and the model (a hub id, or a folder that is at the same path everywhere),
# but no shared disk.

import matplotlib.pyplot as plt
import numpy as np
from dask.distributed import Client, get_task_stream
from distributed.deploy import SubprocessCluster
from joblib import parallel_config
from sklearn.model_selection import train_test_split

from skspin import LLMActivationTransformer, make_spin_pipeline
from skspin.datasets import demo_model, load_docstrings

docstrings = load_docstrings(n_per_class=150)
train, test, y_train, y_test = train_test_split(
    docstrings.data,
    docstrings.target,
    stratify=docstrings.target,
    random_state=0,
)
cluster = SubprocessCluster(
    n_workers=2,
    worker_kwargs={"nthreads": 1, "dashboard": False},
    scheduler_kwargs={"dashboard_address": None},
)
client = Client(cluster)
client.wait_for_workers(2)
print(f"{len(client.scheduler_info()['workers'])} workers")

# %%
# Nothing changes in the pipeline
# -------------------------------
# ``parallel_config`` says where to run. This process cuts the texts into
# shards of similar work, keeps what comes back in the store, and does the
# rest: the probes and the head are small. Only the workers load the model.

spin = make_spin_pipeline(demo_model(), site="hidden", pooling="mean")
with parallel_config(backend="dask"), get_task_stream(client) as stream:
    spin.fit(train, y_train)
    score = spin.score(test, y_test)
print(f"accuracy on {len(test)} test texts: {score:.3f}")

# %%
# Who did what
# ------------
# One bar for each shard. The first one on each worker is long, because the
# worker imports PyTorch and loads the model; it then keeps it.

shards = [
    (task["worker"], part["start"], part["stop"])
    for task in stream.data
    for part in task["startstops"]
    if part["action"] == "compute"
]
workers = sorted({worker for worker, _, _ in shards})
begin = min(start for _, start, _ in shards)
figure, ax = plt.subplots(figsize=(8, 2.2), layout="constrained")
for worker, start, stop in shards:
    ax.barh(
        workers.index(worker),
        stop - start,
        left=start - begin,
        height=0.6,
        color="C0",
        edgecolor="white",
    )
ax.set_yticks(
    range(len(workers)), [f"worker {i + 1}" for i in range(len(workers))]
)
ax.set(xlabel="seconds")
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# The same numbers
# ----------------
# The workers' rows are those that this process computes by itself. It keeps
# all of them now, so a search needs no cluster any more.

client.close()
cluster.close()
alone = LLMActivationTransformer(demo_model(), cache=None).fit_transform(
    test[:20]
)
difference = np.abs(spin["activations"].transform(test[:20]) - alone).max()
print(f"Largest difference over 20 texts: {difference:.1e}")
