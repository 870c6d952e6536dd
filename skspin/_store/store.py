"""Look up, add, merge, evict: the one algorithm, wherever chunks live.

There are no locks. Chunks are written once and never changed, so the worst that threads and
processes using a store at once can do is to store or compute something twice.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby, repeat
from numbers import Real
from secrets import token_hex
from typing import Any, NamedTuple

import numpy as np

from skspin._layout import Layout
from skspin._store.chunk import (
    About,
    Chunk,
    digest_of,
    find_common,
    merge,
    pieces,
    text_digests,
    warn_of_damage,
)
from skspin._store.storage import Folder, Memory
from skspin._system import hold_warnings, return_free_memory, warn

_CHUNKS_IN_LIMIT = 16  # chunks are evicted whole, so none takes more than 1 / 16 of the limit
_MERGED_AT_ONCE = 16  # chunks of about one size
# Bytes of a merged chunk: the more the larger the store, because a process has each file of a
# folder open, but never so many that merging takes long.
_MERGED_BYTES = 1 << 26, 1 << 29
_MERGED_IN_LIMIT = 256
_WAITING_BYTES = 1 << 24  # of rows, at most, that wait to be written
_WRITING_SHARE = 20  # writing takes at most one part in 20 of a call's time


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
        Bound in bytes. What was used longest ago is evicted to make room.
    models : dict of str to int
        Entries by the name of the model that they come from.
    """

    entries: int = 0
    n_bytes: int = 0
    limit: int = 0
    models: dict[str, int] = field(default_factory=dict)


class _Request(NamedTuple):
    """Texts and the caller's array, to be filled with what is found."""

    about: About
    row_of: dict[bytes, int]  # the first row of each distinct text, by digest
    out: np.ndarray  # (n_texts, n_columns), float32
    found: np.ndarray  # (n_texts, n_segments), bool


