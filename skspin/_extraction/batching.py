"""Texts to activations: each distinct text once, in batches of similar length."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from skspin._extraction.backbone import Backbone
from skspin._extraction.forward import pooled_forward
from skspin._extraction.tokens import TextEncoder
from skspin._layout import Segment

_CPU_TOKENS = 4096
_DEVICE_TOKENS = 32_768
_WINDOW = 16_384


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

    Parameters
    ----------
    backbone : Backbone
        A model that is ready to run.
    texts : sequence of str
        Equal texts go through the model once.
    segments : sequence of Segment
        What to read.
    prompt : str or None, default=None
        Template; ``{text}`` is where the text goes.
    max_length : int, default=512
        Tokens that are kept of a text, special tokens included; never more than the model has
        positions for. One warning says how many texts were cut.
    batch_tokens : int or "auto", default="auto"
        Tokens that go through the model together, padding included.
    verbose : int, default=0
        1 shows a progress bar.
    on_truncated : callable or None, default=None
        Gets the positions of texts that were truncated, instead of a warning that counts them.

    Yields
    ------
    positions : ndarray of shape (k,), int
        Places in ``texts``; each occurs once in all.
    activations : ndarray of shape (k, n_columns), float32
        Their rows, in whatever order the batches ran.
    """
    max_length = min(max_length, position_limit(backbone.model) or max_length)
    encoder = TextEncoder(backbone.tokenizer, prompt, max_length)
    places: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        places.setdefault(text, []).append(i)
    distinct = list(places)
    truncated: list[int] = []
    n_tokens = 0
    with tqdm(total=len(texts), unit=" texts", disable=not verbose) as bar:
        for start in range(0, len(distinct), _WINDOW):
            window = distinct[start : start + _WINDOW]
            rows, n_cut = encoder.encode(window)
            if n_cut:
                truncated += [
                    position
                    for text, row in zip(window, rows, strict=True)
                    if len(row) >= max_length
                    for position in places[text]
                ]
            lengths = np.array([len(row) for row in rows])
            order = np.argsort(-lengths, kind="stable")
            todo = _batches(order, lengths, _budget(backbone, batch_tokens))[::-1]
            while todo:
                batch = todo.pop()
                try:
                    activations = _run(backbone, [rows[i] for i in batch], segments)
                except Exception as error:
                    if not _is_out_of_memory(error):
                        raise
                    activations = None
                    if len(batch) == 1:
                        raise MemoryError(
                            f"A text of {lengths[batch[0]]} tokens does not fit into the memory of "
                            f"{backbone.device} alone. Use a smaller max_length, another dtype or "
                            "another device."
                        ) from error
                if activations is None:
                    half = len(batch) // 2
                    todo += [batch[half:], batch[:half]]
                    limit = int(lengths[batch].max()) * half
                    with backbone.measured.lock:
                        backbone.measured.limit_tokens = limit
                    gc.collect()
                    if backbone.device.type == "cuda":
                        torch.cuda.empty_cache()
                    continue
                _check_finite(activations, segments, backbone.dtype)
                of_row = [places[window[i]] for i in batch]
                repeats = [len(p) for p in of_row]
                positions = np.concatenate([np.asarray(p) for p in of_row])
                n_tokens += int(lengths[batch].sum())
                bar.update(len(positions))
                bar.set_postfix_str(
                    f"{n_tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s"
                )
                yield positions, np.repeat(activations, repeats, axis=0)
    if truncated and on_truncated is not None:
        on_truncated(np.array(truncated))
    elif truncated:
        warnings.warn(
            f"{len(truncated)} of {len(texts)} texts are longer than max_length={max_length} "
            "tokens and were truncated.",
            UserWarning,
            stacklevel=3,
        )


def position_limit(model: Any) -> int | None:
    """Count the positions that a model has; None if it has no bound."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            # RoBERTa and its kin count positions from the one after padding's.
            return limit - module.padding_idx - 1
    return limit


def _budget(backbone: Backbone, batch_tokens: int | str) -> int:
    default = _CPU_TOKENS if backbone.device.type == "cpu" else _DEVICE_TOKENS
    budget = default if isinstance(batch_tokens, str) else batch_tokens
    return min(budget, backbone.measured.limit_tokens or budget)


def _batches(order: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    batches, start = [], 0
    while start < len(order):
        # Longest first, so the first text of a batch is as long as the batch is wide.
        size = max(1, budget // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def _run(backbone: Backbone, rows: list[np.ndarray], segments: Sequence[Segment]) -> np.ndarray:
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)  # (n_texts, n_tokens)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    inputs = {
        "input_ids": torch.from_numpy(ids).to(backbone.device),
        "attention_mask": torch.from_numpy(mask).to(backbone.device),
    }
    return pooled_forward(backbone.model, backbone.anatomy, inputs, segments).cpu().numpy()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _check_finite(activations: np.ndarray, segments: Sequence[Segment], dtype: str) -> None:
    if np.isfinite(activations).all():
        return
    end = 0
    for segment in segments:
        start, end = end, end + segment.n_columns
        if not np.isfinite(activations[:, start:end]).all():
            raise ValueError(
                f"Activations of layer {segment.layer} ({segment.site}) are not finite in "
                f"dtype={dtype!r}. Use dtype='float32'."
            )
