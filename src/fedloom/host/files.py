"""Files and folders that are written whole or not at all, disks that don't take them, locks and hashes. No torch here.

What is written gets another name first, in the same folder, and takes its own by a rename: no reader sees half of it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import random
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError

from fedloom.errors import RunError
from fedloom.host.failpoints import failpoint
from fedloom.text import quote_path

GO_ON = "go on with fedloom run --resume: the rounds that were complete are kept"
LOCK = ".lock"
FIRST = dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "see that it may be written")
IN_PLACE = (errno.ELOOP, errno.EISDIR, errno.EEXIST, errno.ENXIO, errno.EINVAL)
"""Numbers of errors where something else is in a file's place: a link, a folder, a pipe."""
FIRST |= dict.fromkeys(IN_PLACE, "move what is in its place away")
"""What to do first where a file can't be written, by the number of the error; for others there is no room."""
ASKED_SECONDS = 5.0
"""Time that a lock is waited for while others only ask who holds it, which takes each of them a moment."""

Moment = Literal["written", "between", "renamed"]
"""Failpoints in the replacing of a folder: before anything has changed, with neither of both in place, and after it."""


def path(text: str) -> Path:
    """Return a path as a person types it: `~` stands for a home folder, in quotation marks and behind `=` too.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"no home folder for {text}") from None


# Writing


@contextmanager
def writing(path: Path, mend: str = GO_ON) -> Iterator[None]:
    """Turn a full disk, and whatever else keeps a file from being written, into an error that says how to go on.

    Raises:
        RunError
    """
    try:
        failpoint("file.write")
        yield
    except (OSError, SafetensorError) as error:
        why, first = _reason(error), "make room for it"
        first = FIRST.get(error.errno or 0, first) if isinstance(error, OSError) else first
        raise RunError(f"can't be written ({why})", where=str(path), mend=f"{first}, and {mend}") from error


def _reason(error: OSError | SafetensorError) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    found = re.search(r"I/O error: (.+?) \(os error", str(error))
    return found[1] if found else type(error).__name__


def open_own(path: str | Path, flags: int, rights: int = 0o666) -> int:
    """Open a file of a folder: not one elsewhere that a link in its place leads to, nor a pipe that lets wait."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, rights)


