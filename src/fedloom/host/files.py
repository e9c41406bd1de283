"""Files that are written whole or not at all, and disks that don't take them. No torch here."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedloom.errors import RunError
from fedloom.host.failpoints import failpoint

GO_ON = "go on with fedloom run --resume: the rounds that were complete are kept"


def write_text(path: Path, text: str, mend: str = GO_ON) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, mend):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError:
            with suppress(OSError):  # half a file takes room that there is none of
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path, mend: str = GO_ON) -> Iterator[None]:
    """A full disk, and whatever else keeps a file from being written, as an error that says how to go on.

    Raises:
        RunError
    """
    try:
        failpoint("file.write")
        yield
    except (OSError, SafetensorError) as error:
        why = _reason(error)
        closed = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        first = "see that it may be written" if closed else "make room for it"
        raise RunError(f"can't be written ({why})", where=str(path), mend=f"{first}, and {mend}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _reason(error: OSError | SafetensorError) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    found = re.search(r"I/O error: (.+?) \(os error", str(error))
    return found[1] if found else type(error).__name__


LOCK = ".lock"


def hash_start(path: Path, size: int | None = None) -> hashlib._Hash:
    """The SHA-256 of a file, or of so many bytes of it; of a file that is not there, of none."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            left = path.stat().st_size if size is None else size
            while left > 0 and (piece := file.read(min(left, 2**20))):
                digest.update(piece)
                left -= len(piece)
    return digest


def take_lock(folder: Path) -> int:
    """Be the only one that writes a run directory, until the descriptor is closed or the process ends.

    Raises:
        RunError: another process is.
    """
    path = folder / LOCK
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise RunError(f"another run is at work in it ({holder})", where=str(folder), mend="wait for its end") from None
    try:
        with writing(path):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    except RunError:
        os.close(descriptor)
        raise
    return descriptor


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for path in [*folder.glob(".*")] if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def hash_file(path: Path) -> str:
    """SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of each file; of a folder that is not there, none."""
    return {path.name: hash_file(path) for path in sorted(folder.glob("*")) if path.is_file()}


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the folder's place at the end, with the rights that the umask leaves."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o666 & ~_umask())
        temporary.chmod(0o777 & ~_umask())
        failpoint("adapter.written")
        if folder.exists():
            folder.rename(temporary / "replaced")
        try:
            failpoint("adapter.between")
            temporary.rename(folder)
        except BaseException:
            if (temporary / "replaced").exists():
                (temporary / "replaced").rename(folder)
            raise
        failpoint("adapter.renamed")
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
