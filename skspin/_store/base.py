"""What every store can do, and the store that keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from skspin._layout import Segment


class Store(Protocol):
    """Activations by context, text and segment; and cards, small JSON documents by name."""

    def read(
        self, context: str, texts: Sequence[str], segments: Sequence[Segment], out: np.ndarray
    ) -> np.ndarray:
        """Fill ``out`` with what is there and say what that was.

        Parameters
        ----------
        context : str
            Everything but text and segment that decides the numbers.
        texts : sequence of str, length n_texts
        segments : sequence of Segment, length n_segments
        out : ndarray of shape (n_texts, n_columns), float32
            The segments' columns side by side. Where nothing is found it is left as it was.

        Returns
        -------
        found : ndarray of shape (n_texts, n_segments), bool
        """

    def write(
        self,
        context: str,
        texts: Sequence[str],
        segments: Sequence[Segment],
        rows: np.ndarray,
        *,
        model: str = "",
    ) -> None:
        """Keep a copy of ``rows``, of shape (n_texts, n_columns), float32.

        ``model`` is the name under which people will see this context.
        """

    def get_card(self, name: str) -> Any:
        """Return the JSON document of this name, or None."""

    def put_card(self, name: str, document: Any) -> None:
        """Keep a JSON document under a name; the latest one wins."""


class NoStore:
    """Keeps nothing."""

    def read(
        self, context: str, texts: Sequence[str], segments: Sequence[Segment], out: np.ndarray
    ) -> np.ndarray:
        """Find nothing."""
        return np.zeros((len(texts), len(segments)), dtype=bool)

    def write(
        self,
        context: str,
        texts: Sequence[str],
        segments: Sequence[Segment],
        rows: np.ndarray,
        *,
        model: str = "",
    ) -> None:
        """Keep nothing."""

    def get_card(self, name: str) -> Any:
        """Find nothing."""
        return None

    def put_card(self, name: str, document: Any) -> None:
        """Keep nothing."""
