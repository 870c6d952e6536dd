"""Activations in a folder, shared by processes."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from skspin._digest import text_digest
from skspin._layout import Layout, Segment

_TABLES = """
CREATE TABLE IF NOT EXISTS rows (key TEXT, text BLOB, row BLOB, PRIMARY KEY (key, text));
CREATE TABLE IF NOT EXISTS cards (name TEXT PRIMARY KEY, document TEXT);
"""


class DiskStore:
    """Activations and cards in a folder."""

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self._path = os.path.join(folder, "activations.sqlite")
        with closing(self._connect()) as connection:
            connection.executescript(_TABLES)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=60)
        connection.execute("PRAGMA journal_mode=WAL")
        return connection

    def read(
        self, context: str, texts: Sequence[str], segments: Sequence[Segment], out: np.ndarray
    ) -> np.ndarray:
        """Fill ``out`` with what is there and say what that was."""
        found = np.zeros((len(texts), len(segments)), dtype=bool)
        slices = Layout(tuple(segments)).slices
        with closing(self._connect()) as connection:
            for i, text in enumerate(texts):
                for j, (segment, columns) in enumerate(zip(segments, slices, strict=True)):
                    row = connection.execute(
                        "SELECT row FROM rows WHERE key = ? AND text = ?",
                        (f"{context}\n{segment.key}", text_digest(text)),
                    ).fetchone()
                    if row is not None:
                        kept = slice(None) if segment.neurons is None else list(segment.neurons)
                        out[i, columns] = np.frombuffer(row[0], np.float32)[kept]
                        found[i, j] = True
        return found

    def write(
        self,
        context: str,
        texts: Sequence[str],
        segments: Sequence[Segment],
        rows: np.ndarray,
        *,
        model: str = "",
    ) -> None:
        """Keep a copy of the rows."""
        slices = Layout(tuple(segments)).slices
        with closing(self._connect()) as connection, connection:
            connection.executemany(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)",
                (
                    (f"{context}\n{segment.key}", text_digest(text), row[columns].tobytes())
                    for text, row in zip(texts, rows, strict=True)
                    for segment, columns in zip(segments, slices, strict=True)
                    if segment.neurons is None
                ),
            )

    def get_card(self, name: str) -> Any:
        """Return the JSON document of this name, or None."""
        with closing(self._connect()) as connection:
            row = connection.execute(
                "SELECT document FROM cards WHERE name = ?", (name,)
            ).fetchone()
        return None if row is None else json.loads(row[0])

    def put_card(self, name: str, document: Any) -> None:
        """Keep a JSON document under a name."""
        with closing(self._connect()) as connection, connection:
            connection.execute(
                "INSERT OR REPLACE INTO cards VALUES (?, ?)", (name, json.dumps(document))
            )
