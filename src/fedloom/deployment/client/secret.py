"""Secret of a client, by which it hashes what is its own: nobody else can compute the hash of a text that they guess.

A server has to know that a client's documents, or its part of an adapter, are the same as before, and no more.
"""

from __future__ import annotations

import hmac
import secrets
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from fedloom.errors import DeploymentError
from fedloom.host.files import write_private

SECRET_BYTES = 32


def secret_path(journal: Path) -> Path:
    """Return where a client's secret lies: beside its journal."""
    return journal.with_suffix(".secret")


def read_secret(path: Path) -> bytes:
    """Return the secret in a file, which is made at first use, for its owner's eyes alone.

    Raises:
        DeploymentError: it can't be read or made, others can read it, or it is none.
    """
    try:
        with suppress(FileExistsError):
            write_private(path, secrets.token_bytes(SECRET_BYTES))
    except OSError as error:
        raise _not_kept(path, error) from None
    return check_secret(path)


def check_secret(path: Path) -> bytes:
    """Return the secret in a file that is there.

    Raises:
        DeploymentError: it can't be read, others can read it, or it is none.
    """
    try:
        rights, secret = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise _not_kept(path, error) from None
    if rights & 0o077:
        raise DeploymentError("the secret can be read by others", where=path.name, mend=f"chmod 600 {path.name}")
    if len(secret) != SECRET_BYTES:
        raise DeploymentError(
            "not a secret", where=path.name, mend="remove the file: the server will take this for another client"
        )
    return secret


def _not_kept(path: Path, error: OSError) -> DeploymentError:
    return DeploymentError(
        f"the secret can't be kept ({error.strerror})",
        where=path.name,
        mend="choose a place for it and the journal with fedloom join --journal FILE",
    )


def keyed_hash(secret: bytes, *parts: str) -> str:
    """Return the HMAC-SHA256 of what is a client's own, 64 hexadecimal digits.

    `parts` are hashes of its documents, or of its part of an adapter, and of all that they belong to: one recipe's
    value says nothing of another's.
    """
    return hmac.new(secret, "\n".join(parts).encode(), sha256).hexdigest()
