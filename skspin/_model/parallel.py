"""Shards of texts for several devices, processes or machines, run by joblib.

Only the calling process knows of a store. A worker gets texts and gives back rows; it keeps its
model from shard to shard, because the registry of loaded models lives as long as the process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any

import numpy as np
from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import get_active_backend
from tqdm.auto import tqdm

from skspin._layout import Segment
from skspin._model.batches import extract
from skspin._model.device import as_devices
from skspin._model.registry import Backbone, Source, load_backbone
from skspin._model.sharding import cut_into_shards


@dataclass(frozen=True)
class Work:
    """What a worker must know besides its texts.

    Parameters
    ----------
    source : Source
        Names the model.
    fingerprint : str
        What the model must be, wherever a worker finds it.
    dtype : str
        Format to compute in.
    segments : tuple of Segment
        What to read.
    prompt, max_length, batch_tokens
        See `skspin._model.batches.extract`.
    """

    source: Source
    fingerprint: str
    dtype: str
    segments: tuple[Segment, ...]
    prompt: str | None = None
    max_length: int = 512
    batch_tokens: int | str = "auto"


@dataclass(frozen=True)
class Shard:
    """What comes back of one shard.

    Parameters
    ----------
    number : int
        Which shard.
    values : ndarray of shape (n_texts, n_columns), float32
        The rows of its texts, in their order.
    truncated : ndarray of shape (n_truncated,), int
        Which of its texts were truncated.
    """

    number: int
    values: np.ndarray
    truncated: np.ndarray


def extract_in_parallel(
    work: Work,
    texts: Sequence[str],
    *,
    device: str | Sequence[str] | None = None,
    n_jobs: int | None = None,
    verbose: int = 0,
    on_truncated: Callable[[np.ndarray], None],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run texts through a model, on as many workers as asked for.

    Parameters
    ----------
    work : Work
        What to do with them.
    texts : sequence of str
        Equal texts go through the model once.
    device : str, sequence of str or None, default=None
        Several devices get a thread each, with a copy of the model on each distinct device.
    n_jobs : int or None, default=None
        Number of workers of joblib's active backend; None takes it from
        ``joblib.parallel_config``, and is 1 outside of one.
    verbose : int, default=0
        1 shows a progress bar.
    on_truncated : callable
        Gets the positions of texts that were truncated.

    Yields
    ------
    positions : ndarray of shape (k,), int
        Places in ``texts``; each occurs once in all.
    activations : ndarray of shape (k, n_columns), float32
        Their rows, in whatever order the workers were done.
    """
    devices = as_devices(device)
    only = devices[0] if len(devices) == 1 else None
    if len(devices) > 1 and n_jobs not in (None, 1):
        raise ValueError(
            f"device={device!r} and n_jobs={n_jobs} both say how many workers there are. Leave "
            "n_jobs=None to have one for each device, or name one device."
        )
    n_workers = len(devices) if len(devices) > 1 else effective_n_jobs(n_jobs)
    if n_workers == 1:
        yield from _extract(work, only, texts, on_truncated, verbose)
        return
    places: dict[str, list[int]] = {}
    for position, text in enumerate(texts):
        places.setdefault(text, []).append(position)
    distinct = list(places)
    shards = cut_into_shards(
        [len(text.encode("utf-8", "surrogatepass")) for text in distinct],
        n_workers,
        # Few tokens are longer, so what is beyond will most likely be truncated.
        most_bytes=8 * work.max_length,
        row_bytes=4 * sum(segment.n_columns for segment in work.segments),
    )
    run = _on_devices(work, devices) if len(devices) > 1 else _by_joblib(work, only, n_jobs)
    with tqdm(total=len(texts), unit=" texts", disable=not verbose) as bar:
        for shard in run(distinct, shards):
            members = [places[distinct[i]] for i in shards[shard.number]]
            if len(shard.truncated):
                on_truncated(np.concatenate([members[i] for i in shard.truncated]))
            positions = np.concatenate(members)
            bar.update(len(positions))
            yield positions, np.repeat(shard.values, [len(m) for m in members], axis=0)


