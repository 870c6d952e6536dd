"""What every store can do, and the store that keeps nothing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from skspin._layout import Segment


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds.

    Parameters
    ----------
    entries : int
        Number of activations kept: one for each text, layer, site and pooling.
    n_bytes : int
        Bytes that they take.
    limit : int
        Bound in bytes. What was used longest ago makes room for what is new.
    models : dict of str to int
        Entries by the name of the model that they come from.
    """

    entries: int = 0
    n_bytes: int = 0
    limit: int = 0
    models: dict[str, int] = field(default_factory=dict)


def as_bytes(limit: float) -> int:
    """Check a bound in bytes."""
    if not isinstance(limit, Real) or not 0 <= limit < math.inf:
        raise ValueError(
            f"limit={limit!r}, but it must be a number of bytes that is not negative, e.g. "
            "2 * 1024**3."
        )
    return int(limit)


class Store(ABC):
    """Activations by context, text and segment; and cards, small JSON documents by name.

    A *context* is a string with everything else that decides the numbers: the model's fingerprint,
    the prompt, and so on. Segments are whole here: all neurons of a layer, site and pooling.
    """

    @abstractmethod
    def read(
        self, context: str, texts: Sequence[str], segments: Sequence[Segment], out: np.ndarray
    ) -> np.ndarray:
        """Fill in what is kept.

        Parameters
        ----------
        context : str
            Everything but text and segment that decides the numbers.
        texts : sequence of str, length n_texts
            In any order, with or without repetitions.
        segments : sequence of Segment, length n_segments
            Any of those that were written for these texts, together or apart, or others.
        out : ndarray of shape (n_texts, n_columns), float32
            Gets the segments' columns side by side. Undefined where nothing is found.

        Returns
        -------
        ndarray of shape (n_texts, n_segments), bool
            Whether it was found.
        """

    @abstractmethod
    def write(
        self,
        context: str,
        texts: Sequence[str],
        segments: Sequence[Segment],
        rows: np.ndarray,
        *,
        model: str = "",
    ) -> None:
        """Keep a copy of activations.

        Parameters
        ----------
        context, texts, segments
            As for `read`.
        rows : ndarray of shape (n_texts, n_columns), float32
            The segments' columns side by side.
        model : str, default=""
            The name under which `info` counts them; decides nothing else.
        """

    @abstractmethod
    def get_metadata(self, name: str) -> Any:
        """Return the JSON document of this name, or None."""

    @abstractmethod
    def put_metadata(self, name: str, document: Any) -> None:
        """Keep a JSON document under a name. A later one replaces it.

        Other processes may go on with the one that they have read, so a name should say enough for
        its document never to change.
        """

    @abstractmethod
    def info(self) -> StoreInfo:
        """Count what is kept."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything, cards too, and give the space back."""

    @property
    @abstractmethod
    def limit(self) -> int:
        """Bound in bytes. Assign to change it."""

    @limit.setter
    @abstractmethod
    def limit(self, limit: int) -> None: ...


class NoStore(Store):
    """Keeps nothing."""

    limit = 0

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

    def get_metadata(self, name: str) -> Any:
        """Find nothing."""
        return None

    def put_metadata(self, name: str, document: Any) -> None:
        """Keep nothing."""

    def info(self) -> StoreInfo:
        """Count nothing."""
        return StoreInfo()

    def clear(self) -> None:
        """Forget nothing."""
