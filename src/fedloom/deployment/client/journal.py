"""Journal of the rounds that a client trained in: its owner's record of what was asked, by which rounds are counted.

One line of JSON a round, on disk before training begins, so that no crash hides one. It holds no text and no paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedloom.deployment.frames import Frame
from fedloom.errors import DeploymentError, RecipeError
from fedloom.host.files import hash_pieces

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Journal:
    """File of rounds to which one process appends."""

    path: Path

    def check(self) -> None:
        """Refuse a journal that can't be read and written, before anything depends on it.

        Raises:
            DeploymentError
        """
        self._read()
        self._append(b"")

    def note(self, task: str, told: Mapping[str, Any], *, at_most: int | None = None) -> None:
        """Write down a round that is about to begin, whose task has this hash (`hash_task`).

        The same task asked again, as after a crash, is another line and the same round.

        Raises:
            RecipeError: there were `at_most` others in the past 24 hours.
            DeploymentError: the journal can't be kept.
        """
        now = datetime.now(UTC)
        begun = {known: when for when, known in self._read() if when > now - DAY}
        if at_most is not None and task not in begun and len(begun) >= at_most:
            free = sorted(begun.values())[-at_most] + DAY
            raise RecipeError(
                f"its policy allows {at_most} rounds a day; the next may begin on {free:%Y-%m-%d at %H:%M:%S} UTC",
                where="policy.max_rounds_a_day",
            )
        line = json.dumps({"when": now.isoformat(timespec="seconds"), **told, "task": task})
        self._append(line.encode() + b"\n")

    def give_up(self, task: str) -> None:
        """Write down that a round which had begun was given up: nothing came of it, so it does not count.

        Raises:
            DeploymentError: the journal can't be kept.
        """
        line = json.dumps({"when": datetime.now(UTC).isoformat(timespec="seconds"), "given_up": True, "task": task})
        self._append(line.encode() + b"\n")

    def _read(self) -> list[tuple[datetime, str]]:
        """List when each round began that was not given up, and the hash of its task."""
        with self._explained("read"):
            content = self.path.read_bytes() if self.path.exists() else b""
        found: list[tuple[datetime, str]] = []
        # What has no end was cut off while it was written: no round began.
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                told = json.loads(line)
                when, task = datetime.fromisoformat(told["when"]).astimezone(UTC), str(told["task"])
                given_up = told.get("given_up", False)
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
                raise DeploymentError(
                    f"line {number} is not a round",
                    where=self.path.name,
                    mend="mend the line, or put the file elsewhere",
                ) from None
            if given_up:
                # The last beginning alone: one before it may have been answered.
                begun = (place for place in reversed(range(len(found))) if found[place][1] == task)
                if (last := next(begun, None)) is not None:
                    del found[last]
            else:
                found.append((when, task))
        return found

    def _append(self, line: bytes) -> None:
        with self._explained("written"):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "r+b") as file:
                # A line that was cut off by a crash would spoil the next one.
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        """Turn errors of the system into one that names the file but not its folder: the server hears it too."""
        try:
            yield
        except OSError as error:
            raise DeploymentError(
                f"the journal of rounds can't be {done} ({error.strerror})",
                where=self.path.name,
                mend="choose a place for it with fedloom join --journal FILE",
            ) from None


def hash_task(asked: Frame) -> str:
    """Return the SHA-256 of all that a training depends on. The same task twice tells a server nothing new."""
    told = {key: value for key, value in asked.manifest.items() if key != "judge"}
    return hash_pieces([json.dumps(told, sort_keys=True).encode(), asked.payload])
