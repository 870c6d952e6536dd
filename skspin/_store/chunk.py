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

from skspin._layout import Layout, Segment
from skspin._system import warn

DTYPES = {"float32": "<f4", "float16": "<f2"}  # formats of stored rows
_PIECE_BYTES = 1 << 20  # of rows copied at a time, which then are checked in the CPU's cache


def text_digests(texts: Iterable[str]) -> list[bytes]:
    """Digest the exact code points of each text, lone surrogates included, into 16 bytes."""
    digest = xxhash.xxh3_128_digest
    return [digest(text.encode("utf-8", "surrogatepass")) for text in texts]


def digest_of(text: str) -> str:
    """Digest one text into hexadecimal digits; a key's are the prefix of its chunks' names."""
    return text_digests([text])[0].hex()


def pieces(n_rows: int, row_bytes: int) -> list[slice]:
    """Cut rows into pieces that fit into the CPU's cache."""
    step = max(1, _PIECE_BYTES // row_bytes)
    return [slice(start, start + step) for start in range(0, n_rows, step)]


@dataclass(frozen=True)
class About:
    """The header of a chunk: its key, its columns, and the model's name for people.

    The format of the rows is part of the record's dtype.
    """

    key: str
    layout: Layout
    model: str = field(default="", compare=False)
    dtype: str = "float32"

    @classmethod
    @lru_cache(maxsize=64)  # most chunks of a store say the same
    def from_json(cls, encoded: bytes, dtype: str) -> About:
        """Read what `encoded` wrote."""
        key, segments, model = json.loads(encoded)
        layout = tuple(Segment(*[*s[:5], s[5] and tuple(s[5])]) for s in segments)
        return cls(key, Layout(layout), model, dtype)

    @cached_property
    def encoded(self) -> bytes:
        """Write it down as JSON."""
        segments = [list(vars(segment).values()) for segment in self.layout.segments]
        text = json.dumps([self.key, segments, self.model], separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)  # keeps all that follows aligned

    @cached_property
    def name(self) -> str:
        """The prefix of the names of all chunks of this key, layout and format."""
        segments = [(s.key, s.width, s.neurons) for s in self.layout.segments]
        columns = json.dumps([*segments, *([self.dtype] if self.dtype != "float32" else [])])
        return f"{digest_of(self.key)}-{xxhash.xxh3_64_hexdigest(columns.encode())}-"

    def round(self, rows: np.ndarray) -> np.ndarray:
        """Round rows (k, n_columns) to the chunk's format, or raise if a value is too large."""
        if self.dtype == "float32":
            return rows
        with np.errstate(over="ignore"):  # infinite values are refused below
            rounded = rows.astype(DTYPES[self.dtype])
        if np.isfinite(rounded).all():
            return rounded
        largest = np.abs(rows).max(axis=0)  # (n_columns,)
        segment = self.layout.segment_of(int(largest.argmax()))
        raise ValueError(
            f"store_dtype={self.dtype!r} holds numbers up to {np.finfo(self.dtype).max:,.0f}, but "
            f"an activation of layer {segment.layer} at site {segment.site!r} is "
            f"{largest.max():,.0f}. Use store_dtype='float32'."
        )


@lru_cache(maxsize=64)
def find_common(
    stored: Layout, wanted: Layout
) -> tuple[np.ndarray, list[tuple[slice | np.ndarray, slice]]]:
    """Find the segments of ``wanted`` of which ``stored`` has all neurons, and maybe more.

    Returns their numbers, and which stored columns are to be copied to which of those asked for.
    """
    if stored == wanted:
        return np.arange(len(wanted.segments)), [(slice(None), slice(None))]
    there = {
        (segment.key, segment.width): (segment.neurons, columns)
        for segment, columns in zip(stored.segments, stored.slices, strict=True)
    }
    asked, copies = [], []
    for i, segment in enumerate(wanted.segments):
        neurons, columns = there.get((segment.key, segment.width), ((), slice(0)))
        source: slice | np.ndarray = columns
        if neurons != segment.neurons:
            known = range(segment.width) if neurons is None else neurons
            at = {neuron: column for column, neuron in enumerate(known, columns.start or 0)}
            if segment.neurons is None or not at.keys() >= set(segment.neurons):
                continue
            source = np.array([at[neuron] for neuron in segment.neurons])
        asked.append(i)
        copies.append((source, wanted.slices[i]))
    return np.array(asked, int), copies


class Chunk:
    """Some texts and their rows: a view of a record, which never changes once it is sealed."""

    def __init__(self, record: np.ndarray, name: str) -> None:
        self.record, self.name = record, name
        try:
            encoded, n_texts = record["about"].tobytes(), len(record["texts"])
            dtype = record["rows"].dtype.name
            self.about = About.from_json(encoded, dtype)
            expected = _record_type(len(encoded), n_texts, self.about.layout.n_columns, dtype)
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError("its header can't be read") from error
        if record.dtype != expected or record.shape or not name.startswith(self.about.name):
            raise ValueError("it does not match its header")
        self.rows = np.asarray(record["rows"])  # (n_texts, n_columns)
        self.row_of = dict(zip(record["texts"].tolist(), range(n_texts), strict=True))  # by digest
        self.row_bytes = self.rows.itemsize * self.rows.shape[1]
        self._checksums = np.asarray(record["checksums"])
        # Seeds of the checksums: no row passes for that of another text, model or layout.
        halves = np.array(record["texts"]).view("<u8").reshape(-1, 2)
        about = np.uint64(xxhash.xxh3_64_intdigest(encoded))
        self._seeds = halves[:, 0] ^ (halves[:, 1] * np.uint64(3)) ^ about

    @classmethod
    def blank(cls, about: About, digests: Sequence[bytes]) -> Chunk:
        """Make room for the rows of texts; fill in ``rows``, then call `seal`."""
        shape = len(about.encoded), len(digests), about.layout.n_columns
        record = np.empty((), _record_type(*shape, about.dtype))
        record["about"] = np.frombuffer(about.encoded, np.uint8)
        record["texts"] = np.frombuffer(b"".join(digests), "V16")
        return cls(record, about.name)

    def seal(self) -> Chunk:
        """Add the checksums."""
        self._checksums[...] = _checksums(self.rows, self._seeds)
        return self

    def take(self, numbers: np.ndarray, into: np.ndarray) -> np.ndarray:
        """Copy rows into an array (k, n_columns), and return which are undamaged, (k,)."""
        self.rows.take(numbers, axis=0, out=into, mode="clip")  # other modes copy twice
        # The copy is checked, not the map, which another process could change in between.
        return _checksums(into, self._seeds[numbers]) == self._checksums[numbers]

    def forget(self, numbers: np.ndarray) -> None:
        """Find these rows no more."""
        for digest in self.record["texts"][numbers].tolist():
            self.row_of.pop(digest, None)

    def cut(self, n_bytes: int) -> list[Chunk]:
        """Cut into chunks of at most so many bytes of rows, or of one row."""
        digests, step = list(self.row_of), max(1, n_bytes // self.row_bytes)
        if len(digests) <= step:
            return [self]
        parts = []
        for start in range(0, len(digests), step):
            part = Chunk.blank(self.about, digests[start : start + step])
            part.rows[...] = self.rows[start : start + step]
            parts.append(part.seal())
        return parts


def merge(chunks: Sequence[Chunk], where: object) -> Chunk | None:
    """Merge the undamaged rows of chunks of one layout, each text once; None if there are none."""
    at = {text: (i, row) for i, chunk in enumerate(chunks) for text, row in chunk.row_of.items()}
    if not at:
        return None
    owners, rows = np.array(list(at.values())).T
    merged = Chunk.blank(chunks[-1].about, list(at))
    sound = np.empty(len(rows), bool)
    for i, chunk in enumerate(chunks):
        members = np.flatnonzero(owners == i)
        for piece in pieces(len(members), chunk.row_bytes):
            to = members[piece]
            values = np.empty((len(to), chunk.rows.shape[1]), chunk.rows.dtype)
            sound[to] = chunk.take(rows[to], values)
            merged.rows[to] = values
    if sound.all():
        return merged.seal()
    warn_of_damage(int((~sound).sum()), where)
    for i, chunk in enumerate(chunks):
        chunk.forget(rows[~sound & (owners == i)])
    return merge(chunks, where)


def warn_of_damage(n_texts: int, where: object) -> None:
    """Warn of rows that do not match their checksums."""
    warn(
        f"The activations of {n_texts} texts in {where} are damaged; what is missing will be "
        "computed again."
    )


@lru_cache(maxsize=64)
def _record_type(n_about: int, n_texts: int, n_columns: int, dtype: str) -> np.dtype:
    texts = [("texts", "V16", (n_texts,)), ("checksums", "<u8", (n_texts,))]
    rows = ("rows", DTYPES[dtype], (n_texts, n_columns))
    return np.dtype([("about", "u1", (n_about,)), *texts, rows])


def _checksums(rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, rows, seeds.tolist()), np.uint64, len(rows))
