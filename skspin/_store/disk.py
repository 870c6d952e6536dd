"""Activations in a folder, shared by processes, with memory in front."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from skspin._layout import Segment
from skspin._store.base import Store, StoreInfo, as_bytes
from skspin._store.cards import Cards
from skspin._store.digest import text_digests
from skspin._store.memory import MemoryStore
from skspin._store.part import Part
from skspin._store.request import Request
from skspin._store.shelves import Shelves

FORMAT = 1  # another version's folder lies beside ours, and neither touches the other's
_LIMIT = "limit"


class DiskStore(Store):
    """Activations and cards in a folder.

    Whatever goes wrong with the disk, the caller gets on: there is one warning, and from then on
    nothing more is written, or, if reading failed, only memory is used.

    Parameters
    ----------
    folder : str
        Made, readable by its owner alone, if it is not there.
    front : MemoryStore
        Holds what was written in this process, and what was read from disk more than once: a
        process that reads everything once would only copy the system's own cache of the disk.
    """

    def __init__(self, folder: str, front: MemoryStore) -> None:
        self.folder = Path(folder)
        self._front = front
        home = self.folder / f"skspin-{FORMAT}"
        rooms = {name: home / name for name in ("shelves", "cards", "settings")}
        self._shelves = Shelves(rooms["shelves"])
        self._cards = Cards(rooms["cards"])
        self._settings = Cards(rooms["settings"])
        self._reads = self._writes = True
        self._warned = False
        with self._surviving("make"):
            for place in (self.folder, home, *rooms.values()):
                os.makedirs(place, mode=0o700, exist_ok=True)
        self._was_there = self.folder.is_dir()

    @contextmanager
    def _surviving(self, action: str) -> Iterator[None]:
        """Go on without the disk, or without writing to it, if ``action`` fails."""
        try:
            yield
        except OSError as error:
            self._writes = False
            self._reads = self._reads and action == "write to"
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"Could not {action} the store in {self.folder}: {error}. Going on without it: "
                    "results stay the same, but activations may have to be computed again. Make "
                    "room or grant access, or pass another folder as `cache`.",
                    stacklevel=2,
                )

    def read(
        self, context: str, texts: Sequence[str], segments: Sequence[Segment], out: np.ndarray
    ) -> np.ndarray:
        """Fill in what is kept."""
        request = Request.of(context, texts, segments, out)
        self._front.fill(request)
        if self._reads and not request.found.all():
            with self._surviving("read"):
                self._shelves.fill(request, self._front.put)
        return request.found

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
        part = Part.of(context, segments, model)
        digests = text_digests(texts)
        self._front.put(part, digests, rows)
        if self._writes:
            with self._surviving("write to"):
                self._shelves.put(part, digests, rows, self.limit)

    def get_metadata(self, name: str) -> Any:
        """Return the JSON document of this name, or None."""
        card = self._front.get_metadata(name)
        if card is None:
            card = self._card_on_disk(self._cards, name)
            if card is not None:
                self._front.put_metadata(name, card)
        return card

    def _card_on_disk(self, cards: Cards, name: str) -> Any:
        if not self._reads:
            return None
        with self._surviving("read"):
            try:
                return cards.get(name)
            except ValueError as error:
                warnings.warn(f"{error} It will be made again.", stacklevel=2)
        return None

    def put_metadata(self, name: str, document: Any) -> None:
        """Keep a JSON document under a name."""
        self._front.put_metadata(name, document)
        if self._writes:
            with self._surviving("write to"):
                self._cards.put(name, document)

    def info(self) -> StoreInfo:
        """Count what is kept on disk."""
        if self._reads:
            with self._surviving("read"):
                n_bytes, models = self._shelves.count()
                return StoreInfo(sum(models.values()), n_bytes, self.limit, models)
        return StoreInfo()

    def clear(self) -> None:
        """Forget everything, in memory and on disk, for all processes; the limit stays."""
        self._front.clear()
        self._shelves.shrink(0)
        self._cards.clear()

    @property
    def limit(self) -> int:
        """Bound in bytes, a quarter of the disk unless assigned; kept in the folder, for all."""
        limit = self._card_on_disk(self._settings, _LIMIT)
        return shutil.disk_usage(self.folder).total // 4 if limit is None else limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._settings.put(_LIMIT, as_bytes(limit))
        self._shelves.shrink(as_bytes(limit))

    @property
    def is_outdated(self) -> bool:
        """Whether somebody has removed the folder since, or made it where we could not."""
        return self.folder.is_dir() != self._was_there
