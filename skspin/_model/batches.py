"""Texts in, pooled activations out: each distinct text once, in batches of similar length."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skspin._layout import Segment
from skspin._model.budget import TokenBudget, is_out_of_memory, release_memory
from skspin._model.forward import pooled_forward
from skspin._model.positions import most_tokens
from skspin._model.registry import Backbone
from skspin._model.tokens import TextEncoder

# Texts are sorted by length within as many tokens as fill this many batches; fewer leave more
# padding (SST-2: 11.6% with 8 batches, 3.6% with 32, 2.2% with 64 and more).
_WINDOW_BATCHES = 128
# Tokenized at once: bounds what tokenizing takes in memory, whatever the texts' length.
_CHUNK_TEXTS = 1024
# Batches after which a CPU's freed memory is given back. No two batches are of one shape, so pieces
# of the heap that one leaves do not fit the next: without this, 25,000 texts of SST-2
# take 770 MB beyond their array instead of 470.
_TRIM_BATCHES = 8
# Batches that a GPU is given ahead of the one whose results are fetched.
_AHEAD = 2


def extract(
    backbone: Backbone,
    texts: Sequence[str],
    segments: Sequence[Segment],
    *,
    prompt: str | None = None,
    max_length: int = 512,
    batch_tokens: int | str = "auto",
    verbose: int = 0,
    on_truncated: Callable[[np.ndarray], None] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run texts through a model and read their pooled activations.

    Texts are tokenized in the background, sorted by length and run in batches; what has been
    yielded is final, so a caller who is interrupted can keep it. When a batch does not fit into
    memory, it is halved, and the model remembers.

    Parameters
    ----------
    backbone : Backbone
        A model that is ready to run.
    texts : sequence of str
        Equal texts go through the model once.
    segments : sequence of Segment
        What to read, in the order of the columns.
    prompt : str or None, default=None
        Template; ``{text}`` is where a text goes.
    max_length : int, default=512
        Tokens that are kept of a text, special tokens and prompt included; never more than the
        model has positions for (512 for BERT).
    batch_tokens : int or "auto", default="auto"
        Tokens in a batch, padding included; see `TokenBudget`. It does not change the results.
    verbose : int, default=0
        1 shows a progress bar.
    on_truncated : callable or None, default=None
        Gets the positions of texts that were truncated, instead of a warning that counts them.

    Yields
    ------
    positions : ndarray of shape (k,), int
        Places in ``texts``. Each place comes once.
    activations : ndarray of shape (k, n_columns), float32
        Their rows.

    Raises
    ------
    ValueError
        If an activation is not finite, or ``max_length`` leaves no room for text.
    MemoryError
        If a single text does not fit into memory.
    """
    max_length = most_tokens(backbone.model, max_length)
    encoder = TextEncoder(backbone.tokenizer, prompt, max_length)
    budget = TokenBudget(backbone, batch_tokens)
    distinct = _Distinct(texts)
    truncated: list[np.ndarray] = []
    with _Progress(len(texts), verbose) as progress:
        for window in _ahead(_windows(distinct.texts, encoder, budget)):
            truncated.append(distinct.positions(window.places[window.truncated]))
            for rows, activations in _run(backbone, window.ids, segments, budget):
                _check_finite(activations, segments, backbone.dtype)
                places = window.places[rows]
                positions = distinct.positions(places)
                progress.add(len(positions), sum(len(window.ids[row]) for row in rows))
                yield positions, distinct.repeat(activations, places)
    cut = np.concatenate([np.empty(0, dtype=np.intp), *truncated])
    if len(cut):
        (on_truncated or partial(_warn_truncated, len(texts), max_length))(cut)


def _warn_truncated(n_texts: int, max_length: int, positions: np.ndarray) -> None:
    warnings.warn(
        f"{len(positions)} of {n_texts} texts have more than max_length={max_length} tokens and "
        "were truncated.",
        UserWarning,
        stacklevel=3,
    )


