"""Look up, add, merge, evict: the one algorithm, wherever chunks live.

There are no locks. Chunks are written once and never changed, so the worst that threads and
processes using a store at once can do is to store or compute something twice.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, repeat
from numbers import Real
from secrets import token_hex
from typing import Any

import numpy as np

from skspin._layout import Layout
from skspin._store.chunk import (
    About,
    Chunk,
    Common,
    DamagedChunk,
    find_common,
    merge,
    name_of_key,
    pieces,
    text_digests,
    warn_of_damage,
)
from skspin._store.folder import Folder
from skspin._store.memory import Memory
from skspin._store.writer import Writer
from skspin._system import return_free_memory, warn

_WAITING_BYTES = 1 << 24  # of rows, at most, that wait to be written
_SHARE = 20  # writing takes at most one part in 20 of a call's time
_CHUNKS_IN_LIMIT = 16  # chunks are evicted whole, so none takes more than 1 / 16 of the limit
_MERGED_AT_ONCE = 16  # chunks of about one size
_MOST_MERGED = 1 << 26  # bytes of a merged chunk, so that merging never takes long
_SMALL_BYTES = 1 << 16  # of a new chunk that stays in memory, and is not mapped from its file
_ROW = (1 << 32) - 1  # a text's position is its row, and above these bits its chunk's number


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


@dataclass(frozen=True, eq=False)
class _Request:
    """Distinct texts and their rows in the caller's array, to be filled with what is found."""

    about: About
    digests: list[bytes]
    rows: np.ndarray  # (n_texts,), int
    out: np.ndarray  # (n_rows, n_columns), float32
    found: np.ndarray  # (n_texts, n_segments), bool


class Missing:
    """Distinct texts that lack the same columns, for the caller to compute.

    A thread stores the added rows in the background, about 16 MB at a time, while at most as many
    more wait.
    """

    def __init__(self, store: Store, texts: Sequence[str], request: _Request, lacks: np.ndarray):
        members = np.flatnonzero((request.found != lacks).all(axis=1))
        segments, wanted = np.flatnonzero(lacks).tolist(), request.about.layout
        self.layout = Layout(tuple(wanted.segments[i] for i in segments))
        self._rows = request.rows[members]
        self.texts = [texts[row] for row in self._rows.tolist()]
        self._digests = [request.digests[i] for i in members.tolist()]
        self._about = replace(request.about, layout=self.layout)
        self._store, self._out = store, request.out
        self._copies = [(slice(None), slice(None))]  # from columns computed to columns asked for
        if not lacks.all():
            targets = [wanted.slices[i] for i in segments]
            self._copies = list(zip(self.layout.slices, targets, strict=True))
        self._waiting: list[int] = []  # positions of texts whose rows are not stored yet
        self._n_left = len(members)
        self._writer = Writer()
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
        self._waiting.extend(positions.tolist())
        self._n_left -= len(positions)
        is_full = len(self._waiting) * values[:1].nbytes >= _WAITING_BYTES
        # Rows of a fast model are stored in few large chunks, those of a slow one without delay.
        # `close` stores the last ones.
        is_due = time.monotonic() - self._written >= _SHARE * self._took
        if is_full or (is_due and self._n_left and not self._writer.is_busy):
            waiting = self._waiting.copy()
            self._writer.begin(lambda: self._store_rows(waiting))
            self._waiting.clear()  # last: Ctrl-C before this stores rows twice, but loses none

    def close(self) -> None:
        """Store what waits."""
        try:
            self._writer.close()
        finally:
            if self._waiting:
                self._store_rows(self._waiting)

    def _store_rows(self, positions: list[int]) -> None:
        begun = time.monotonic()
        chunk = Chunk.blank(self._about, [self._digests[i] for i in positions])
        rows = self._rows[positions]
        for piece in pieces(len(rows), chunk.row_bytes):
            for source, target in self._copies:
                chunk.rows[piece, source] = self._out[rows[piece], target]
        self._store.add(chunk.seal())
        self._written = time.monotonic()
        self._took = self._written - begun


