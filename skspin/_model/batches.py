"""Texts in batches of similar length, under a budget of tokens.

Texts are tokenized in the background, sorted by length within windows, and run the longest first,
so that memory falls short at once or not at all. A batch that does not fit into memory is halved,
and the model remembers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skspin._layout import Layout
from skspin._model.forward import pooled_forward
from skspin._model.positions import most_tokens
from skspin._model.recipe import Recipe, Rows
from skspin._model.registry import Backbone
from skspin._model.tokens import TextEncoder, TokenInputs
from skspin._system import return_free_memory

# Texts are sorted by length within as many tokens as fill this many batches; fewer leave more
# padding (SST-2: 11.6% with 8 batches, 3.6% with 32, 2.2% with 64 and more).
_WINDOW_BATCHES = 128
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
    encoder = TextEncoder(
        backbone.tokenizer, recipe.prompt, most_tokens(backbone.model, recipe.max_length)
    )
    budget = TokenBudget(backbone, recipe.batch_tokens)
    for window in _ahead(_windows(texts, encoder, budget)):
        for batch, values in _run(backbone, window.inputs, layout, budget):
            _check_finite(values, layout, backbone.dtype)
            n_tokens = sum(len(window.inputs[row]["input_ids"]) for row in batch)
            n_truncated = int(window.truncated[batch].sum())
            yield Rows(window.start + batch, values, n_tokens, n_truncated)


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


@dataclass
class _Window:
    """Tokenized texts that are sorted together."""

    start: int  # the place of the first among all texts
    inputs: list[TokenInputs]
    truncated: np.ndarray  # (n_texts,), bool


def _windows(texts: Sequence[str], encoder: TextEncoder, budget: TokenBudget) -> Iterator[_Window]:
    """Tokenize texts chunk by chunk, and gather them until there are enough to sort."""
    start = end = n_tokens = 0
    inputs: list[TokenInputs] = []
    truncated: list[np.ndarray] = []
    for chunk in _chunks(texts):
        found, cut = encoder.encode(chunk)
        inputs += found
        truncated.append(cut)
        end += len(chunk)
        n_tokens += sum(len(row["input_ids"]) for row in found)
        if n_tokens >= _WINDOW_BATCHES * budget.tokens or end == len(texts):
            yield _Window(start, inputs, np.concatenate(truncated))
            start, n_tokens, inputs, truncated = end, 0, [], []


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut texts where they are many or long."""
    start = n_characters = 0
    for end, text in enumerate(texts, start=1):
        n_characters += len(text)
        if end - start == _CHUNK_TEXTS or n_characters > _CHUNK_CHARACTERS or end == len(texts):
            yield texts[start:end]
            start, n_characters = end, 0


def _ahead(windows: Iterator[_Window]) -> Iterator[_Window]:
    """Make the next window in a thread while this one runs: tokenizers release Python's lock."""
    with ThreadPoolExecutor(1, "skspin-tokenize") as pool:
        coming = pool.submit(next, windows, None)
        while (window := coming.result()) is not None:
            coming = pool.submit(next, windows, None)
            yield window


def _run(
    backbone: Backbone, inputs: list[TokenInputs], layout: Layout, budget: TokenBudget
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run one window; give each batch's rows of the window and their activations."""
    lengths = np.array([len(row["input_ids"]) for row in inputs])
    order = np.argsort(-lengths, kind="stable")
    ahead = _AHEAD if backbone.device.type == "cuda" else 0
    running: deque[tuple[np.ndarray, Callable[[], np.ndarray]]] = deque()
    start = n_batches = 0
    while start < len(order):
        batch = order[start : start + budget.n_texts(lengths[order[start:]])]
        result = _try_batch(backbone, [inputs[row] for row in batch], layout)
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
    backbone: Backbone, inputs: list[TokenInputs], layout: Layout
) -> Callable[[], np.ndarray] | None:
    """Start a batch; None if it did not fit into memory (whose frames are gone by then)."""
    try:
        padded = _pad(inputs, backbone.device)
        return _to_host(pooled_forward(backbone.model, backbone.anatomy, padded, layout.segments))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(inputs) == 1:
            raise MemoryError(
                f"One text of {len(inputs[0]['input_ids'])} tokens does not fit into the memory of "
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


def _pad(inputs: list[TokenInputs], device: torch.device) -> dict[str, Tensor]:
    """Put texts into rectangles (n_texts, n_tokens), the longest first, padded on the right."""
    lengths = np.array([len(row["input_ids"]) for row in inputs])
    mask = np.arange(lengths[0]) < lengths[:, None]  # (n_texts, n_tokens)
    padded = {"attention_mask": mask.astype(np.int64)}
    for name in inputs[0]:
        # Padding is never attended, so any id serves, and a tokenizer without one is as good.
        values = np.zeros(mask.shape, dtype=np.int64)
        values[mask] = np.concatenate([row[name] for row in inputs])
        padded[name] = values
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
