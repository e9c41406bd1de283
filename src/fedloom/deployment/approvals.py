"""Approvals: the clients whose keys a server takes, since when, until when, and when each was there. No torch here.

An approval is one file, written whole or not at all: the client's public key as OpenSSH has it, and behind it, where
OpenSSH has a comment, its dates. One without dates is from before approvals had an end, and has none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedloom.deployment.fingerprints import identify_client
from fedloom.errors import DeploymentError
from fedloom.host.files import Lock, flush, replace_file, writing

CLIENTS, REVOKED, SEEN = "clients", "revoked", "seen"
"""Folders of a server's: keys that it takes, keys that it took, and a file by each client's name."""
CLIENT_DAYS = 365
"""Days for which a client's key is taken, unless somebody says otherwise."""
CHANGE_SECONDS = 20.0
"""Time for which a change of the list waits for another one, which takes a moment."""
WARN_DAYS = 30
"""Days before an end from which on it is warned of."""
STAMP = "%Y%m%d-%H%M%S"
"""Time, UTC, in the name of a key that is taken no longer."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Name of a client."""
KEY = re.compile(r"ecdsa-sha2-nistp384 [A-Za-z0-9+/]{182}==")
"""Public key of the one kind that is taken, as OpenSSH has it: whole, for one that was cut would have no end either."""
MOST_LETTERS = 2**16
"""Letters of a file with a client's key that are read."""
REVOKED_NAME = re.compile(r"(.+)-(\d{8}-\d{6})")


@dataclass(frozen=True)
class Approval:
    """Client's key that a server takes, or took."""

    name: str
    key: str
    """Public key, as OpenSSH has it, without a comment."""
    since: datetime | None = None
    expires: datetime | None = None
    """End; one without is from before approvals had an end, and is taken until it is revoked."""
    revoked: datetime | None = None

    @property
    def fingerprint(self) -> str:
        return identify_client(self.name, self.key)

    @property
    def state(self) -> str:
        """State of the key now: `approved`, `expired` or `revoked`."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires and self.expires <= datetime.now(UTC) else "approved"

    def describe_end(self) -> str:
        """Say that the end is near or was, and what to do; nothing while there is time."""
        mend = f"fedloom provision renew {self.name}"
        if self.expires is None:
            return ""
        if self.state == "expired":
            return f"{self.name}'s key is taken no longer: its approval ended on {self.expires:%Y-%m-%d} ({mend})"
        warning = warn_of(self.expires, mend)
        return warning and f"{self.name}'s key is taken until {self.expires:%Y-%m-%d}{warning}"


def warn_of(end: datetime, mend: str) -> str:
    """Return a warning to stand behind the date of an end; nothing while more than 30 days are left."""
    left = (end - datetime.now(UTC)).days
    if left < 0:
        return f": THAT IS OVER ({mend})"
    return f": ONLY {left} {'DAY' if left == 1 else 'DAYS'} LEFT ({mend})" if left < WARN_DAYS else ""


def read_approval(file: Path) -> Approval:
    """Read one approval, of a client whose key is taken or was.

    Raises:
        FileNotFoundError: it was revoked just now.
        DeploymentError: it can't be read.
    """
    name, revoked = file.stem, None
    try:
        with file.open(encoding="utf-8") as opened:
            words = (text := opened.read(MOST_LETTERS + 1)).split()
        if file.parent.name == REVOKED and (found := REVOKED_NAME.fullmatch(name)):
            name, revoked = found[1], datetime.strptime(found[2], STAMP).replace(tzinfo=UTC)
        # Other words are a comment of somebody's own.
        told = dict(word.split("=", 1) for word in words[2:] if word.startswith(("since=", "expires=")))
        dates = {key: datetime.fromisoformat(value).astimezone(UTC) for key, value in told.items()}
        key = " ".join(words[:2])
        if not (NAME.fullmatch(name) and KEY.fullmatch(key)) or len(text) > MOST_LETTERS:
            raise ValueError(name)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        raise DeploymentError(
            "not an approval of fedloom provision approve",
            where=str(file),
            mend="bring it back from a backup, or remove it and approve the client's request again",
        ) from error
    return Approval(name, key, dates.get("since"), dates.get("expires"), revoked)


def write_approval(folder: Path, approval: Approval) -> None:
    """Write an approval over the one that its client had, in a server's folder.

    Raises:
        OSError: it can't be written; what was there before is still there.
    """
    dates = {"since": approval.since, "expires": approval.expires}
    words = [approval.key, *(f"{key}={format_time(date)}" for key, date in dates.items() if date)]
    # Others may read it, and nobody else change it.
    replace_file(folder / CLIENTS / f"{approval.name}.pub", (" ".join(words) + "\n").encode(), rights=0o644)


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Be the only one that changes a server's list of clients, until the block ends, and have it on the disk then.

    Of two commands that read it and write it again, the later one would undo what the earlier one did: a renewal would
    bring back a key that was revoked meanwhile.

    Raises:
        DeploymentError: another one is at it, for longer than any takes.
        RunError: it can't be written.
    """
    until = time.monotonic() + CHANGE_SECONDS
    with ExitStack() as stack, writing(folder, "run it again"):
        while True:
            try:
                stack.enter_context(Lock(folder / "server.toml", rights=None))
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise DeploymentError(
                        "another fedloom provision is changing the list of clients",
                        where=str(folder),
                        mend="wait for its end, or end it",
                    ) from None
                time.sleep(0.02)
        yield
        for part in filter(Path.is_dir, (folder / CLIENTS, folder / REVOKED)):
            flush(part)


def format_time(moment: datetime) -> str:
    """Write a time as files have it: UTC, to the second."""
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def list_approvals(folder: Path) -> dict[str, Approval]:
    """Return the approvals in a server's folder that were not revoked, by their clients' names; expired ones too.

    Raises:
        DeploymentError: one can't be read.
    """
    return {approval.name: approval for approval in _read_all(folder / CLIENTS)}


def list_revoked(folder: Path) -> list[Approval]:
    """Return the approvals that were revoked, or whose keys another took the place of, by name and time.

    Raises:
        DeploymentError: one can't be read.
    """
    return sorted(_read_all(folder / REVOKED), key=lambda approval: (approval.name, str(approval.revoked)))


def _read_all(folder: Path) -> Iterator[Approval]:
    for file in sorted(folder.glob("*.pub")):
        with suppress(FileNotFoundError):  # revoked just now
            yield read_approval(file)


def revoked_file(folder: Path, name: str) -> Path:
    """Return where a client's key goes that is taken no longer from now on, and make its folder."""
    (folder / REVOKED).mkdir(exist_ok=True)
    return folder / REVOKED / f"{name}-{datetime.now(UTC):{STAMP}}.pub"


def note_seen(folder: Path, names: Iterable[str]) -> None:
    """Note in a server's folder that these clients are there now.

    Raises:
        OSError: it can't be written.
    """
    (folder / SEEN).mkdir(exist_ok=True)
    for name in names:
        (folder / SEEN / name).touch(0o600)


def last_seen(folder: Path, name: str) -> datetime | None:
    """Return when a client was last connected, to the minute; None where it never was, or nobody noted it."""
    try:
        return datetime.fromtimestamp((folder / SEEN / name).stat().st_mtime, UTC)
    except OSError:
        return None