class _Distinct:
    """Texts without repetition, and where each of them is."""

    def __init__(self, texts: Sequence[str]):
        index: dict[str, int] = {}
        of_text = np.array([index.setdefault(text, len(index)) for text in texts], dtype=np.intp)
        self.texts = list(index)
        self.counts = np.bincount(of_text, minlength=len(index))  # (n_distinct,)
        self._order = np.argsort(of_text, kind="stable")  # (n_texts,)
        self._ends = np.cumsum(self.counts)  # (n_distinct,)

    def repeat(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Give each position of some distinct texts its row; most often there is one of each."""
        counts = self.counts[places]
        return rows if len(rows) == counts.sum() else np.repeat(rows, counts, axis=0)

    def positions(self, places: np.ndarray) -> np.ndarray:
        """List where some distinct texts are, one after another."""
        starts = self._ends[places] - self.counts[places]
        pairs = zip(starts, self._ends[places], strict=True)
        none = np.empty(0, dtype=np.intp)
        return np.concatenate([none, *(self._order[start:end] for start, end in pairs)])


@dataclass
class _Window:
    """Tokenized texts that are sorted together."""

    places: np.ndarray  # (n,) which of the distinct texts
    ids: list[np.ndarray]
    truncated: np.ndarray  # (n,) bool


def _windows(texts: Sequence[str], encoder: TextEncoder, budget: TokenBudget) -> Iterator[_Window]:
    """Tokenize texts in chunks, and gather them until there are enough to sort."""
    places: list[int] = []
    ids: list[np.ndarray] = []
    truncated: list[np.ndarray] = []
    for start in range(0, len(texts), _CHUNK_TEXTS):
        chunk = texts[start : start + _CHUNK_TEXTS]
        new_ids, cut = encoder.encode(chunk)
        places += range(start, start + len(chunk))
        ids += new_ids
        truncated.append(cut)
        full = sum(map(len, ids)) >= _WINDOW_BATCHES * budget.tokens
        if full or start + len(chunk) == len(texts):
            yield _Window(np.array(places), ids, np.concatenate(truncated))
            places, ids, truncated = [], [], []


def _ahead(windows: Iterator[_Window]) -> Iterator[_Window]:
    """Make the next window in a thread while this one runs: tokenizers release Python's lock."""
    with ThreadPoolExecutor(1, "skspin-tokenize") as pool:
        coming = pool.submit(next, windows, None)
        while (window := coming.result()) is not None:
            coming = pool.submit(next, windows, None)
            yield window


def _run(
    backbone: Backbone, ids: list[np.ndarray], segments: Sequence[Segment], budget: TokenBudget
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Run one window, longest texts first, so that memory falls short at once or not at all."""
    lengths = np.array([len(row) for row in ids])
    order = np.argsort(-lengths, kind="stable")
    ahead = _AHEAD if backbone.device.type == "cuda" else 0
    running: deque[tuple[np.ndarray, Callable[[], np.ndarray]]] = deque()
    start = n_batches = 0
    while start < len(order):
        rows = order[start : start + budget.n_texts(lengths[order[start:]])]
        result = _try_batch(backbone, [ids[row] for row in rows], segments)
        if result is None:
            release_memory(backbone.device)
            budget.halve(len(rows) * int(lengths[rows[0]]))
            continue
        start += len(rows)
        n_batches += 1
        if backbone.device.type == "cpu" and n_batches % _TRIM_BATCHES == 0:
            release_memory(backbone.device)
        running.append((rows, result))
        if len(running) > ahead:
            done, result = running.popleft()
            yield done, result()
    for rows, result in running:
        yield rows, result()


def _try_batch(
    backbone: Backbone, ids: list[np.ndarray], segments: Sequence[Segment]
) -> Callable[[], np.ndarray] | None:
    """Start a batch; None if it did not fit into memory (whose frames are gone by then)."""
    try:
        inputs = _pad(ids, backbone.device)
        return _to_host(pooled_forward(backbone.model, backbone.anatomy, inputs, segments))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(ids) == 1:
            raise MemoryError(
                f"One text of {len(ids[0])} tokens does not fit into the memory of "
                f"{backbone.device}. Use a smaller max_length, another dtype or another device."
            ) from error
        return None


def _pad(ids: list[np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Put texts into a rectangle, the longest first, padded on the right."""
    # Padding is never attended, so any id serves, and a tokenizer without one is as good.
    tokens = np.zeros((len(ids), len(ids[0])), dtype=np.int64)  # (n_texts, n_tokens)
    mask = np.zeros_like(tokens)  # (n_texts, n_tokens)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": _to_device(tokens, device), "attention_mask": _to_device(mask, device)}


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _to_host(pooled: Tensor) -> Callable[[], np.ndarray]:
    """Start copying a result; the function that is returned waits for it.

    On CUDA the copy has a stream of its own, so that the next batch runs meanwhile.
    """
    if pooled.device.type != "cuda":
        array = pooled.cpu().numpy()
        return lambda: array
    stream = torch.cuda.Stream(pooled.device)
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


def _check_finite(activations: np.ndarray, segments: Sequence[Segment], dtype: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is finite only if all its terms are, and takes a fraction of the time.
        if np.isfinite(activations.sum()) or np.isfinite(activations).all():
            return
    ends = np.cumsum([segment.n_columns for segment in segments])
    column = int(np.flatnonzero(~np.isfinite(activations).all(axis=0))[0])
    segment = segments[int(np.searchsorted(ends, column, side="right"))]
    remedy = (
        "The weights or the model are at fault."
        if dtype == "float32"
        else "Use dtype='float32', or 'bfloat16', which has the same range."
    )
    raise ValueError(
        f"Activations of layer {segment.layer} at site {segment.site!r} are not finite in "
        f"dtype={dtype!r}. {remedy}"
    )


class _Progress:
    """A bar of texts, with the rate of tokens; nothing at all when it is not wanted."""

    def __init__(self, n_texts: int, verbose: int):
        from tqdm.auto import tqdm

        self._bar: Any = tqdm(total=n_texts, unit=" texts", disable=not verbose)
        self._n_tokens = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def add(self, n_texts: int, n_tokens: int) -> None:
        """Count texts that are done."""
        self._n_tokens += n_tokens
        if not self._bar.disable:
            rate = self._n_tokens / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(n_texts)
