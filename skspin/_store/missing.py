"""What a store lacks: texts for the caller to compute, whose rows are stored as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np

from skspin._layout import Layout
from skspin._store.chunk import About, Chunk, find_common, pieces
from skspin._system import hold_warnings, warn

_WAITING_BYTES = 1 << 24  # of rows, at most, that wait to be written
_SHARE = 20  # writing takes at most one part in 20 of a call's time


class Missing:
    """Distinct texts that lack the same columns, for the caller to compute.

    A thread stores the added rows in the background, about 16 MB at a time, while at most as many
    more wait. Writing that has begun is finished even if the caller is interrupted.
    """

    def __init__(
        self,
        about: About,  # of the columns asked for
        texts: Sequence[str],
        digests: Sequence[bytes],
        rows: np.ndarray,  # (k,), int: of the texts that lack columns, in `texts` and in `out`
        lacks: np.ndarray,  # (n_segments,), bool
        out: np.ndarray,  # (n_texts, n_columns), float32
        store: Callable[[Chunk], object],
    ) -> None:
        segments = zip(about.layout.segments, lacks, strict=True)
        self.layout = Layout(tuple(segment for segment, is_lacking in segments if is_lacking))
        self.texts = [texts[row] for row in rows.tolist()]
        self._about = replace(about, layout=self.layout)
        self._digests, self._rows, self._out, self._store = digests, rows, out, store
        _, self._copies = find_common(self.layout, about.layout)
        self._waiting: list[int] = []  # rows that are not stored yet
        self._n_left = len(rows)
        self._pool = ThreadPoolExecutor(1, "skspin-store")
        self._writing: Future[list[str]] | None = None
        self._written, self._took = time.monotonic(), 0.0

    def add(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Take rows (k, n_columns) of the texts at ``positions`` (k,), to fill in and to store."""
        if not len(positions):  # e.g. a batch of windows that completes no text
            return
        # Rounded before they are filled in: a row is the same whether it was stored or not.
        values = self._about.round(values)
        rows = self._rows[positions]
        for source, target in self._copies:
            self._out[rows, target] = values[:, source]
        self._waiting.extend(rows.tolist())
        self._n_left -= len(positions)
        is_full = len(self._waiting) * values[:1].nbytes >= _WAITING_BYTES
        # Rows of a fast model are stored in few large chunks, those of a slow one without delay.
        # `close` stores the last ones.
        is_due = time.monotonic() - self._written >= _SHARE * self._took
        is_busy = self._writing is not None and not self._writing.done()
        if is_full or (is_due and self._n_left and not is_busy):
            self._finish_writing()
            waiting = self._waiting.copy()
            self._writing = self._pool.submit(hold_warnings, self._write, waiting)
            self._waiting.clear()  # last: Ctrl-C before this stores rows twice, but loses none

    def close(self) -> None:
        """Store what waits."""
        try:
            self._finish_writing()
        finally:
            self._pool.shutdown()
            if self._waiting:
                self._write(self._waiting)

    def _finish_writing(self) -> None:
        """Wait for what is being written; raise its error, or issue its warnings."""
        if self._writing is not None:
            wait([self._writing])  # interrupted here, it can be waited for again
            written, self._writing = self._writing, None
            for message in written.result():
                warn(message)

    def _write(self, waiting: Sequence[int]) -> None:
        begun, rows = time.monotonic(), np.array(waiting)
        chunk = Chunk.blank(self._about, [self._digests[row] for row in waiting])
        for piece in pieces(len(rows), chunk.row_bytes):
            for source, target in self._copies:
                chunk.rows[piece, source] = self._out[rows[piece], target]
        self._store(chunk.seal())
        self._written = time.monotonic()
        self._took = self._written - begun
