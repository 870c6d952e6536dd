"""Small JSON documents by name, each in a file of its own."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from skspin._store.digest import text_digest


class Cards:
    """Documents in a folder, shared by processes.

    Parameters
    ----------
    folder : Path
        Holds nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, name: str) -> Path:
        return self._folder / f"{text_digest(name).hex()}.json"

    def get(self, name: str) -> Any:
        """Return a document; None if there is none.

        Raises
        ------
        ValueError
            If the file is damaged.
        """
        try:
            record = json.loads(self._path(name).read_bytes())
            text, checksum = json.dumps(record["document"]), record["checksum"]
        except FileNotFoundError:
            return None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self._path(name)} is no card.") from error
        if record.get("name") != name or text_digest(text).hex() != checksum:
            raise ValueError(f"{self._path(name)} does not match its checksum.")
        return record["document"]

    def put(self, name: str, document: Any) -> None:
        """Write a document; readers see the one before or this one, never a half."""
        checksum = text_digest(json.dumps(document)).hex()
        record = {"name": name, "document": document, "checksum": checksum}
        descriptor, path = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
        try:
            with open(descriptor, "w") as file:
                json.dump(record, file)
            os.replace(path, self._path(name))
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise

    def clear(self) -> None:
        """Remove all documents."""
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)