def replace_file(path: Path, content: bytes, rights: int = 0o666, *, durable: bool = False) -> None:
    """Write a file whole or not at all; of the rights to it, the umask takes away.

    A `durable` one is on the disk before it gets its name, and its name before this ends.

    Raises:
        OSError: it can't be written; what was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: open_own(name, flags, rights)) as file:
            file.write(content)
        if durable:
            flush(temporary)
        failpoint("file.written")
        temporary.replace(path)
        if durable:
            flush(path.parent)
    except OSError:
        with suppress(OSError):  # half a file takes room that there is none of
            temporary.unlink(missing_ok=True)
        raise


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that is readable by its owner alone from the first moment on, and have it on the disk.

    Raises:
        OSError: it is there, or can't be written: then nothing of it is left, which would be taken for a key.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink()
        raise


def write_text(path: Path, text: str, mend: str = GO_ON) -> None:
    """Write a text whole or not at all.

    Raises:
        RunError: it can't be written.
    """
    with writing(path, mend):
        replace_file(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all.

    Raises:
        RunError: it can't be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def replace_folder(
    folder: Path,
    *,
    existing: Literal["replace", "keep", "refuse"] = "replace",
    durable: bool = False,
    failpoints: Mapping[Moment, str] = MappingProxyType({}),
) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` at the end, whole or not at all.

    A folder that is there at that moment is replaced, or kept, and the new one dropped, or refused. A `durable` one is
    on the disk before it gets its name, and its name before this ends. `failpoints` are passed where a kill has
    something to show.

    Raises:
        OSError: it can't be written, or is there and refused; what was there before is still there.
    """

    def come_by(moment: Moment) -> None:
        if name := failpoints.get(moment):
            failpoint(name)

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()  # not mkdtemp, which makes folders for their owner alone: the umask says who may read this one
    try:
        yield temporary
        if durable:
            for path in (*temporary.iterdir(), temporary):
                flush(path)
        come_by("written")
        if folder.exists():
            if existing == "keep":
                return
            if existing == "refuse":
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
            folder.rename(temporary / "replaced")
        try:
            come_by("between")
            temporary.rename(folder)
        except BaseException as error:
            if (temporary / "replaced").exists():
                (temporary / "replaced").rename(folder)
            # Another process may have made it since: of two that make the same, the first is kept.
            if not (existing == "keep" and isinstance(error, OSError) and folder.is_dir()):
                raise
        if durable:
            flush(folder.parent)
        come_by("renamed")
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a temporary path whose file becomes `path` at the end, whole or not at all.

    Raises:
        OSError: it can't be written, or is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary / path.name
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        (temporary / path.name).rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill leaves all of it or nothing under its name."""
    doomed = folder.with_name(f".{folder.name}.tmp")
    if doomed.exists():
        shutil.rmtree(doomed)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for path in [*folder.glob(".*")] if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Locks


class Lock:
    """A file that one process holds locked until it closes it or ends, however it ends: the kernel lets go.

    Raises:
        BlockingIOError: another one holds it.
        OSError: it can't be opened; with `rights` None it must be there, otherwise it is made with these.
    """

    def __init__(self, path: Path, rights: int | None = 0o666) -> None:
        self._descriptor = open_own(path, os.O_RDWR | (os.O_CREAT if rights is not None else 0), rights or 0)
        try:
            self._take()
        except OSError:
            self.close()
            raise

    def _take(self) -> None:
        """Lock the file for this process alone; wait for those that only ask, as `is_held` does, and for nobody else.

        Raises:
            BlockingIOError: another one holds it.
        """
        until = time.monotonic() + ASKED_SECONDS
        while True:
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Beside who holds it, a shared lock is refused too; beside those that ask, it is not.
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                if time.monotonic() > until:
                    raise
            time.sleep(random.uniform(0.001, 0.01))  # of two that begin together, each may have met the other's try

    def sign(self, work: str = "") -> None:
        """Say in the file who holds it, and in a second line what for; `read_holder` reads that."""
        os.truncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {platform.node()}\n{work}".encode())

    def close(self) -> None:
        """Let go."""
        os.close(self._descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Holder(NamedTuple):
    """Process that holds a lock, as it signed it; empty texts where it has not yet."""

    who: str
    work: str


def read_holder(path: Path) -> Holder:
    """Read who holds a lock that could not be had."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace", opener=open_own) as file:
        who, _, work = file.read(4200).partition("\n")
        return Holder(who.strip(), work.strip())
    return Holder("", "")


def take_lock(folder: Path) -> Lock:
    """Be the only one that writes a run directory, until the lock is closed or the process ends.

    Raises:
        RunError: another process is.
    """
    path = folder / LOCK
    with writing(path):
        try:
            lock = Lock(path)
        except BlockingIOError:
            raise RunError(
                f"another run is at work in it ({read_holder(path).who})",
                where=str(folder),
                mend=f"wait for its end, or end it: fedloom stop {quote_path(folder)}",
            ) from None
        try:
            lock.sign()
        except OSError:
            lock.close()
            raise
    return lock


def find_holder(folder: Path) -> str:
    """Return who writes a run directory, as `take_lock` would say it; empty where nobody does."""
    lock = folder / LOCK
    return (read_holder(lock).who or "another process") if is_held(lock) else ""


def is_held(path: Path) -> bool:
    """Return whether a process holds this lock; a file that is not there, nobody holds.

    Asking takes a shared lock for a moment, which `Lock` waits for: nobody is refused since somebody asked.
    """
    try:
        with open(path, "rb", opener=open_own) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# Hashes: SHA-256, in hexadecimal digits


def hash_pieces(pieces: Iterable[bytes | memoryview]) -> str:
    """Return the hash of pieces, one after the other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """Return the hash of a text in UTF-8."""
    return hash_pieces([text.encode()])


def hash_json(value: Any) -> str:
    """Return the hash of a value as JSON, whatever the order of its keys."""
    return hash_text(json.dumps(value, sort_keys=True))


def hash_file(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """Return the hash of each file; of a folder that is not there, none."""
    return {path.name: hash_file(path) for path in sorted(folder.glob("*")) if path.is_file()}


def hash_start(path: Path, size: int | None = None) -> hashlib._Hash:
    """Return the hash of a file, or of so many bytes of it, to go on with; of a file that is not there, of nothing."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            left = path.stat().st_size if size is None else size
            while left > 0 and (piece := file.read(min(left, 2**20))):
                digest.update(piece)
                left -= len(piece)
    return digest
