"""Digests by content: 16 bytes for a text or an array, by xxHash's XXH3."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import xxhash

_CHUNK_BYTES = 1 << 18  # small enough that what was just gathered is hashed from the CPU's cache


def text_digest(text: str) -> bytes:
    """Digest the exact code points of a text, lone surrogates included, into 16 bytes."""
    return text_digests([text])[0]


def text_digests(texts: Iterable[str]) -> list[bytes]:
    """Digest each text; two spellings of one letter make two texts."""
    digest = xxhash.xxh3_128_digest
    return [digest(text.encode("utf-8", "surrogatepass")) for text in texts]


def array_digest(array: np.ndarray) -> bytes:
    """Digest the shape, dtype and values of an array.

    Nothing large is copied. Arrays of equal values get the same digest whether contiguous or cut
    out of a larger array; only the memory order of the axes makes a difference, because hashing a
    Fortran-ordered array row by row would be many times slower.

    Parameters
    ----------
    array : ndarray
        Of any dtype without Python objects; a memory map too.

    Returns
    -------
    bytes of length 16

    Raises
    ------
    TypeError
        If the array holds Python objects, whose bytes are mere addresses.
    """
    values = np.asarray(array)
    if values.dtype.hasobject:
        raise TypeError(
            f"An array of dtype {values.dtype} has no digest, since it holds Python objects. "
            "Convert it to a numeric or string dtype, e.g. y.astype(str)."
        )
    digest = xxhash.xxh3_128(f"{values.dtype.str}{values.shape}".encode())
    if values.ndim > 1 and abs(values.strides[0]) < abs(values.strides[-1]):
        digest.update(b"F")
        values = values.T
    values = np.atleast_1d(values)
    if values.flags.c_contiguous:
        digest.update(values.reshape(-1).view(np.uint8).data)
    else:
        row_bytes = values.dtype.itemsize * math.prod(values.shape[1:])
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        for start in range(0, len(values), step):
            chunk = np.ascontiguousarray(values[start : start + step])
            digest.update(chunk.reshape(-1).view(np.uint8).data)
    return digest.digest()