class Store:
    """Activations by key, text and layout; and metadata, small JSON documents by name.

    Threads may share a store, and processes a folder. If a folder can't be used, the caller goes on
    after one warning: nothing more is written there (nor read, if reading failed), and memory is
    used instead.
    """

    def __init__(self, storage: Memory | Folder, memory: Store | None = None) -> None:
        self._storage = storage
        self._memory = memory
        self._metadata: dict[str, str] = {}
        self._reads = self._writes = True  # what is not read is not written, either
        with self._surviving("make"):
            storage.make()

    @contextmanager
    def _surviving(self, action: str) -> Iterator[None]:
        """Go on without the folder, or without writing to it, if ``action`` fails."""
        try:
            yield
        except OSError as error:
            is_first, self._writes = self._writes, False
            self._reads = self._reads and action == "write to"
            if is_first:
                warn(
                    f"Could not {action} the store in {self._storage}: {error}. Going on without "
                    "it: results stay the same, but activations may have to be computed again. "
                    "Make room or grant access, or pass another folder as `cache`."
                )

    # Looking up

    def look_up(
        self,
        key: str,  # everything but text and column that decides the numbers
        texts: Sequence[str],  # in any order, with or without repetitions
        layout: Layout,  # the columns of `out`
        out: np.ndarray,  # (n_texts, n_columns), float32; complete in the end if all was added
        *,
        model: str = "",  # the name under which `info` counts what is added
        dtype: str = "float32",  # rows are rounded to it, and only rows of this format are found
    ) -> Iterator[Missing]:
        """Fill ``out`` with what is stored, and yield what is missing, to be added."""
        digests = text_digests(texts)
        n_texts, row_of = len(digests), dict[bytes, int]()
        firsts = map(row_of.setdefault, digests, range(n_texts))  # the first row of each one's text
        sources = np.fromiter(firsts, np.int64, n_texts)
        repeated = np.flatnonzero(sources != np.arange(n_texts))
        found = np.zeros((n_texts, len(layout.segments)), bool)
        found[repeated] = True  # copied at the end
        about = About(key, layout, model, dtype)
        self._fill(_Request(about, row_of, out, found))
        rows = np.flatnonzero(~found.all(axis=1))
        lacking = ~found[rows]
        all_alike = (lacking == lacking[:1]).all()  # the usual case, quick to see
        for lacks in lacking[:1] if all_alike else np.unique(lacking, axis=0):
            alike = rows[(lacking == lacks).all(axis=1)]
            # It is closed also when the caller fails or is interrupted.
            with closing(Missing(about, texts, digests, alike, lacks, out, self)) as missing:
                yield missing
        for piece in pieces(len(repeated), 4 * layout.n_columns):
            out[repeated[piece]] = out[sources[repeated[piece]]]

    def _fill(self, request: _Request) -> None:
        """Fill in what this store holds and was not found yet."""
        about, prefix = request.about, digest_of(request.about.key)
        if self._reads:
            with self._surviving("read"):
                self._storage.refresh(prefix)
        chunks = [c for c in self._storage.chunks(prefix) if c.about.dtype == about.dtype]
        # Those of the same layout first.
        chunks.sort(key=lambda chunk: (chunk.about.name != about.name, chunk.about.name))
        for layout, alike in groupby(chunks, lambda chunk: chunk.about.layout):
            asked, copies = find_common(layout, about.layout)
            for chunk in alike:
                if not request.row_of.keys().isdisjoint(chunk.row_of.keys()):
                    self._copy(chunk, request, asked, copies)
        if self._memory is not None and not self._writes:
            self._memory._fill(request)

    def _copy(self, chunk: Chunk, request: _Request, asked: np.ndarray, copies: list) -> None:
        """Copy what was not found yet from a chunk into the caller's array."""
        targets, rows = _match(request.row_of, chunk.row_of)
        if request.found[targets].any():
            lacking = ~request.found[targets][:, asked].all(axis=1)
            targets, rows = targets[lacking], rows[lacking]
        if not len(rows) or not self._storage.touch(chunk):
            return
        in_file = np.argsort(rows)  # reading a disk in order is faster
        rows, targets, n_texts = rows[in_file], targets[in_file], len(in_file)
        sound = np.empty(n_texts, bool)
        parts = pieces(n_texts, chunk.row_bytes)
        buffer = np.empty((len(rows[parts[0]]), chunk.rows.shape[1]), chunk.rows.dtype)
        for part in parts:
            values, to = buffer[: len(rows[part])], targets[part]
            sound[part] = good = chunk.take(rows[part], values)
            if not good.all():  # nothing damaged is copied over what was found before
                values, to = values[good], to[good]
            for source, target in copies:
                request.out[to, target] = values[:, source]
        request.found[targets[sound][:, None], asked] = True
        if not sound.all():
            if self._writes:
                with self._surviving("write to"):
                    self._replace([chunk], self._storage.limit)
            else:
                warn_of_damage(int((~sound).sum()), self._storage)
                chunk.forget(rows[~sound])

    # Adding

    def add(self, chunk: Chunk) -> None:
        """Store a chunk, in memory if the folder can't be written to."""
        if self._writes:
            with self._surviving("write to"):
                limit = self._storage.limit
                if chunk.row_bytes <= limit:
                    for part in chunk.cut(limit // _CHUNKS_IN_LIMIT):
                        self._put(part, limit)
                    self._merge_small(chunk.about.name, limit)
                return
        if self._memory is not None:
            self._memory.add(chunk)

    def _put(self, chunk: Chunk, limit: int) -> None:
        n_bytes = self._storage.size_of(chunk)
        if n_bytes <= limit:
            self._make_room(n_bytes, limit)
            chunk.name = f"{chunk.about.name}{token_hex(8)}.npy"
            self._storage.put(chunk)
            self._make_room(0, limit)  # others may have written at the same time

    def _make_room(self, n_bytes: int, limit: int) -> None:
        """Remove what was used longest ago until ``n_bytes`` more fit into ``limit``."""
        sizes = self._storage.sizes()
        excess = sum(sizes.values()) + n_bytes - limit
        for name, size in sizes.items():
            if excess > 0:
                self._storage.remove(name)
                excess -= size

    def _merge_small(self, about: str, limit: int) -> None:
        """Merge chunks of one key and layout where there are many of about one size."""
        most = int(np.clip(limit // _MERGED_IN_LIMIT, *_MERGED_BYTES))
        most = min(limit // _CHUNKS_IN_LIMIT, most)
        alike: defaultdict[int, list[Chunk]] = defaultdict(list)
        for chunk in self._storage.chunks(about):
            if chunk.record.nbytes <= most // 2:
                alike[chunk.record.nbytes.bit_length() // 4].append(chunk)
        for chunks in alike.values():
            if len(chunks) >= _MERGED_AT_ONCE:
                chunks.sort(key=lambda chunk: chunk.record.nbytes)
                n_fit = int(np.searchsorted(np.cumsum([c.record.nbytes for c in chunks]), most))
                self._replace(chunks[: max(2, n_fit)], limit)

    def _replace(self, chunks: Sequence[Chunk], limit: int) -> None:
        """Replace some chunks by one that holds their undamaged rows."""
        merged = merge(chunks, self._storage)
        if merged is not None:
            self._put(merged, limit)
        for chunk in chunks:
            self._storage.remove(chunk.name)

    # For users

    @property
    def limit(self) -> int:
        """Bound in bytes; a quarter of the machine's memory, or of the disk, unless assigned."""
        with self._surviving("read"):
            return self._storage.limit
        return 0  # it could not be read

    @limit.setter
    def limit(self, limit: int) -> None:
        if not isinstance(limit, Real) or not 0 <= limit < math.inf:
            raise ValueError(
                f"limit={limit!r}, but it must be a number of bytes that is not negative, e.g. "
                "2 * 1024**3."
            )
        with self._surviving("write to"):
            self._storage.limit = int(limit)
            self._make_room(0, int(limit))

    def info(self) -> StoreInfo:
        """Count what is kept."""
        if self._reads:
            with self._surviving("read"):
                self._storage.refresh("")
                texts: defaultdict[About, set[bytes]] = defaultdict(set)
                for chunk in self._storage.chunks(""):
                    texts[chunk.about].update(chunk.row_of)
                models: Counter[str] = Counter()
                for about, own in texts.items():
                    models[about.model or about.key] += len(own) * len(about.layout.segments)
                n_bytes = sum(self._storage.sizes().values())
                return StoreInfo(models.total(), n_bytes, self._storage.limit, dict(models))
        return StoreInfo()  # it could not be read

    def clear(self) -> None:
        """Remove everything, metadata too, for all processes, and free the space."""
        self._metadata.clear()
        if self._reads:
            with self._surviving("write to"):
                for name in self._storage.sizes():
                    self._storage.remove(name)
                self._storage.clear_metadata()
        if self._memory is not None and not self._writes:
            self._memory.clear()
        return_free_memory()

    def get_metadata(self, name: str) -> Any:
        """Return the JSON document of this name, or None."""
        text = self._metadata.get(name)
        if text is None and self._reads:
            with self._surviving("read"):
                text = self._storage.read_metadata(name)
        if text is None:
            return None
        self._metadata[name] = text
        return json.loads(text)

    def put_metadata(self, name: str, document: Any) -> None:
        """Keep a JSON document under a name; a later one replaces it.

        Other processes may go on using the document that they have read. So choose a name that
        determines its document.
        """
        self._metadata[name] = text = json.dumps(document)
        if self._writes:
            with self._surviving("write to"):
                self._storage.write_metadata(name, text)


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
        store: Store,
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
        is_due = time.monotonic() - self._written >= _WRITING_SHARE * self._took
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
        self._store.add(chunk.seal())
        self._written = time.monotonic()
        self._took = self._written - begun


def _match(one: dict[bytes, int], other: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of the keys that two dicts have in common."""
    if len(other) < len(one):
        return _match(other, one)[::-1]
    others = np.fromiter(map(other.get, one, repeat(-1)), np.int64, len(one))
    own = np.fromiter(one.values(), np.int64, len(one))
    common = np.flatnonzero(others >= 0)
    return own[common], others[common]
