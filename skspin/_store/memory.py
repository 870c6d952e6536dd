"""Activations in the memory of one process."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from skspin._digest import text_digest
from skspin._layout import Layout, Segment


class MemoryStore:
    """Activations and cards in the memory of this process."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, bytes], np.ndarray] = {}
        self._cards: dict[str, str] = {}
        self._lock = threading.Lock()

    def read(
        self, context: str, texts: Sequence[str], segments: Sequence[Segment], out: np.ndarray
    ) -> np.ndarray:
        """Fill ``out`` with what is there and say what that was."""
        found = np.zeros((len(texts), len(segments)), dtype=bool)
        slices = Layout(tuple(segments)).slices
        with self._lock:
            for i, text in enumerate(texts):
                digest = text_digest(text)
                for j, (segment, columns) in enumerate(zip(segments, slices, strict=True)):
                    row = self._rows.get((context, segment.key, digest))
                    if row is not None:
                        kept = slice(None) if segment.neurons is None else list(segment.neurons)
                        out[i, columns] = row[kept]
                        found[i, j] = True
        return found

    def write(
        self,
        context: str,
        texts: Sequence[str],
        segments: Sequence[Segment],
        rows: np.ndarray,
        *,
        model: str = "",
    ) -> None:
        """Keep a copy of the rows."""
        slices = Layout(tuple(segments)).slices
        with self._lock:
            for text, row in zip(texts, rows, strict=True):
                digest = text_digest(text)
                for segment, columns in zip(segments, slices, strict=True):
                    if segment.neurons is None:
                        self._rows[context, segment.key, digest] = row[columns].copy()

    def get_card(self, name: str) -> Any:
        """Return the JSON document of this name, or None."""
        text = self._cards.get(name)
        return None if text is None else json.loads(text)

    def put_card(self, name: str, document: Any) -> None:
        """Keep a JSON document under a name."""
        self._cards[name] = json.dumps(document)
