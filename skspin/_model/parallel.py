"""Shards of texts on several devices, processes or machines, run by joblib.

Only the calling process knows of a store. A worker gets texts and gives back rows; it keeps its
model from shard to shard, because the registry of loaded models lives as long as the process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from queue import SimpleQueue
from typing import Any

import numpy as np
from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import get_active_backend

from skspin._layout import Layout
from skspin._model import batches
from skspin._model.recipe import Recipe, Rows
from skspin._model.registry import load_backbone

# A worker that is done early takes another shard, and one that dies loses no more than one.
_SHARDS_PER_WORKER = 4
_FULL_SHARD = 50_000  # bytes of text; a few batches: less would leave batches half empty
_SHARD_BYTES = 64 * 2**20  # of activations on their way back
_TEXT_COST = 16  # bytes that a text costs beyond its own, for special tokens and bookkeeping
_TOKEN_BYTES = 8  # few tokens are longer, so what is beyond max_length of these will be truncated


def extract(recipe: Recipe, texts: Sequence[str], layout: Layout) -> Iterator[Rows]:
    """Run texts through a model, shard by shard, in whatever order the workers are done."""
    source = recipe.source
    if source.in_memory:
        _check_shareable(recipe)
    else:
        # A worker may be in another folder, or on another machine, where a branch may be another
        # commit by now.
        model, tokenizer = map(_absolute, (source.model, source.tokenizer))
        source = replace(source, model=model, tokenizer=tokenizer, revision=source.commit)
    # "auto" may be another format there, too.
    recipe = replace(recipe, source=source, dtype=recipe.number_format)
    free: SimpleQueue[str | None] | None = None
    options: dict[str, Any] = {"n_jobs": recipe.n_jobs}
    if len(recipe.devices) > 1:
        options = {"n_jobs": len(recipe.devices), "backend": "threading"}
        free = SimpleQueue()
        for device in recipe.devices:
            free.put(device)
    shards = cut_into_shards(
        [len(text.encode("utf-8", "surrogatepass")) for text in texts],
        recipe.n_workers,
        # Windows read all of a text.
        sys.maxsize if recipe.long_texts == "windows" else _TOKEN_BYTES * recipe.max_length,
        row_bytes=4 * layout.n_columns,
    )
    todo = {int(shard[0]): shard for shard in shards}  # by their first texts
    for last_try in (False, True):
        jobs = (
            delayed(_compute_shard)(recipe, layout, free, shard, [texts[i] for i in shard])
            for shard in list(todo.values())
        )
        try:
            for rows in _as_they_come(jobs, **options):
                del todo[int(rows.positions[0])]
                yield rows
            return
        except Exception as error:
            # A worker that died by accident is not likely to die again.
            if last_try or not _is_death(error):
                raise


def _absolute(name: Any) -> Any:
    return os.path.abspath(name) if isinstance(name, str) and os.path.exists(name) else name


def _check_shareable(recipe: Recipe) -> None:
    if len(recipe.devices) > 1:
        raise ValueError(
            f"device={recipe.device!r}, but a model that is passed in memory stays where it is. "
            "Pass its folder or hub id as `model`, or leave device=None."
        )
    if not getattr(get_active_backend()[0], "supports_sharedmem", False):
        raise ValueError(
            f"n_jobs={recipe.n_jobs!r} asks for several processes, but a model that is passed in "
            "memory stays in this one, because no pickle holds its weights. Pass its folder or "
            "hub id as `model`, or use n_jobs=1 or "
            'joblib.parallel_config(backend="threading").'
        )


def _compute_shard(
    recipe: Recipe,
    layout: Layout,
    free: SimpleQueue[str | None] | None,
    positions: np.ndarray,
    texts: list[str],
) -> Rows:
    """Compute the rows of one shard, in a worker, on a free one of several devices."""
    device = recipe.devices[0] if free is None else free.get()
    try:
        backbone = load_backbone(recipe.source, device, recipe.dtype)
        if backbone.fingerprint != recipe.fingerprint:
            raise ValueError(
                f"A worker found model={recipe.source.model!r} with the fingerprint "
                f"{backbone.fingerprint}, but {recipe.fingerprint} is needed. Give all machines "
                "the same files, or use a hub id with a pinned `revision`."
            )
        values = np.empty((len(texts), layout.n_columns), dtype=np.float32)
        n_tokens = n_truncated = 0
        for rows in batches.extract(backbone, recipe, texts, layout):
            values[rows.positions] = rows.values
            n_tokens += rows.n_tokens
            n_truncated += rows.n_truncated
        return Rows(positions, values, n_tokens, n_truncated)
    finally:
        if free is not None:
            free.put(device)


def _as_they_come(jobs: Iterator[Any], **options: Any) -> Iterator[Rows]:
    """Yield results as soon as joblib's backend returns them."""
    if get_active_backend()[0].supports_return_generator:
        yield from Parallel(batch_size=1, return_as="generator_unordered", **options)(jobs)
        return
    # A backend that returns all results at once gets a few jobs at a time, so less can be lost.
    with Parallel(batch_size=1, **options) as parallel:
        while few := list(islice(jobs, 2 * effective_n_jobs(options["n_jobs"]))):
            yield from parallel(few)


def _is_death(error: Exception) -> bool:
    """Whether an error of a backend means that a worker died (Dask replaces it by itself)."""
    deaths: list[type[Exception]] = [BrokenProcessPool]
    if "ray" in sys.modules:
        deaths.append(sys.modules["ray"].exceptions.RayActorError)
    return isinstance(error, tuple(deaths))


def cut_into_shards(
    n_bytes: Sequence[int], n_workers: int, most_bytes: int, row_bytes: int
) -> list[np.ndarray]:
    """Divide texts, given their lengths in UTF-8, into shards of about equal work.

    Bytes stand for tokens and need no tokenizer, in all scripts: a character may be a quarter of a
    token or several tokens. Texts of similar length go together, which leaves least padding, and
    the longest go first, so that no worker starts on a long shard when the others are done.
    """
    costs = np.minimum(n_bytes, most_bytes) + _TEXT_COST
    order = np.argsort(-costs, kind="stable")
    total = int(costs.sum())
    # The same number for each worker: with one shard more, all would wait for one of them.
    per_worker = min(max(1, total // (n_workers * _FULL_SHARD)), _SHARDS_PER_WORKER)
    n_shards = n_workers * per_worker
    before = np.cumsum(costs[order]) - costs[order]  # work ahead of each text
    number = before * n_shards // total
    runs = np.split(order, np.flatnonzero(np.diff(number)) + 1)
    most_rows = max(1, _SHARD_BYTES // max(1, row_bytes))
    return [run[at : at + most_rows] for run in runs for at in range(0, len(run), most_rows)]
