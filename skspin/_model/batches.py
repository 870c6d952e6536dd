"""Texts in batches of similar length, under a budget of tokens.

Texts are tokenized in the background, sorted by length within groups, and run the longest first, so
that memory runs out at once or not at all. On a CPU each core runs a batch of its own, or all
share one, whichever is faster. After a batch that does not fit into memory, batches of this model
are half as large. Batches consist of windows: most texts have one, long texts have several.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import ceil, inf
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from skspin._layout import Layout
from skspin._model.forward import read
from skspin._model.pooling import WindowMerge
from skspin._model.recipe import Recipe, Rows
from skspin._model.registry import Backbone
from skspin._model.tokens import Encoded, TextEncoder, Window
from skspin._system import after_fork, return_free_memory, thread_pool

# Texts are sorted by length within as many tokens as fill this many batches; fewer leave more
# padding (SST-2: 11.6% with 8 batches, 3.6% with 32, 2.2% with 64 and more).
_GROUP_BATCHES = 128
# The most that is tokenized at once, which bounds the memory that tokenizing takes.
_CHUNK_TEXTS = 1024
_CHUNK_CHARACTERS = 1 << 21
# Batches after which a CPU's freed memory is given back. Batches differ in shape, so heap memory
# that one frees does not fit the next: without this, 25,000 texts of SST-2 take 770 MB beyond their
# array instead of 470.
_TRIM_BATCHES = 8
_TRIAL_BATCHES = 8  # the fewest batches with which two ways to use a CPU's cores are tried
_LEAST_SHARE = 512  # the fewest tokens in a core's own batch, so that it is worth its start
_AHEAD = 2  # batches that are queued on a GPU after the one whose results are fetched

# Bytes of a batch's widest activation. On a CPU this keeps it in a shared cache, and below the size
# from which glibc asks the kernel for fresh pages at each allocation (32 MiB): speed is flat from
# an eighth of this on, and falls beyond it. A GPU only has to be kept busy.
_WIDEST_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
_OTHER_DEVICE_BYTES = 64 << 20
_START_SHARE = 1 / 128  # of a full batch's time: what starting one costs
# By model, half of the smallest batch that did not fit into memory.
_token_limits: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def extract(
    backbone: Backbone, recipe: Recipe, texts: Sequence[str], layout: Layout
) -> Iterator[Rows]:
    """Run texts through a loaded model and read their pooled activations."""
    budget = TokenBudget(backbone, recipe.batch_tokens)
    chunks = list(_chunks(texts))
    groups = _groups(chunks, TextEncoder(backbone, recipe), budget)
    for group in _ahead(groups) if len(chunks) > 1 else groups:
        for batch, values in _run(backbone, group, layout, budget):
            check_finite(values, layout, backbone.dtype)
            yield group.rows(batch, values, layout)


class TokenBudget:
    """The tokens that a batch may have, padding included.

    "auto" follows the device and the model's width: on a CPU, in float32, 4,096 tokens for a
    feed-forward width of 1,536.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int | str = "auto"):
        self._backbone, anatomy = backbone, backbone.anatomy
        self._least = _LEAST_SHARE if batch_tokens == "auto" else 1
        if isinstance(batch_tokens, str):
            widest = max(tap.width for s in anatomy.stacks.values() for tap in s.taps.values())
            n_bytes = _WIDEST_BYTES.get(backbone.device.type, _OTHER_DEVICE_BYTES)
            batch_tokens = n_bytes // (widest * getattr(torch, backbone.dtype).itemsize)
        self._wanted = int(batch_tokens)

    @property
    def tokens(self) -> int:
        """Tokens in a batch at most, unless one text alone has more."""
        return min(self._wanted, _token_limits.get(self._backbone.model, self._wanted))

    def share(self, n_at_once: int, n_left: int) -> int:
        """Tokens in each of several batches that run at once, so that they end about together."""
        if n_at_once == 1:
            return self.tokens
        each = min(max(self._wanted // n_at_once, self._least), self.tokens)
        n_rounds = ceil(n_left / (n_at_once * each))
        return ceil(n_left / (n_at_once * max(1, n_rounds)))

    def n_texts(self, lengths: np.ndarray, n_tokens: int) -> int:
        """Count the next texts, whose lengths descend, that make a batch: at least one.

        It has ``n_tokens`` at most, and ends where its padding would cost more than another batch,
        or at the first other length if texts of several lengths would change each other.
        """
        widest = int(lengths[0])
        fitting = lengths[: max(1, n_tokens // widest)]
        padding = np.cumsum(widest - fitting)
        share = _START_SHARE if widest <= self._backbone.anatomy.mixes_beyond else 0.0
        return int(np.searchsorted(padding, self.tokens * share, side="right"))

    def halve(self, n_tokens: int) -> None:
        """Allow half as many tokens, because a batch of ``n_tokens`` was too large."""
        _release_memory(self._backbone.device)
        _token_limits[self._backbone.model] = max(1, min(self.tokens, n_tokens // 2))


class _Group:
    """Texts whose windows are sorted by length together, and which of them are still to be run."""

    def __init__(self, start: int, encoded: list[Encoded]):
        self.start = start  # the position of the first of them among all texts
        self.encoded = encoded
        self.truncated = np.array([text.is_truncated for text in encoded], bool)  # (n_texts,)
        self.n_windows = np.array([len(text.windows) for text in encoded])  # (n_texts,)
        self.windows = [window for text in encoded for window in text.windows]
        self.lengths = np.array([len(window) for window in self.windows])  # (n_windows,)
        self.owners = np.repeat(np.arange(len(encoded)), self.n_windows)  # (n_windows,)
        self.merges: dict[int, WindowMerge] = {}  # of long texts that are not complete
        self.left = np.empty(0, dtype=np.intp)  # the longest first
        self.put_back(np.arange(len(self.windows)))

    @property
    def n_tokens_left(self) -> int:
        """Number of tokens that are still to be run."""
        return int(self.lengths[self.left].sum())

    def take(self, budget: TokenBudget, n_tokens: int) -> np.ndarray:
        """Choose the windows of the next batch, by their numbers."""
        n_windows = budget.n_texts(self.lengths[self.left], n_tokens)
        batch, self.left = np.split(self.left, [n_windows])
        return batch

    def put_back(self, batch: np.ndarray) -> None:
        """Add the windows of a batch that failed."""
        left = np.concatenate([batch, self.left])
        self.left = left[np.argsort(-self.lengths[left], kind="stable")]

    def rows(self, batch: np.ndarray, values: np.ndarray, layout: Layout) -> Rows:
        """Give the rows of the texts that are complete with a batch of windows."""
        done, rows = self.owners[batch], values
        if (self.n_windows[done] > 1).any():
            merged = [self._merge(*window, layout) for window in zip(batch, values, strict=True)]
            is_complete = [row is not None for row in merged]
            done = done[is_complete]
            rows = np.array([row for row in merged if row is not None], np.float32)
            rows = rows.reshape(-1, layout.n_columns)
        n_truncated = int(self.truncated[done].sum())
        return Rows(self.start + done, rows, int(self.lengths[batch].sum()), n_truncated)

    def _merge(self, window: int, row: np.ndarray, layout: Layout) -> np.ndarray | None:
        """Give the row of a window's text if it is the text's last or only one."""
        text = int(self.owners[window])
        if self.n_windows[text] == 1:
            return row
        if text not in self.merges:
            n_pooled = [window.n_pooled for window in self.encoded[text].windows]
            self.merges[text] = WindowMerge(n_pooled, layout)
        number = window - int(np.searchsorted(self.owners, text))  # within its text
        merged = self.merges[text].add(number, row)
        if merged is not None:
            del self.merges[text]
        return merged


def _groups(
    chunks: list[Sequence[str]], encoder: TextEncoder, budget: TokenBudget
) -> Iterator[_Group]:
    """Tokenize texts chunk by chunk, and gather them until there are enough to sort."""
    start = n_tokens = 0
    encoded: list[Encoded] = []
    for number, chunk in enumerate(chunks, start=1):
        found = encoder.encode(chunk)
        encoded += found
        n_tokens += sum(len(window) for text in found for window in text.windows)
        if n_tokens >= _GROUP_BATCHES * budget.tokens or number == len(chunks):
            yield _Group(start, encoded)
            start, n_tokens, encoded = start + len(encoded), 0, []


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut texts into chunks of limited number and length."""
    start = n_characters = 0
    for end, text in enumerate(texts, start=1):
        n_characters += len(text)
        if end - start == _CHUNK_TEXTS or n_characters > _CHUNK_CHARACTERS or end == len(texts):
            yield texts[start:end]
            start, n_characters = end, 0


def _ahead(groups: Iterator[_Group]) -> Iterator[_Group]:
    """Make the next group in a thread while this one runs: tokenizers release Python's lock."""
    with ThreadPoolExecutor(1, "skspin-tokenize") as pool:
        coming = pool.submit(next, groups, None)
        while (group := coming.result()) is not None:
            coming = pool.submit(next, groups, None)
            yield group


def _run(
    backbone: Backbone, group: _Group, layout: Layout, budget: TokenBudget
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run the windows of a group; yield each batch's window numbers and activations."""
    n_at_once = n_cores = min(_usable_cores(backbone.device), len(group.windows))
    if n_cores > 1 and group.n_tokens_left >= _TRIAL_BATCHES * budget.tokens:
        seconds = {n_cores: inf, 1: inf}  # per token, at best
        for n_tried in (n_cores, 1, n_cores, 1):
            n_tokens, started = group.n_tokens_left, time.perf_counter()
            found = list(_run_batches(backbone, group, layout, budget, n_tried, n_tried))
            took = time.perf_counter() - started
            seconds[n_tried] = min(seconds[n_tried], took / max(1, n_tokens - group.n_tokens_left))
            yield from found
        n_at_once = min(seconds, key=seconds.__getitem__)
    while len(group.left):
        yield from _run_batches(backbone, group, layout, budget, n_at_once)
        n_at_once = 1  # several batches at once, of one text each, did not fit into memory


def _run_batches(
    backbone: Backbone,
    group: _Group,
    layout: Layout,
    budget: TokenBudget,
    n_at_once: int,
    n_batches: float = inf,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run some batches, or all; put those that are too large back."""
    n_tokens = budget.share(n_at_once, group.n_tokens_left)
    # Side by side, each thread has its next batch before its last result is taken.
    ahead = _AHEAD if backbone.device.type == "cuda" else 2 * (n_at_once - 1)
    running: deque[tuple[np.ndarray, Future[OnHost | None]]] = deque()
    n_done = 0
    with _threads(n_at_once) as threads:
        while True:
            while len(group.left) and n_batches and len(running) <= ahead:
                batch = group.take(budget, min(n_tokens, budget.tokens))
                windows = [group.windows[i] for i in batch]
                is_alone = n_at_once == 1 and len(batch) == 1
                job = threads.submit(try_batch, backbone, windows, layout, is_alone)
                running.append((batch, job))
                n_batches -= 1
            if not running:
                return
            batch, job = running.popleft()
            pooled = job.result()
            if pooled is None:
                budget.halve(len(batch) * int(group.lengths[batch[0]]))
                group.put_back(batch)
                if len(batch) == 1:
                    n_batches = 0
                continue
            n_done += 1
            if backbone.device.type == "cpu" and n_done % _TRIM_BATCHES == 0:
                _release_memory(backbone.device)
            yield batch, pooled.to_numpy()


def try_batch(
    backbone: Backbone,
    windows: list[Window],
    layout: Layout,
    is_alone: bool,
    by_token: bool = False,
) -> OnHost | None:
    """Start a batch; None, which frees the frames of the exception, if memory was short."""
    try:
        padded = pad(windows, backbone.device)
        return _to_host(read(backbone.anatomy, padded, layout.segments, by_token=by_token))
    except (MemoryError, RuntimeError) as error:
        # Torch says it in words on all devices, and by a class of its own on some.
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in _OUT_OF_MEMORY):
            raise
        if is_alone:
            raise MemoryError(
                f"One text of {len(windows[0])} tokens does not fit into the memory of "
                f"{backbone.device}. Use a smaller max_length, another dtype or another device."
            ) from error
        return None


def _release_memory(device: torch.device) -> None:
    """Give free memory back to the system: its pieces may not fit the next batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        return_free_memory()


def pad(windows: list[Window], device: torch.device) -> dict[str, Tensor]:
    """Pad windows, the longest first, on the right to tensors (n_windows, n_tokens)."""
    lengths = np.array([len(window) for window in windows])
    real = np.arange(lengths[0]) < lengths[:, None]  # (n_windows, n_tokens)
    padded: dict[str, np.ndarray] = {"attention_mask": real.astype(np.int64)}
    for name in windows[0].inputs:
        # Padding is never attended to, so any id will do; the tokenizer needs no padding token.
        padded[name] = np.zeros(real.shape, dtype=np.int64)
        padded[name][real] = np.concatenate([window.inputs[name] for window in windows])
    if any(window.pooled is not None for window in windows):
        padded["pooled"] = real.copy()
        for row, window in zip(padded["pooled"], windows, strict=True):
            if window.pooled is not None:
                row[: len(window)] = window.pooled
    tensors = {name: torch.from_numpy(values) for name, values in padded.items()}
    # Without pinned memory, a copy that is not waited for may read memory that is free by then.
    pins = device.type == "cuda"
    if pins:
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=pins) for name, tensor in tensors.items()}


class OnHost(NamedTuple):
    """Activations that are copied to the host."""

    values: Tensor
    stream: Any = None  # of a GPU, in which the copy runs

    def to_numpy(self) -> np.ndarray:
        """Wait for the copy."""
        if self.stream is not None:
            self.stream.synchronize()
        return self.values.numpy()


def _to_host(pooled: Tensor) -> OnHost:
    if pooled.device.type != "cuda":
        return OnHost(pooled.cpu())
    # A stream of its own lets the next batch run meanwhile.
    stream: Any = torch.cuda.Stream(pooled.device)
    stream.wait_stream(torch.cuda.current_stream(pooled.device))
    host = torch.empty(pooled.shape, dtype=pooled.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(pooled, non_blocking=True)
        # The next batch may reuse the result's memory only after the copy.
        pooled.record_stream(stream)
    return OnHost(host, stream)


def check_finite(activations: np.ndarray, layout: Layout, dtype: str) -> None:
    """Raise a ValueError if activations (n_rows, n_columns) are not all finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is finite only if all its terms are, and takes a fraction of the time.
        if np.isfinite(activations.sum()) or np.isfinite(activations).all():
            return
    segment = layout.segment_of(int(np.flatnonzero(~np.isfinite(activations).all(axis=0))[0]))
    remedy = (
        "The weights or the model are at fault."
        if dtype == "float32"
        else "Use dtype='float32', or 'bfloat16', which has the same range."
    )
    raise ValueError(
        f"Activations of layer {segment.layer} at site {segment.site!r} are not finite in "
        f"dtype={dtype!r}. {remedy}"
    )


# Batches on a CPU: one on each core side by side, or one after another on all of them. Threads that
# share a batch wait for each other after every product, long on a busy machine. Threads with a
# batch each do not, but each reads all weights, so with a large model sharing may be faster.

_lock = threading.Lock()
_n_pools = 0  # pools that run now, each for an extraction of its own
_n_threads = 1  # torch's number of threads before the first pool, restored after the last


def _usable_cores(device: torch.device) -> int:
    """Count the batches that may run side by side: torch's limit on threads, shared by callers."""
    if device.type != "cpu":
        return 1
    with _lock:
        n_threads = _n_threads if _n_pools else torch.get_num_threads()
        return max(1, n_threads // (_n_pools + 1))


class _ThisThread(Executor):
    """Runs each job at once."""

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Run a job; its errors are raised here."""
        done: Future = Future()
        done.set_result(function(*args, **kwargs))
        return done


@contextmanager
def _threads(n_at_once: int) -> Iterator[Executor]:
    """Run jobs in the caller's thread, or several side by side on one core each."""
    global _n_pools, _n_threads
    if n_at_once == 1:
        yield _ThisThread()
        return
    with _lock:
        if not _n_pools:
            _n_threads = torch.get_num_threads()
        _n_pools += 1
    try:
        with thread_pool(n_at_once, "skspin-core", lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        # Part of the setting is per thread and part (MKL's) per process, so only the last pool can
        # restore it.
        with _lock:
            _n_pools -= 1
            if not _n_pools:
                torch.set_num_threads(_n_threads)


@after_fork
def _recover_from_fork() -> None:
    """Forget the parent's pools, whose threads do not exist in the child."""
    global _lock, _n_pools
    _lock, _n_pools = threading.Lock(), 0
