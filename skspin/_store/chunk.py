"""A chunk: some texts, one layout, their rows, and a checksum for each row; written once.

A chunk is one NumPy record. In a folder that is a ``.npy`` file, mapped into memory to be read; in
memory it is a plain array.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import xxhash

from skspin._layout import Layout

_PIECE_BYTES = 1 << 20  # of rows copied at a time, so that they are checked from the CPU's cache

# Of each segment what decides its numbers: key, width, and the neurons chosen, None for all.
Segments = tuple[tuple[str, int, tuple[int, ...] | None], ...]


def text_digests(texts: Iterable[str]) -> list[bytes]:
    """Digest the exact code points of each text, lone surrogates included, into 16 bytes."""
    digest = xxhash.xxh3_128_digest
    return [digest(text.encode("utf-8", "surrogatepass")) for text in texts]


def name_of_key(key: str) -> str:
    """Say how the names of all chunks of a key begin."""
    return f"{text_digests([key])[0].hex()}-"


def pieces(n_rows: int, row_bytes: int) -> list[slice]:
    """Cut rows into pieces that fit into the CPU's cache."""
    step = max(1, _PIECE_BYTES // row_bytes)
    return [slice(start, start + step) for start in range(0, n_rows, step)]


@dataclass(frozen=True)
class About:
    """What a chunk says of itself: its key and columns, and the model's name for people."""

    key: str
    segments: Segments
    model: str = field(default="", compare=False)

    @classmethod
    def of(cls, key: str, layout: Layout, model: str) -> About:
        """Describe rows of a layout."""
        return cls(key, tuple((s.key, s.width, s.neurons) for s in layout.segments), model)

    @classmethod
    @lru_cache(maxsize=64)  # most chunks of a store say the same
    def from_json(cls, encoded: bytes) -> About:
        """Read what `encoded` wrote."""
        key, segments, model = json.loads(encoded)
        return cls(
            key, tuple((k, w, None if n is None else tuple(n)) for k, w, n in segments), model
        )

    @cached_property
    def encoded(self) -> bytes:
        """Write it down as JSON."""
        text = json.dumps([self.key, self.segments, self.model], separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)  # keeps all that follows aligned

    @cached_property
    def name(self) -> str:
        """How the names of chunks of this key and layout begin."""
        segments = json.dumps(self.segments).encode()
        return f"{name_of_key(self.key)}{xxhash.xxh3_64_hexdigest(segments)}-"

    @cached_property
    def ends(self) -> list[int]:
        """Where each segment's columns end."""
        return np.cumsum([w if n is None else len(n) for _, w, n in self.segments]).tolist()


@dataclass(frozen=True)
class Common:
    """Which segments asked for are in stored rows, and in which columns."""

    asked: np.ndarray  # (n_common,), int
    copies: list[tuple[slice | np.ndarray, slice]]  # from stored columns to those asked for


@lru_cache(maxsize=64)
def find_common(stored: About, wanted: About) -> Common:
    """Find what rows of one layout have of another; chosen neurons may be some of those stored."""
    if stored.segments == wanted.segments:
        return Common(np.arange(len(wanted.segments)), [(slice(None), slice(None))])
    there = {
        segment[:2]: (segment[2], start)
        for segment, start in zip(stored.segments, [0, *stored.ends], strict=False)
    }
    asked, copies = [], []
    targets = map(slice, [0, *wanted.ends], wanted.ends)
    for i, ((key, width, chosen), target) in enumerate(zip(wanted.segments, targets, strict=True)):
        neurons, start = there.get((key, width), ((), 0))
        source: slice | np.ndarray = slice(start, start + target.stop - target.start)
        if neurons != chosen:
            column = {
                n: c for c, n in enumerate(range(width) if neurons is None else neurons, start)
            }
            if chosen is None or not column.keys() >= set(chosen):
                continue
            source = np.array([column[neuron] for neuron in chosen])
        asked.append(i)
        copies.append((source, target))
    return Common(np.array(asked, int), copies)


class DamagedChunk(ValueError):
    """A chunk that is not what was written."""


class Chunk:
    """Some texts and their rows: a view of a record, which never changes once it is sealed."""

    def __init__(self, record: np.ndarray, name: str) -> None:
        self.record, self.name = record, name
        try:
            encoded, n_texts = record["about"].tobytes(), len(record["texts"])
            self.about = About.from_json(encoded)
            expected = _record_type(len(encoded), n_texts, self.about.ends[-1])
        except (ValueError, TypeError, IndexError) as error:
            raise DamagedChunk(f"What {name} says of itself is damaged") from error
        if record.dtype != expected or record.shape or not name.startswith(self.about.name):
            raise DamagedChunk(f"{name} is not what it says of itself")
        self.digests: list[bytes] = record["texts"].tolist()
        self.rows = np.asarray(record["rows"])  # (n_texts, n_columns), "<f4"
        self._checksums = np.asarray(record["checksums"])
        self.row_bytes = 4 * self.about.ends[-1]
        # The seeds of checksums: no row is taken for another text's, model's or layout's.
        halves = np.array(record["texts"]).view("<u8").reshape(-1, 2)
        about = np.uint64(xxhash.xxh3_64_intdigest(encoded))
        self._seeds = halves[:, 0] ^ (halves[:, 1] * np.uint64(3)) ^ about

    @classmethod
    def blank(cls, about: About, digests: Sequence[bytes]) -> Chunk:
        """Make room for the rows of texts; fill in ``rows``, then call `seal`."""
        record = np.empty((), _record_type(len(about.encoded), len(digests), about.ends[-1]))
        record["about"] = np.frombuffer(about.encoded, np.uint8)
        record["texts"] = np.frombuffer(b"".join(digests), "V16")
        return cls(record, about.name)

    def seal(self) -> Chunk:
        """Add the checksums."""
        self._checksums[...] = _checksums(self.rows, self._seeds)
        return self

    def take(self, numbers: np.ndarray, into: np.ndarray) -> np.ndarray:
        """Copy rows into an array (k, n_columns), and say which are what was written (k,)."""
        self.rows.take(numbers, axis=0, out=into, mode="clip")  # other modes copy twice
        # The copy is summed up, not the map, which another process could change in between.
        return _checksums(into, self._seeds[numbers]) == self._checksums[numbers]

    def cut(self, n_bytes: int) -> list[Chunk]:
        """Cut into chunks of at most so many bytes of rows, or of one row."""
        step = max(1, n_bytes // self.row_bytes)
        if step >= len(self.digests):
            return [self]
        parts = []
        for start in range(0, len(self.digests), step):
            part = Chunk.blank(self.about, self.digests[start : start + step])
            part.rows[...] = self.rows[start : start + step]
            parts.append(part.seal())
        return parts


def merge(chunks: Sequence[Chunk]) -> Chunk | None:
    """Put the sound rows of chunks of one key and layout into one, each text once."""
    where = {text: (i, row) for i, c in enumerate(chunks) for row, text in enumerate(c.digests)}
    owners, rows = np.array(list(where.values())).T
    merged = Chunk.blank(chunks[-1].about, list(where))
    sound = np.empty(len(rows), bool)
    for i, chunk in enumerate(chunks):
        members = np.flatnonzero(owners == i)
        for piece in pieces(len(members), chunk.row_bytes):
            to = members[piece]
            values = np.empty((len(to), merged.rows.shape[1]), "<f4")
            sound[to] = chunk.take(rows[to], values)
            merged.rows[to] = values
    if not sound.any():
        return None
    if not sound.all():
        damaged = merged
        merged = Chunk.blank(damaged.about, [damaged.digests[i] for i in np.flatnonzero(sound)])
        merged.rows[...] = damaged.rows[sound]
    return merged.seal()


@lru_cache(maxsize=64)
def _record_type(n_about: int, n_texts: int, n_columns: int) -> np.dtype:
    return np.dtype(
        [
            ("about", "u1", (n_about,)),
            ("texts", "V16", (n_texts,)),
            ("checksums", "<u8", (n_texts,)),
            ("rows", "<f4", (n_texts, n_columns)),
        ]
    )


def _checksums(rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, rows, seeds.tolist()), np.uint64, len(rows))
