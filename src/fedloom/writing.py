"""Files that are written whole or not at all, and disks that don't take them. No torch here."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedloom.errors import RunError
from fedloom.failpoints import failpoint

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
