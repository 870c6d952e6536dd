"""Texts in batches of similar length, under a budget of tokens.

Texts are tokenized in the background, sorted by length within groups, and run the longest first, so
that memory falls short at once or not at all. A batch that does not fit into memory is halved, and
the model remembers. What is batched are windows: one of most texts, several of long ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skspin._layout import Layout
from skspin._model.causal import is_causal
from skspin._model.forward import pooled_forward
from skspin._model.pooling import WindowMerge
from skspin._model.positions import most_tokens
from skspin._model.recipe import Recipe, Rows
from skspin._model.registry import Backbone
from skspin._model.tokens import Encoded, TextEncoder, Window
from skspin._system import return_free_memory

# Texts are sorted by length within as many tokens as fill this many batches; fewer leave more
# padding (SST-2: 11.6% with 8 batches, 3.6% with 32, 2.2% with 64 and more).
_GROUP_BATCHES = 128
# Tokenized at once: bounds what tokenizing takes in memory, whatever the texts' length.
_CHUNK_TEXTS = 1024
_CHUNK_CHARACTERS = 1 << 21
# Batches after which a CPU's freed memory is given back. No two batches are of one shape, so pieces
# of the heap that one leaves do not fit the next: without this, 25,000 texts of SST-2
# take 770 MB beyond their array instead of 470.
_TRIM_BATCHES = 8
# Batches that a GPU is given ahead of the one whose results are fetched.
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
    looks_back = bool(recipe.overlap) and is_causal(backbone)  # matters for overlaps only
    return TextEncoder(backbone.tokenizer, recipe, max_length, looks_back)


class TokenBudget:
    """The tokens that a batch may have, padding included.

    "auto" follows the device and the model's width: on a CPU, in float32, 4,096 tokens for a
    feed-forward width of 1,536.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int | str = "auto"):
        self._backbone = backbone
        auto = isinstance(batch_tokens, str)
        self._wanted = _good_size(backbone) if auto else int(batch_tokens)
        # Where padding leaks into real tokens, a pass takes texts of one length only.
        self._start_share = 0.0 if backbone.anatomy.mixes_padding else _START_SHARE

    @property
    def tokens(self) -> int:
        """Tokens in a batch at most, unless one text alone has more."""
        return min(self._wanted, self._backbone.token_limit or self._wanted)

    def n_texts(self, lengths: np.ndarray) -> int:
        """Say how many of the next texts, whose lengths descend, make a batch: at least one.

        The batch ends where its padding would cost more than starting another.
        """
        widest = int(lengths[0])
        fitting = lengths[: max(1, self.tokens // widest)]
        padding = np.cumsum(widest - fitting)
        return int(np.searchsorted(padding, self.tokens * self._start_share, side="right"))

    def halve(self, n_tokens: int) -> None:
        """Remember that a batch of ``n_tokens``, of several texts, was too large."""
        self._backbone.lower_token_limit(min(self.tokens, n_tokens // 2))


def _good_size(backbone: Backbone) -> int:
    taps = [tap for stack in backbone.anatomy.stacks.values() for tap in stack.taps.values()]
    n_bytes = max(tap.width for tap in taps) * getattr(torch, backbone.dtype).itemsize
    return _WIDEST_BYTES.get(backbone.device.type, _OTHER_DEVICE_BYTES) // n_bytes


class _Group:
    """The windows of some texts, which are sorted by length together."""

    def __init__(self, start: int, encoded: list[Encoded]):
        self.start = start  # the place of the first of them among all texts
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
    """Cut texts where they are many or long."""
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
    """Run the windows of one group; give each batch's numbers and their activations."""
    lengths = np.array([len(window) for window in windows])
    order = np.argsort(-lengths, kind="stable")
    ahead = _AHEAD if backbone.device.type == "cuda" else 0
    running: deque[tuple[np.ndarray, Callable[[], np.ndarray]]] = deque()
    start = n_batches = 0
    while start < len(order):
        batch = order[start : start + budget.n_texts(lengths[order[start:]])]
        result = _try_batch(backbone, [windows[i] for i in batch], layout)
        if result is None:
            _release_memory(backbone.device)
            budget.halve(len(batch) * int(lengths[batch[0]]))
            continue
        start += len(batch)
        n_batches += 1
        if backbone.device.type == "cpu" and n_batches % _TRIM_BATCHES == 0:
            _release_memory(backbone.device)
        running.append((batch, result))
        if len(running) > ahead:
            done, result = running.popleft()
            yield done, result()
    for batch, result in running:
        yield batch, result()


def _try_batch(
    backbone: Backbone, windows: list[Window], layout: Layout
) -> Callable[[], np.ndarray] | None:
    """Start a batch; None if it did not fit into memory (whose frames are gone by then)."""
    try:
        padded = _pad(windows, backbone.device)
        return _to_host(pooled_forward(backbone.model, backbone.anatomy, padded, layout.segments))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(windows) == 1:
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
    """Give back what is free but in pieces that do not fit the next batch."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        return_free_memory()


def _pad(windows: list[Window], device: torch.device) -> dict[str, Tensor]:
    """Put windows into rectangles (n_windows, n_tokens), the longest first, padded on the right."""
    lengths = np.array([len(window) for window in windows])
    real = np.arange(lengths[0]) < lengths[:, None]  # (n_windows, n_tokens)
    padded: dict[str, np.ndarray] = {"attention_mask": real.astype(np.int64)}
    for name in windows[0].inputs:
        # Padding is never attended, so any id serves, and a tokenizer without one is as good.
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
        # Its memory may be given to the next batch only when it has been read.
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
    column = int(np.flatnonzero(~np.isfinite(activations).all(axis=0))[0])
    ends = [columns.stop for columns in layout.slices]
    segment = layout.segments[int(np.searchsorted(ends, column, side="right"))]
    remedy = (
        "The weights or the model are at fault."
        if dtype == "float32"
        else "Use dtype='float32', or 'bfloat16', which has the same range."
    )
    raise ValueError(
        f"Activations of layer {segment.layer} at site {segment.site!r} are not finite in "
        f"dtype={dtype!r}. {remedy}"
    )
