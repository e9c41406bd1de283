"""Fingerprints of a server and of a client: two people compare them on the phone, so an exchanged key is noticed.

A kit and a request travel by mail or chat, where they can be exchanged; a voice that one knows can't.
"""

from __future__ import annotations

import re
import ssl
from hashlib import sha256

from fedloom.errors import DeploymentError

DIGITS, GROUP = 32, 4
"""Digits of a fingerprint, and how many are read in one breath: 128 bits, which nobody finds another key for."""


def identify_server(ca: str, signer: str) -> str:
    """Return the fingerprint of all that clients know a server by: its certificate authority, PEM, and the public key
    that signs its questions, in hexadecimal digits."""
    return fingerprint(authority=ssl.PEM_cert_to_DER_cert(ca), signer=bytes.fromhex(signer))


def identify_client(name: str, key: str) -> str:
    """Return the fingerprint of all that a server knows a client by: its name, and its public key as OpenSSH has it."""
    return fingerprint(name=name.encode(), key=key.encode())


def fingerprint(**parts: bytes) -> str:
    """Return the SHA-256 over named parts, cut to `DIGITS`, in groups that can be read aloud."""
    digest = sha256()
    for name, content in parts.items():
        # With its length before it, no part can take over the end of the one before.
        for piece in (name.encode(), content):
            digest.update(len(piece).to_bytes(8, "big") + piece)
    return _group(digest.hexdigest()[:DIGITS])


def read_fingerprint(text: str) -> str:
    """Read a fingerprint as a person types it: in groups or not, in letters of any size.

    Raises:
        DeploymentError: it is none, or only a part of one.
    """
    digits = re.sub(r"[\s:.-]", "", text).lower()
    if not re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", digits):
        raise DeploymentError(
            f"not a whole fingerprint: {text[:80]!r}",
            mend=f"it has {DIGITS // GROUP} groups of {GROUP}, of the digits 0-9 and the letters a-f",
        )
    return _group(digits)


def _group(digits: str) -> str:
    return " ".join(digits[start : start + GROUP] for start in range(0, len(digits), GROUP))
