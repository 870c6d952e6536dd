"""Digests by content: of texts, of arrays, of names."""

from __future__ import annotations

import numpy as np
import xxhash


def text_digest(text: str) -> bytes:
    """Digest the exact code points of a text, lone surrogates included, into 16 bytes."""
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def array_digest(array: np.ndarray) -> bytes:
    """Digest shape, dtype and values of an array into 16 bytes; memory order does not count.

    Parameters
    ----------
    array : ndarray
        Of any numeric dtype, contiguous or not, a memory map too.
    """
    values = np.asarray(array)
    digest = xxhash.xxh3_128(f"{values.dtype.str}{values.shape}".encode())
    digest.update(np.ascontiguousarray(values).data.cast("B"))
    return digest.digest()
