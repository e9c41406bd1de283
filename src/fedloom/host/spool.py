"""Spool of frames that wait for their turn: a few in memory, more on the disk. No torch here."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedloom.host.files import writing
from fedloom.host.frames import Frame

Key = TypeVar("Key", bound=Hashable)


class Spool(Generic[Key]):
    """Frames by their keys; numbers beyond `memory_bytes` lie in a file without a name, which ends with the process."""

    def __init__(self, folder: Path, memory_bytes: int = 1) -> None:
        self._folder = folder
        self._file = tempfile.SpooledTemporaryFile(max_size=memory_bytes, dir=str(folder))  # noqa: SIM115
        self._kept: dict[Key, tuple[Mapping[str, Any], int, int]] = {}
        self._free: dict[int, list[int]] = defaultdict(list)
        """Places of frames that were taken, by their length: the next one of that length is written there."""

    def __enter__(self) -> Spool[Key]:
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def put(self, key: Key, frame: Frame) -> None:
        """Keep a frame.

        Raises:
            RunError: it can't be written.
        """
        length, free = len(frame.payload), self._free[len(frame.payload)]
        with writing(self._folder):
            start = self._file.seek(free.pop()) if free else self._file.seek(0, 2)
            self._file.write(frame.payload)
            self._file.flush()
        self._kept[key] = frame.manifest, start, length

    def take(self, key: Key) -> Frame:
        """Read a frame that was kept, which is kept no longer."""
        manifest, start, length = self._kept.pop(key)
        self._free[length].append(start)
        self._file.seek(start)
        return Frame(manifest, self._file.read(length))
