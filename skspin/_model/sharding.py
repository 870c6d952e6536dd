"""Texts cut into shards of about the same work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A worker that is done early takes another shard, and one that dies loses no more than one.
_SHARDS_PER_WORKER = 4
_FULL_SHARD = 50_000  # bytes of text; a few batches: less would leave batches half empty
_SHARD_BYTES = 64 * 2**20  # of activations on their way back
_TEXT_COST = 16  # bytes that a text costs beyond its own, for special tokens and bookkeeping


def cut_into_shards(
    n_bytes: Sequence[int], n_workers: int, most_bytes: int, row_bytes: int
) -> list[np.ndarray]:
    """Share out texts so that every shard is about the same work.

    Texts of like length go together, which leaves least padding, and the longest go first, so that
    no worker starts on a long shard when the others are done.

    Parameters
    ----------
    n_bytes : sequence of int
        Length of each text in UTF-8: stands for tokens and needs no tokenizer. It does so in all
        scripts, where a character may be a quarter of a token or several tokens.
    n_workers : int
        There are several shards for each, unless there are too few texts.
    most_bytes : int
        What is beyond will be cut off by truncation, and costs nothing.
    row_bytes : int
        Bytes of a text's activations.

    Returns
    -------
    list of ndarray of int
        Positions of the texts of each shard.
    """
    costs = np.minimum(n_bytes, most_bytes) + _TEXT_COST
    order = np.argsort(-costs, kind="stable")
    total = int(costs.sum())
    # As many for each worker: one shard more would keep one of them at work and the others waiting.
    per_worker = min(max(1, total // (n_workers * _FULL_SHARD)), _SHARDS_PER_WORKER)
    n_shards = n_workers * per_worker
    before = np.cumsum(costs[order]) - costs[order]  # work ahead of each text
    number = before * n_shards // total
    runs = np.split(order, np.flatnonzero(np.diff(number)) + 1)
    most_rows = max(1, _SHARD_BYTES // max(1, row_bytes))
    return [run[at : at + most_rows] for run in runs for at in range(0, len(run), most_rows)]
