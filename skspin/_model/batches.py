"""Texts in batches of similar length, under a budget of tokens.

Texts are tokenized in the background, sorted by length within groups, and run the longest first, so
that memory runs out at once or not at all. On a CPU each core runs a batch of its own, or all
share one, whichever is faster. After a batch that does not fit into memory, batches of this model
are half as large. Batches consist of windows: most texts have one, long texts have several.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil, inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skspin._layout import Layout
from skspin._model.anatomy import most_tokens
from skspin._model.cores import runner, usable_cores
from skspin._model.forward import pooled_forward
from skspin._model.pooling import WindowMerge
from skspin._model.recipe import Recipe, Rows
from skspin._model.registry import Backbone
from skspin._model.tokens import Encoded, TextEncoder, Window
from skspin._system import return_free_memory

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
# Two ways to use a CPU's cores are tried if there are at least this many batches.
_TRIAL_BATCHES = 8
# The fewest tokens in a core's own batch, so that it is worth its start.
_LEAST_SHARE = 512
# Batches that are queued on a GPU after the one whose results are fetched.
_AHEAD = 2

# Bytes of a batch's widest activation. On a CPU this keeps it in a shared cache, and below the size
# from which glibc asks the kernel for fresh pages at each allocation (32 MiB): speed is flat from
# an eighth of this on, and falls beyond it. A GPU only has to be kept busy.
_WIDEST_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
_OTHER_DEVICE_BYTES = 64 << 20
# Starting a batch costs about as much as this share of a full one.
_START_SHARE = 1 / 128
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def extract(
    backbone: Backbone, recipe: Recipe, texts: Sequence[str], layout: Layout
) -> Iterator[Rows]:
    """Run texts through a loaded model and read their pooled activations."""
    budget = TokenBudget(backbone, recipe.batch_tokens)
    for group in _ahead(_groups(texts, encoder_of(backbone, recipe), budget)):
        merges: dict[int, WindowMerge] = {}  # of long texts, by their number in the group
        for batch, values in _run(backbone, group.windows, layout, budget):
            _check_finite(values, layout, backbone.dtype)
            n_tokens = sum(len(group.windows[i]) for i in batch)
            owners = group.owners[batch]
            whole = group.n_windows[owners] == 1  # (n_windows,)
            if whole.all():
                n_truncated = int(group.truncated[owners].sum())
                yield Rows(group.start + owners, values, n_tokens, n_truncated)
                continue
            rows, ready = [values[whole]], [owners[whole]]
            for place in np.flatnonzero(~whole):
                text = int(owners[place])
                if text not in merges:
                    merges[text] = WindowMerge(group.tokens_of(text), layout)
                row = merges[text].add(int(group.numbers[batch[place]]), values[place])
                if row is not None:
                    rows.append(row[None])
                    ready.append([text])
                    del merges[text]
            done = np.concatenate(ready).astype(np.intp)
            n_truncated = int(group.truncated[done].sum())
            yield Rows(group.start + done, np.concatenate(rows), n_tokens, n_truncated)


def encoder_of(backbone: Backbone, recipe: Recipe) -> TextEncoder:
    """Make the encoder that a recipe asks for, within the positions that a model has."""
    max_length = most_tokens(backbone.model, recipe.max_length)
    is_causal = backbone.anatomy.is_causal
    return TextEncoder(backbone.tokenizer, backbone.bare_tokenizer, recipe, max_length, is_causal)


class TokenBudget:
    """The tokens that a batch may have, padding included.

    "auto" follows the device and the model's width: on a CPU, in float32, 4,096 tokens for a
    feed-forward width of 1,536.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int | str = "auto"):
        self._backbone = backbone
        auto = isinstance(batch_tokens, str)
        self._wanted = _good_size(backbone) if auto else int(batch_tokens)
        self._least = _LEAST_SHARE if auto else 0
        # Where padding leaks into real tokens, a pass takes texts of one length only.
        self._start_share = 0.0 if backbone.anatomy.mixes_padding else _START_SHARE

    @property
    def tokens(self) -> int:
        """Tokens in a batch at most, unless one text alone has more."""
        return min(self._wanted, self._backbone.token_limit or self._wanted)

    def share(self, n_at_once: int, n_left: int) -> int:
        """Tokens in each of several batches that run at once, so that they end about together."""
        if n_at_once == 1:
            return self.tokens
        each = min(max(self._wanted // n_at_once, self._least, 1), self.tokens)
        n_rounds = ceil(n_left / (n_at_once * each))
        return ceil(n_left / (n_at_once * max(1, n_rounds)))

    def n_texts(self, lengths: np.ndarray, n_tokens: int) -> int:
        """Count the next texts, whose lengths descend, that make a batch: at least one.

        It has ``n_tokens`` at most, and ends where its padding would cost more than another batch.
        """
        widest = int(lengths[0])
        fitting = lengths[: max(1, n_tokens // widest)]
        padding = np.cumsum(widest - fitting)
        return int(np.searchsorted(padding, self.tokens * self._start_share, side="right"))

    def halve(self, n_tokens: int) -> None:
        """Allow half as many tokens, because a batch of ``n_tokens`` was too large."""
        self._backbone.lower_token_limit(min(self.tokens, n_tokens // 2))


def _good_size(backbone: Backbone) -> int:
    taps = [tap for stack in backbone.anatomy.stacks.values() for tap in stack.taps.values()]
    n_bytes = max(tap.width for tap in taps) * getattr(torch, backbone.dtype).itemsize
    return _WIDEST_BYTES.get(backbone.device.type, _OTHER_DEVICE_BYTES) // n_bytes


class _Group:
    """The windows of some texts, which are sorted by length together."""

    def __init__(self, start: int, encoded: list[Encoded]):
        self.start = start  # the position of the first of them among all texts
        self.truncated = np.array([text.is_truncated for text in encoded], bool)  # (n_texts,)
        self.n_windows = np.array([len(text.windows) for text in encoded])  # (n_texts,)
        self.windows = [window for text in encoded for window in text.windows]
        self.owners = np.repeat(np.arange(len(encoded)), self.n_windows)  # (n_windows,)
        firsts = np.cumsum(self.n_windows) - self.n_windows  # (n_texts,)
        self.numbers = np.arange(len(self.windows)) - firsts[self.owners]  # (n_windows,)
        self._firsts = firsts

    def tokens_of(self, text: int) -> list[int]:
        """Count the pooled tokens of each window of a text."""
        first = self._firsts[text]
        return [window.n_pooled for window in self.windows[first : first + self.n_windows[text]]]


def _groups(texts: Sequence[str], encoder: TextEncoder, budget: TokenBudget) -> Iterator[_Group]:
    """Tokenize texts chunk by chunk, and gather them until there are enough to sort."""
    start = end = n_tokens = 0
    encoded: list[Encoded] = []
    for chunk in _chunks(texts):
        found = encoder.encode(chunk)
        encoded += found
        end += len(chunk)
        n_tokens += sum(len(window) for text in found for window in text.windows)
        if n_tokens >= _GROUP_BATCHES * budget.tokens or end == len(texts):
            yield _Group(start, encoded)
            start, n_tokens, encoded = end, 0, []


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
    backbone: Backbone, windows: list[Window], layout: Layout, budget: TokenBudget
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run the windows of one group; yield each batch's window numbers and activations."""
    waiting = _Waiting(windows)
    n_at_once = n_cores = min(usable_cores(backbone.device), len(windows))
    if n_cores > 1 and waiting.n_tokens >= _TRIAL_BATCHES * budget.tokens:
        seconds = {n_cores: inf, 1: inf}  # per token, at best
        for n_tried in (n_cores, 1, n_cores, 1):
            n_tokens, started = waiting.n_tokens, time.perf_counter()
            found = list(_run_batches(backbone, windows, layout, budget, waiting, n_tried, n_tried))
            took = time.perf_counter() - started
            seconds[n_tried] = min(seconds[n_tried], took / max(1, n_tokens - waiting.n_tokens))
            yield from found
        n_at_once = min(seconds, key=seconds.__getitem__)
    while waiting:
        yield from _run_batches(backbone, windows, layout, budget, waiting, n_at_once)
        n_at_once = 1  # several batches at once, of one text each, did not fit into memory


class _Waiting:
    """The windows of a group that are still to be run, the longest first."""

    def __init__(self, windows: list[Window]):
        self._lengths = np.array([len(window) for window in windows])
        self._left = np.empty(0, dtype=np.intp)
        self.put_back(np.arange(len(windows)))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(len(self._left))

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all."""
        return int(self._lengths[self._left].sum())

    def take(self, budget: TokenBudget, n_tokens: int) -> np.ndarray:
        """Choose the windows of the next batch, by their numbers."""
        n_windows = budget.n_texts(self._lengths[self._left], n_tokens)
        batch, self._left = np.split(self._left, [n_windows])
        return batch

    def put_back(self, batch: np.ndarray) -> None:
        """Add the windows of a batch that failed."""
        left = np.concatenate([batch, self._left])
        self._left = left[np.argsort(-self._lengths[left], kind="stable")]


def _run_batches(
    backbone: Backbone,
    windows: list[Window],
    layout: Layout,
    budget: TokenBudget,
    waiting: _Waiting,
    n_at_once: int,
    n_batches: float = inf,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run some batches, or all; put those that are too large back."""
    n_tokens = budget.share(n_at_once, waiting.n_tokens)
    # Side by side, each thread has its next batch before its last result is taken.
    ahead = _AHEAD if backbone.device.type == "cuda" else 2 * (n_at_once - 1)
    running: deque[tuple[np.ndarray, Callable[[], Callable[[], np.ndarray] | None]]] = deque()
    n_done = 0
    with runner(n_at_once) as run:
        while True:
            while waiting and n_batches and len(running) <= ahead:
                batch = waiting.take(budget, min(n_tokens, budget.tokens))
                chosen = [windows[i] for i in batch]
                is_alone = n_at_once == 1 and len(batch) == 1
                running.append(
                    (batch, run(partial(_try_batch, backbone, chosen, layout, is_alone)))
                )
                n_batches -= 1
            if not running:
                return
            batch, wait = running.popleft()
            result = wait()
            if result is None:
                _release_memory(backbone.device)
                budget.halve(len(batch) * len(windows[batch[0]]))
                waiting.put_back(batch)
                if len(batch) == 1:
                    n_batches = 0
                continue
            n_done += 1
            if backbone.device.type == "cpu" and n_done % _TRIM_BATCHES == 0:
                _release_memory(backbone.device)
            yield batch, result()


def _try_batch(
    backbone: Backbone, windows: list[Window], layout: Layout, is_alone: bool
) -> Callable[[], np.ndarray] | None:
    """Start a batch; None, which frees the frames of the exception, if memory was short."""
    try:
        padded = _pad(windows, backbone.device)
        return _to_host(pooled_forward(backbone.model, backbone.anatomy, padded, layout.segments))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if is_alone:
            raise MemoryError(
                f"One text of {len(windows[0])} tokens does not fit into the memory of "
                f"{backbone.device}. Use a smaller max_length, another dtype or another device."
            ) from error
        return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory was short, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU and on Apple's GPUs, torch has no class for it.
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _OUT_OF_MEMORY)


def _release_memory(device: torch.device) -> None:
    """Give free memory back to the system: its pieces may not fit the next batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        return_free_memory()


def _pad(windows: list[Window], device: torch.device) -> dict[str, Tensor]:
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
    return {name: _to_device(values, device) for name, values in padded.items()}


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _to_host(pooled: Tensor) -> Callable[[], np.ndarray]:
    """Start copying a result; the function that is returned waits for it."""
    if pooled.device.type != "cuda":
        array = pooled.cpu().numpy()
        return lambda: array
    # A stream of its own lets the next batch run meanwhile.
    stream: Any = torch.cuda.Stream(pooled.device)
    stream.wait_stream(torch.cuda.current_stream(pooled.device))
    host = torch.empty(pooled.shape, dtype=pooled.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(pooled, non_blocking=True)
        # The next batch may reuse the result's memory only after the copy.
        pooled.record_stream(stream)

    def wait() -> np.ndarray:
        stream.synchronize()
        return host.numpy()

    return wait


def _check_finite(activations: np.ndarray, layout: Layout, dtype: str) -> None:
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
