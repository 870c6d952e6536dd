"""Where chunks and metadata live: in the memory of one process, or in a folder that many share."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import OrderedDict
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from numpy.lib import format as npy

from skspin._store.chunk import Chunk, digest_of
from skspin._system import warn

# Each version of the format, or of what is read of a model, has a folder of its own, side by side.
FORMAT = 4
_CHUNK = re.compile(r"[0-9a-f]{32}(-[0-9a-f]{16}){2}\.npy")
_METADATA = re.compile(r"[0-9a-f]{32}\.json")
_SMALL_BYTES = 1 << 16  # of a new chunk that stays in memory, and is not mapped from its file
# Windows does not remove a file that a process has mapped.
_CANNOT_REMOVE = (FileNotFoundError, *([PermissionError] if os.name == "nt" else []))
# Of the index, which a test measures: objects; and a digest, a number, their slots in a dict.
_BYTES_PER_CHUNK, _BYTES_PER_TEXT = 1700, 200


class Memory:
    """Chunks by name. Threads may share it, because each step is one operation on a dict."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._chunks: OrderedDict[str, Chunk] = OrderedDict()  # used longest ago first

    def __str__(self) -> str:
        """Return a name, for messages."""
        return "memory"

    def _do_nothing(self, *_: str) -> Any:
        """Do nothing: memory needs no set-up, and no other process writes to it or reads it."""

    make = refresh = read_metadata = write_metadata = clear_metadata = _do_nothing

    def chunks(self, prefix: str) -> list[Chunk]:
        """List the chunks whose names begin with ``prefix``."""
        chunks = list(self._chunks.items())
        return [chunk for name, chunk in chunks if name.startswith(prefix)]

    def sizes(self) -> dict[str, int]:
        """Give the bytes of each chunk by name, used longest ago first."""
        return {name: self.size_of(chunk) for name, chunk in list(self._chunks.items())}

    def size_of(self, chunk: Chunk) -> int:
        """Count the bytes that a chunk takes here."""
        return chunk.record.nbytes + _BYTES_PER_CHUNK + _BYTES_PER_TEXT * len(chunk.rows)

    def put(self, chunk: Chunk) -> None:
        """Add a chunk, as the one used last."""
        self._chunks[chunk.name] = chunk

    def remove(self, name: str) -> None:
        """Remove a chunk, if it is there."""
        self._chunks.pop(name, None)

    def touch(self, chunk: Chunk) -> bool:
        """Mark a chunk as used, and return that it is whole."""
        with suppress(KeyError):  # another thread has removed it
            self._chunks.move_to_end(chunk.name)
        return True


