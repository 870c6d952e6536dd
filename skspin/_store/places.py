"""What a folder says of its shelves: their names, their size, and when they were last used."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_FILE = re.compile(r"(?P<name>\d{8,}-[0-9a-f]{8})\.(texts|rows|new)")


@dataclass
class Place:
    """The files of a shelf, their bytes, and when it was last used, in nanoseconds."""

    paths: list[Path] = field(default_factory=list)
    size: int = 0
    last_use: int = 0


def places_in(folder: Path) -> dict[str, Place]:
    """List what is there by name, whoever put it there."""
    places: defaultdict[str, Place] = defaultdict(Place)
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _FILE.fullmatch(entry.name)
            with suppress(FileNotFoundError):  # another process has just removed it
                if match:
                    status, place = entry.stat(), places[match["name"]]
                    place.paths.append(Path(entry.path))
                    place.size += status.st_size
                    place.last_use = max(place.last_use, status.st_mtime_ns)
    return dict(places)


def new_name(names: Iterable[str]) -> str:
    """Make up a name that sorts after all others and that nobody else makes up."""
    number = 1 + max((int(name.split("-")[0]) for name in names), default=0)
    return f"{number:08}-{uuid.uuid4().hex[:8]}"


def note_use(folder: Path, used: set[str], places: dict[str, Place]) -> None:
    """Set the time of shelves' files to when they were last used.

    It is always later than that of all others, even if the machine's clock was set back.
    """
    latest = max((place.last_use for place in places.values()), default=0)
    others = max((places[name].last_use for name in places.keys() - used), default=0)
    if all(name in places and places[name].last_use > others for name in used):
        return
    now = max(time.time_ns(), latest + 1)
    for name in used:
        with suppress(OSError):  # removed, or somebody else's
            os.utime(folder / f"{name}.texts", ns=(now, now))