class Store:
    """Activations by key, text and layout; and metadata, small JSON documents by name.

    Threads may share a store, and processes a folder. If a folder can't be used, the caller goes on
    after one warning: nothing more is written there (nor read, if reading failed), and memory is
    used instead.
    """

    def __init__(self, place: Memory | Folder, memory: Store | None = None) -> None:
        self._place = place
        self._memory = memory
        self._metadata: dict[str, str] = {}
        self._count = count()
        self._chunks: dict[int, Chunk] = {}
        self._opened: set[str] = set()  # names
        self._abouts: dict[str, About] = {}  # by the prefix of their chunks' names
        self._positions: dict[str, dict[bytes, int]] = defaultdict(dict)  # by prefix and text
        self._reads = self._writes = True
        with self._surviving("make"):
            place.make()

    @contextmanager
    def _surviving(self, action: str) -> Iterator[None]:
        """Go on without the folder, or without writing to it, if ``action`` fails."""
        try:
            yield
        except OSError as error:
            is_first = self._reads and self._writes
            self._writes = False
            self._reads = self._reads and action == "write to"
            if is_first:
                warn(
                    f"Could not {action} the store in {self._place}: {error}. Going on without it: "
                    "results stay the same, but activations may have to be computed again. Make "
                    "room or grant access, or pass another folder as `cache`."
                )

    # Looking up

    def look_up(
        self,
        key: str,
        texts: Sequence[str],
        layout: Layout,
        out: np.ndarray,
        *,
        model: str = "",
        dtype: str = "float32",
    ) -> Iterator[Missing]:
        """Fill ``out`` with what is stored, and yield what is missing, to be added.

        Parameters
        ----------
        key : str
            Everything but text and column that decides the numbers.
        texts : sequence of str, length n_texts
            In any order, with or without repetitions.
        layout : Layout
            The columns of ``out``.
        out : ndarray of shape (n_texts, n_columns), float32
            Complete when the iteration has ended, if all that was missing was added.
        model : str, default=""
            The name under which `info` counts what is added; decides nothing else.
        dtype : {"float32", "float16"}, default="float32"
            The format that rows are rounded to and stored in; only rows of this format are found.
        """
        digests = text_digests(texts)
        n_texts = len(digests)
        first = dict(zip(reversed(digests), range(n_texts - 1, -1, -1), strict=True))  # its row
        rows, distinct = np.arange(n_texts), digests
        if len(first) < n_texts:
            rows = np.sort(list(first.values()))
            distinct = [digests[row] for row in rows.tolist()]
        found = np.zeros((len(rows), len(layout.segments)), bool)
        request = _Request(About(key, layout, model, dtype), distinct, rows, out, found)
        self._fill(request)
        lacking = ~found[~found.all(axis=1)]
        all_alike = (lacking == lacking[:1]).all()  # the usual case, quick to see
        for lacks in lacking[:1] if all_alike else np.unique(lacking, axis=0):
            missing = Missing(self, texts, request, lacks)
            try:
                yield missing
            finally:  # also when the caller fails or is interrupted
                missing.close()
        if len(first) < n_texts:
            source = np.array([first[digest] for digest in digests])
            again = np.flatnonzero(source != np.arange(n_texts))
            for piece in pieces(len(again), 4 * layout.n_columns):
                out[again[piece]] = out[source[again[piece]]]

    def _fill(self, request: _Request) -> None:
        """Fill in what this store holds and was not found yet."""
        key = name_of_key(request.about.key)
        if self._reads:
            with self._surviving("read"):
                self._refresh(key)
        # Chunks that another thread merges meanwhile are still in this copy, or in a newer chunk.
        chunks = dict(self._chunks)
        wanted, dtype = request.about.layout, request.about.dtype
        abouts = [(n, a) for n, a in list(self._abouts.items()) if n.startswith(key)]
        layouts = [(n, a.layout) for n, a in abouts if a.dtype == dtype]
        layouts.sort(key=lambda named: named[1] != wanted)  # the same layout first
        for name, layout in layouts:
            common = find_common(layout, wanted)
            lacking = np.flatnonzero(~request.found[:, common.asked].all(axis=1))
            digests = request.digests
            if len(lacking) < len(digests):
                digests = [digests[i] for i in lacking.tolist()]
            found = map(self._positions[name].get, digests, repeat(-1))
            positions = np.fromiter(found, np.int64, len(lacking))
            numbers = positions >> 32
            for number in sorted(set(numbers.tolist()) - {-1}):
                chunk = chunks.get(number) or self._chunks.get(number)
                here = np.flatnonzero(numbers == number)
                if chunk is not None and self._place.touch(chunk):
                    self._copy(chunk, positions[here] & _ROW, request, lacking[here], common)
                elif chunk is not None:
                    self._give_up(chunk.name, f"{chunk.name} in {self._place} was cut off")
        if self._memory is not None and not (self._reads and self._writes):
            self._memory._fill(request)

    def _copy(
        self, chunk: Chunk, rows: np.ndarray, request: _Request, texts: np.ndarray, common: Common
    ) -> None:
        """Copy rows of a chunk into the caller's array."""
        in_file = np.argsort(rows)  # reading a disk in order is faster
        rows, texts = rows[in_file], texts[in_file]
        sound = np.empty(len(rows), bool)
        parts = pieces(len(rows), chunk.row_bytes)
        buffer = np.empty((len(rows[parts[0]]), chunk.rows.shape[1]), chunk.rows.dtype)
        for part in parts:
            values, targets = buffer[: len(rows[part])], request.rows[texts[part]]
            sound[part] = good = chunk.take(rows[part], values)
            if not good.all():  # nothing damaged is copied over what was found before
                values, targets = values[good], targets[good]
            for source, target in common.copies:
                request.out[targets, target] = values[:, source]
        request.found[texts[sound][:, None], common.asked] = True
        if not sound.all():
            for i in texts[~sound].tolist():
                self._positions[chunk.about.name].pop(request.digests[i], None)
            if self._writes:
                with self._surviving("write to"):
                    self._replace([chunk], self.limit)
            else:
                warn_of_damage(int((~sound).sum()), self._place)

    # Known chunks

    def _refresh(self, key: str = "") -> None:
        """Learn which chunks there are, and open those whose names begin with ``key``."""
        for attempt in range(5):
            known = list(self._opened)
            names = set(self._place.names())
            new = [n for n in names if n.startswith(key) and n not in self._opened]
            gone = {name for name in known if name not in names}
            # If chunks are gone, another process may have merged them: look again for the result.
            if all([self._open(name) for name in new]) and (attempt or not gone):
                break
        self._forget(gone)

    def _open(self, name: str) -> bool:
        """Open a chunk; False if it has just been removed."""
        try:
            self._learn(Chunk(self._place.open(name), name))
        except FileNotFoundError:
            return False
        except DamagedChunk as error:
            self._give_up(name, error)
        return True

    def _learn(self, chunk: Chunk) -> None:
        start = next(self._count) << 32
        positions = zip(chunk.digests, range(start, start + len(chunk.digests)), strict=True)
        # Another thread may look a text up at any moment, so its chunk is added before the text.
        self._chunks[start >> 32] = chunk
        self._abouts[chunk.about.name] = chunk.about
        self._positions[chunk.about.name].update(positions)
        self._opened.add(chunk.name)  # Ctrl-C may come at any moment, so this is last

    def _give_up(self, name: str, trouble: object) -> None:
        """Warn of a damaged file, remove it if possible, and never open it again."""
        warn(f"{trouble}; what is missing will be computed again.")
        self._forget({name})
        self._opened.add(name)
        if self._writes:
            with self._surviving("write to"):
                self._place.remove(name)

    def _forget(self, names: Collection[str]) -> None:
        """Forget chunks that are no longer there."""
        chunks = list(self._chunks.items())
        gone = {number: chunk for number, chunk in chunks if chunk.name in names}
        lost: defaultdict[str, set[bytes]] = defaultdict(set)
        for number, chunk in gone.items():
            known = self._positions[chunk.about.name].get
            texts = enumerate(chunk.digests, number << 32)
            lost[chunk.about.name].update(digest for i, digest in texts if known(digest) == i)
        # A merged chunk may have been learnt before the chunks that it was made from.
        for number, chunk in chunks:
            missed = lost.get(chunk.about.name)
            if missed and number not in gone and not missed.isdisjoint(chunk.digests):
                texts = enumerate(chunk.digests, number << 32)
                again = {digest: i for i, digest in texts if digest in missed}
                self._positions[chunk.about.name].update(again)
                missed.difference_update(again)
        for name, digests in lost.items():
            for digest in digests:
                self._positions[name].pop(digest, None)
        for number in gone:
            self._chunks.pop(number, None)
        self._opened.difference_update(names)  # last, as in `_learn`

    # Adding

    def add(self, chunk: Chunk) -> None:
        """Store a chunk, in memory if the folder can't be written to."""
        if self._writes:
            with self._surviving("write to"):
                limit = self.limit
                if chunk.row_bytes <= limit:
                    for part in chunk.cut(limit // _CHUNKS_IN_LIMIT):
                        self._put(part, limit)
                    self._merge_small(chunk.about.name, limit)
                return
        if self._memory is not None:
            self._memory.add(chunk)

    def _put(self, chunk: Chunk, limit: int) -> None:
        n_bytes = self._place.size_of(chunk)
        if n_bytes <= limit:
            self._make_room(n_bytes, limit)
            chunk.name = f"{chunk.about.name}{token_hex(8)}.npy"
            self._place.put(chunk)
            self._place.touch(chunk)
            if chunk.record.nbytes <= _SMALL_BYTES:
                self._learn(chunk)
            else:  # from now on the system decides how long its rows stay in memory
                self._open(chunk.name)

    def _make_room(self, n_bytes: int, limit: int) -> None:
        """Remove what was used longest ago until ``n_bytes`` more fit into ``limit``."""
        entries = self._place.scan()
        free = limit - sum(size for _, size in entries.values())
        unused = set()
        for name, (_, size) in sorted(entries.items(), key=lambda entry: entry[1]):
            if free < n_bytes:
                unused.add(name)
                free += size
        self._remove(unused)

    def _merge_small(self, about: str, limit: int) -> None:
        """Merge chunks of one key and layout where there are many of about one size."""
        most = min(limit // _CHUNKS_IN_LIMIT, _MOST_MERGED)
        alike: defaultdict[int, list[Chunk]] = defaultdict(list)
        for chunk in list(self._chunks.values()):
            if chunk.about.name == about and chunk.record.nbytes <= most // 2:
                alike[chunk.record.nbytes.bit_length() // 4].append(chunk)
        for chunks in alike.values():
            if len(chunks) >= _MERGED_AT_ONCE:
                chunks.sort(key=lambda chunk: chunk.record.nbytes)
                n_fit = int(np.searchsorted(np.cumsum([c.record.nbytes for c in chunks]), most))
                self._replace(chunks[: max(2, n_fit)], limit)

    def _replace(self, chunks: Sequence[Chunk], limit: int) -> None:
        """Replace some chunks by one that holds their undamaged rows."""
        merged = merge(chunks, self._place)
        if merged is not None:
            self._put(merged, limit)
        self._remove({chunk.name for chunk in chunks})

    def _remove(self, names: Collection[str]) -> None:
        self._forget(names)
        for name in names:
            self._place.remove(name)

    # For users

    @property
    def limit(self) -> int:
        """Bound in bytes; a quarter of the machine's memory, or of the disk, unless assigned."""
        return self._place.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        if not isinstance(limit, Real) or not 0 <= limit < math.inf:
            raise ValueError(
                f"limit={limit!r}, but it must be a number of bytes that is not negative, e.g. "
                "2 * 1024**3."
            )
        self._place.limit = int(limit)
        self._make_room(0, int(limit))

    def info(self) -> StoreInfo:
        """Count what is kept."""
        if self._reads:
            with self._surviving("read"):
                self._refresh()
                n_bytes = sum(size for _, size in self._place.scan().values())
                models: Counter[str] = Counter()
                for name, about in list(self._abouts.items()):
                    n_entries = len(self._positions[name]) * len(about.layout.segments)
                    models[about.model or about.key] += n_entries
                return StoreInfo(models.total(), n_bytes, self.limit, dict(+models))
        return StoreInfo()

    def clear(self) -> None:
        """Remove everything, metadata too, for all processes, and free the space."""
        self._metadata.clear()
        if self._reads:
            self._remove({*self._place.scan(), *self._opened})
            self._place.clear_metadata()
        if self._memory is not None and not self._writes:
            self._memory.clear()
        return_free_memory()

    def get_metadata(self, name: str) -> Any:
        """Return the JSON document of this name, or None."""
        text = self._metadata.get(name)
        if text is None and self._reads:
            with self._surviving("read"):
                text = self._place.read_metadata(name)
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
                self._place.write_metadata(name, text)