class Folder:
    """Chunks and metadata, each a file that is written under another name and renamed whole.

    So no chunk is ever half written, and no lock is needed: a file that is removed while it is read
    stays mapped. A writer that is killed leaves a ``.tmp`` file, which counts towards the limit and
    is evicted as a chunk is.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._home = self._path / f"skspin-{FORMAT}"
        self._files, self._metadata = self._home / "chunks", self._home / "metadata"
        self._chunks: dict[str, Chunk] = {}  # those that were opened, by name
        self._damaged: set[str] = set()  # names
        self._latest_use = 0

    def __str__(self) -> str:
        """Return the path, for messages."""
        return str(self._path)

    @property
    def state(self) -> tuple[bool, bool]:
        """Whether the folder exists, and the one for chunks in it."""
        return self._path.is_dir(), self._files.is_dir()

    def make(self) -> None:
        """Make the folder, readable by its owner alone, if it is not there."""
        for folder in (self._path, self._home, self._files, self._metadata):
            os.makedirs(folder, mode=0o700, exist_ok=True)

    def refresh(self, prefix: str) -> None:
        """Learn which chunks there are, and open those whose names begin with ``prefix``."""
        for _ in range(5):
            known = set(self._chunks)
            names = {name for name in os.listdir(self._files) if _CHUNK.fullmatch(name)}
            new = [name for name in names - known - self._damaged if name.startswith(prefix)]
            all_there = all([self._open(name) for name in new])
            for name in known - names:
                self._chunks.pop(name, None)
            if all_there and known <= names:
                break  # otherwise another process may have merged chunks: look for the result

    def chunks(self, prefix: str) -> list[Chunk]:
        """List the known chunks whose names begin with ``prefix``."""
        # Those that another thread or process removes from now on can still be read.
        return [chunk for name, chunk in list(self._chunks.items()) if name.startswith(prefix)]

    def _open(self, name: str) -> bool:
        """Map a chunk into memory; False if it has just been removed."""
        path = self._files / name
        try:
            record = np.load(path, mmap_mode="r", allow_pickle=False)
            if os.path.getsize(path) != record.offset + record.nbytes:
                raise ValueError("it was cut off or has grown")
            self._chunks[name] = Chunk(record, name)
        except FileNotFoundError:
            return False
        except OSError:
            raise
        except Exception as error:  # NumPy may raise anything at a damaged header
            self._give_up(name, error)
        return True

    def _give_up(self, name: str, trouble: object) -> None:
        """Warn of a damaged file, remove it if possible, and never open it again."""
        warn(
            f"{self._files / name} is damaged ({trouble}). What is missing will be computed again."
        )
        self._damaged.add(name)
        with suppress(OSError):
            self.remove(name)

    def sizes(self) -> dict[str, int]:
        """Give the bytes of each file, of unfinished ones too, used longest ago first."""
        used = []
        with os.scandir(self._files) as files:
            for file in files:
                if _CHUNK.fullmatch(file.name.removesuffix(".tmp")):
                    with suppress(FileNotFoundError):  # another process has just removed it
                        status = file.stat()
                        used.append((status.st_mtime_ns, file.name, status.st_size))
        self._latest_use = max([self._latest_use, *(time for time, _, _ in used)])
        return {name: n_bytes for _, name, n_bytes in sorted(used)}

    def size_of(self, chunk: Chunk) -> int:
        """Count the bytes that a chunk takes here."""
        record = chunk.record
        start = record.offset if isinstance(record, np.memmap) else len(_header(record.dtype))
        return start + record.nbytes

    def put(self, chunk: Chunk) -> None:
        """Write a chunk, as the one used last."""
        content = _header(chunk.record.dtype), chunk.record.reshape(1).view(np.uint8).data
        _write_whole(self._files / chunk.name, f"{chunk.name}.tmp", *content)
        self.touch(chunk)
        if chunk.record.nbytes <= _SMALL_BYTES:
            self._chunks[chunk.name] = chunk
        else:  # from now on the system decides how long its rows stay in memory
            self._open(chunk.name)

    def remove(self, name: str) -> None:
        """Remove a chunk, if it is there."""
        self._chunks.pop(name, None)
        with suppress(*_CANNOT_REMOVE):
            os.unlink(self._files / name)

    def touch(self, chunk: Chunk) -> bool:
        """Mark a chunk as used, by its file's time, and return whether the file is whole.

        The time is later than that of all other files, even if the machine's clock was set back.
        """
        path = self._files / chunk.name
        with suppress(OSError):  # removed, or owned by another user
            status = os.stat(path)
            if status.st_size != self.size_of(chunk):
                self._give_up(chunk.name, "it was cut off or has grown")
                return False
            self._latest_use = max(time.time_ns(), self._latest_use + 1, status.st_mtime_ns)
            os.utime(path, ns=(self._latest_use, self._latest_use))
        return True

    @property
    def limit(self) -> int:
        """Bound in bytes, a quarter of the disk unless assigned; kept here for all processes."""
        limit = _read_json(self._home / "limit.json", "limit")
        return shutil.disk_usage(self._path).total // 4 if limit is None else int(limit)

    @limit.setter
    def limit(self, limit: int) -> None:
        _write_json(self._home / "limit.json", "limit", str(limit))

    def read_metadata(self, name: str) -> str | None:
        """Return a JSON text by its name; None if it is not there."""
        return _read_json(self._metadata / f"{digest_of(name)}.json", name)

    def write_metadata(self, name: str, text: str) -> None:
        """Keep a JSON text under a name."""
        _write_json(self._metadata / f"{digest_of(name)}.json", name, text)

    def clear_metadata(self) -> None:
        """Remove all metadata."""
        for path in self._metadata.iterdir():
            if _METADATA.match(path.name):  # unfinished files too
                path.unlink(missing_ok=True)


@lru_cache(maxsize=64)
def _header(record_type: np.dtype) -> bytes:
    file = BytesIO()
    description = {"descr": npy.dtype_to_descr(record_type), "fortran_order": False, "shape": ()}
    npy.write_array_header_1_0(file, description)
    return file.getvalue()


def _write_whole(path: Path, temporary: str, *contents: bytes | memoryview) -> None:
    unnamed = path.with_name(temporary)
    try:
        with open(unnamed, "xb") as file:
            for content in contents:
                file.write(content)
        with suppress(FileNotFoundError):  # removed by another process that makes room
            os.replace(unnamed, path)
    except BaseException:  # a full disk, or Ctrl-C
        with suppress(OSError):
            os.unlink(unnamed)
        raise


def _write_json(path: Path, name: str, text: str) -> None:
    record = {"name": name, "value": text, "checksum": digest_of(json.dumps([name, text]))}
    _write_whole(path, f"{path.name}.{token_hex(8)}.tmp", json.dumps(record).encode())


def _read_json(path: Path, name: str) -> str | None:
    """Return the JSON text in a file; None if there is none, or, with a warning, a damaged one."""
    try:
        record = json.loads(path.read_bytes())
        checksum = digest_of(json.dumps([name, record["value"]]))
        if record["name"] == name and record["checksum"] == checksum:
            return record["value"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    warn(f"{path} is damaged. It will be made again.")
    return None
