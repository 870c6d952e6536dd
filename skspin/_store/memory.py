"""Activations in the memory of one process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from skspin._layout import Segment
from skspin._store.base import Store, StoreInfo, as_bytes
from skspin._store.digest import text_digest, text_digests
from skspin._store.keep import Keep
from skspin._store.part import Part
from skspin._store.request import Request
from skspin._system import return_free_memory


class MemoryStore(Store):
    """Activations and cards in memory.

    Parameters
    ----------
    keep : Keep
        Where rows are; several stores may share its bound.
    owner : str
        Tells this store's rows from those of others in the same keep.
    """

    def __init__(self, keep: Keep[np.ndarray], owner: str = "") -> None:
        self._keep = keep
        self._owner = text_digest(owner)
        self._parts: dict[str, dict[bytes, Part]] = {}
        self._cards: dict[str, str] = {}

    def read(
        self, context: str, texts: Sequence[str], segments: Sequence[Segment], out: np.ndarray
    ) -> np.ndarray:
        """Fill in what is kept."""
        request = Request.of(context, texts, segments, out)
        self.fill(request)
        return request.found

    def fill(self, request: Request) -> None:
        """Fill in what is kept and not yet found."""
        for part in list(self._parts.get(request.context, {}).values()):
            overlap = request.overlap(part)
            if overlap is None:
                continue
            lacking = request.lacking(overlap)
            prefix = self._owner + part.digest
            rows = self._keep.get_many([prefix + digest for digest in request.texts_at(lacking)])
            here = np.array([row is not None for row in rows], bool)
            hits = [
                (i, row) for i, row in zip(lacking.tolist(), rows, strict=True) if row is not None
            ]
            for source, target in overlap.copies:
                for i, row in hits:
                    request.out[i, target] = row[source]
            request.mark(lacking[here], overlap)

    def write(
        self,
        context: str,
        texts: Sequence[str],
        segments: Sequence[Segment],
        rows: np.ndarray,
        *,
        model: str = "",
    ) -> None:
        """Keep a copy of activations."""
        self.put(Part.of(context, segments, model), text_digests(texts), rows)

    def put(self, part: Part, digests: Sequence[bytes], rows: Iterable[np.ndarray]) -> None:
        """Keep a copy of a part's rows."""
        self._parts.setdefault(part.context, {})[part.digest] = part
        prefix = self._owner + part.digest
        # Each row is an array of its own: a view would keep all rows of its call alive.
        copies = [np.array(row, dtype=np.float32) for row in rows]
        self._keep.put_many([prefix + digest for digest in digests], copies, part.row_bytes)

    def get_metadata(self, name: str) -> Any:
        """Return the JSON document of this name, or None."""
        text = self._cards.get(name)
        return None if text is None else json.loads(text)

    def put_metadata(self, name: str, document: Any) -> None:
        """Keep a JSON document under a name."""
        self._cards[name] = json.dumps(document)

    def info(self) -> StoreInfo:
        """Count what is kept."""
        mine = [key for key in self._keep.keys() if key.startswith(self._owner)]
        n_texts = Counter(key[16:32] for key in mine)  # by part
        models: Counter[str] = Counter()
        for parts in list(self._parts.values()):
            for part in list(parts.values()):
                models[part.label] += n_texts[part.digest] * len(part.keys)
        entries = sum(models.values())
        return StoreInfo(entries, self._keep.size_of(mine), self.limit, dict(+models))

    def clear(self) -> None:
        """Forget everything, cards too."""
        self._keep.clear(self._owner)
        self._parts.clear()
        self._cards.clear()
        return_free_memory()

    @property
    def limit(self) -> int:
        """Bound in bytes, a quarter of the machine's memory unless assigned."""
        return self._keep.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._keep.limit = as_bytes(limit)
