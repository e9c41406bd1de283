"""Answer to the last round with noise, on disk before it leaves: asked for again, it is the same bytes.

Trained anew it could differ in its rounding, as on another machine, and the difference of two answers with the same
noise would be the documents' own.
"""

from __future__ import annotations

from pathlib import Path

from fedloom.deployment.client.journal import ELSEWHERE, hash_task
from fedloom.errors import DeploymentError
from fedloom.host.failpoints import failpoint
from fedloom.host.files import flush, hash_pieces, replace_file
from fedloom.host.frames import Frame, pack_head, unpack_frame


def answer_path(journal: Path) -> Path:
    """Return where the last answer of a client lies: beside its journal."""
    return journal.with_suffix(".answer")


def keep_answer(path: Path, asked: Frame, answer: Frame) -> None:
    """Write the answer to a question down, whole, in the place of the one before.

    Raises:
        DeploymentError: it can't be written.
    """
    whole = [pack_head(answer), answer.payload]
    kept = Frame({"task": hash_task(asked), "sha256": hash_pieces(whole)}, b"".join(whole))
    try:
        replace_file(path, pack_head(kept) + kept.payload, 0o600)
        flush(path)
        flush(path.parent)
    except OSError as error:
        raise DeploymentError(
            f"the answer can't be kept ({error.strerror}), and so does not leave", where=path.name, mend=ELSEWHERE
        ) from None
    failpoint("answer.written")


def find_answer(path: Path, asked: Frame) -> Frame | None:
    """Return the answer that was given to a question, where it is the last one; None where there is none.

    Raises:
        DeploymentError: it can't be read.
    """
    try:
        kept = unpack_frame(path.read_bytes()) if path.exists() else None
    except OSError as error:
        raise DeploymentError(
            f"the last answer can't be read ({error.strerror})", where=path.name, mend=ELSEWHERE
        ) from None
    if kept is None or kept.manifest != {"task": hash_task(asked), "sha256": hash_pieces([kept.payload])}:
        return None
    return unpack_frame(kept.payload)