def _on_devices(work: Work, devices: list[str]) -> Callable[..., Iterator[Shard]]:
    """Run shards in this process, in one thread for each device."""
    if work.source.in_memory:
        raise ValueError(
            f"device={devices!r}, but a model that is passed in memory stays where it is. Pass its "
            "folder or hub id as `model`, or leave device=None."
        )
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)

    def compute(number: int, texts: list[str]) -> Shard:
        device = free.get()
        try:
            return compute_shard(work, device, number, texts)
        finally:
            free.put(device)

    return partial(_run, compute, n_jobs=len(devices), backend="threading")


def _by_joblib(
    work: Work, device: str | None, n_jobs: int | None
) -> Callable[..., Iterator[Shard]]:
    """Run shards wherever joblib's active backend runs things."""
    if work.source.in_memory:
        if not _shares_memory():
            raise ValueError(
                f"n_jobs={n_jobs!r} asks for several processes, but a model that is passed in "
                "memory stays in this one, because no pickle holds its weights. Pass its folder or "
                "hub id as `model`, or use n_jobs=1 or "
                'joblib.parallel_config(backend="threading").'
            )
    else:
        # A worker may be on another machine, where a branch may be another commit by now.
        work = replace(work, source=replace(work.source, revision=work.source.commit))
    return partial(_run, partial(compute_shard, work, device), n_jobs=n_jobs)


def _run(
    compute: Callable[[int, list[str]], Shard],
    texts: Sequence[str],
    shards: Sequence[np.ndarray],
    **options: Any,
) -> Iterator[Shard]:
    """Compute every shard, in any order."""
    todo = set(range(len(shards)))
    for last_try in (False, True):
        jobs = (
            delayed(compute)(number, [texts[i] for i in shards[number]]) for number in sorted(todo)
        )
        try:
            for shard in _as_they_come(jobs, **options):
                todo.discard(shard.number)
                yield shard
            return
        except Exception as error:
            # A worker that died by accident will not do so again.
            if last_try or not _is_death(error):
                raise


def _as_they_come(jobs: Iterator[Any], **options: Any) -> Iterator[Shard]:
    """Give results as soon as joblib's backend does."""
    if get_active_backend()[0].supports_return_generator:
        yield from Parallel(batch_size=1, return_as="generator_unordered", **options)(jobs)
        return
    # Where they come only all at once, a few at a time are less to wait for, and less to lose.
    with Parallel(batch_size=1, **options) as parallel:
        while few := list(islice(jobs, 2 * effective_n_jobs(options["n_jobs"]))):
            yield from parallel(few)


def _is_death(error: Exception) -> bool:
    """Whether a worker died, in the words of its backend (Dask mends it by itself)."""
    deaths: list[type[Exception]] = [BrokenProcessPool]
    if "ray" in sys.modules:
        deaths.append(sys.modules["ray"].exceptions.RayActorError)
    return isinstance(error, tuple(deaths))


def _shares_memory() -> bool:
    backend, _ = get_active_backend()
    return getattr(backend, "supports_sharedmem", False)


def compute_shard(work: Work, device: str | None, number: int, texts: list[str]) -> Shard:
    """Compute one shard, in a worker."""
    values: np.ndarray | None = None
    truncated: list[np.ndarray] = []
    for positions, rows in _extract(work, device, texts, truncated.append):
        if values is None:
            values = np.empty((len(texts), rows.shape[1]), dtype=np.float32)
        values[positions] = rows
    assert values is not None  # a shard has a text, and every text has a row
    return Shard(number, values, np.concatenate([np.empty(0, dtype=int), *truncated]))


def _extract(
    work: Work,
    device: str | None,
    texts: Sequence[str],
    on_truncated: Callable[[np.ndarray], None],
    verbose: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return extract(
        _load(work, device),
        texts,
        work.segments,
        prompt=work.prompt,
        max_length=work.max_length,
        batch_tokens=work.batch_tokens,
        verbose=verbose,
        on_truncated=on_truncated,
    )


def _load(work: Work, device: str | None) -> Backbone:
    backbone = load_backbone(work.source, device, work.dtype)
    if backbone.fingerprint != work.fingerprint:
        raise ValueError(
            f"A worker found model={work.source.model!r} with the fingerprint "
            f"{backbone.fingerprint}, but {work.fingerprint} is needed. Give all machines the same "
            "files, or use a hub id with a pinned `revision`."
        )
    return backbone
