"""Signatures of the server's questions: each is for one client, for a while, and answered once. No torch here.

TLS ends where Flower's messages are unpacked, and the worker is another process. So a question is signed where it is
asked, by `fedloom serve`, and checked where it is answered, before anything in it is read.

A question that the server asks again is signed again, and may be answered again. The same signed question a second
time is a thief's: Flower gives a message out once, and our relay hands it over once to each worker. A worker that takes
the place of one that died gets it anew, so what was answered is forgotten with a process that dies; the question's end
is not.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from itertools import count
from pathlib import Path
from typing import Any

from fedloom.errors import DeploymentError, LateError, MessageError
from fedloom.host.files import hash_pieces, hash_text, write_private
from fedloom.host.frames import Frame, read_manifest

PURPOSE = b"fedloom question 1\n"
"""Words before all that is signed: what this key signed for another purpose is no question."""
FIELDS = {"client", "run", "number", "until", "payload", "question"}
CLOCKS_SECONDS = 5.0
"""Time by which a client's clock may be ahead of the server's: Flower refuses more."""
MOST_KNOWN = 4096
"""Questions that are remembered, so as to answer none twice."""


def make_signing_key(path: Path) -> str:
    """Return the public half of the key at a path, in hexadecimal digits; where there is none, make it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

    if not path.exists():
        made = Ed25519PrivateKey.generate()
        write_private(path, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key: Any = load_pem_private_key(path.read_bytes(), None)
    digits: str = key.public_key().public_bytes_raw().hex()
    return digits


class Signer:
    """Server's hand, for all questions of one start of `fedloom serve`."""

    def __init__(self, key: Path) -> None:
        """Read the key.

        Raises:
            DeploymentError: it is not there, or is none.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            found = load_pem_private_key(key.read_bytes(), None)
        except FileNotFoundError:
            raise DeploymentError(
                "the key that signs questions is not there",
                where=str(key),
                mend="approve each client's request again (fedloom provision approve), which makes it, and send the "
                "new kits",
            ) from None
        except (OSError, ValueError) as error:
            raise DeploymentError("the key that signs questions can't be read", where=str(key)) from error
        assert isinstance(found, Ed25519PrivateKey), "provision init made it"
        self._key, self._run, self._numbers = found, secrets.token_hex(16), count()

    def sign(self, question: Frame, client: str, seconds: float) -> Frame:
        """Sign a question to a client, which is of no use after so many seconds."""
        told = {
            "client": client,
            "run": self._run,
            "number": next(self._numbers),
            "until": time.time() + seconds,
            "payload": hash_pieces([question.payload]),
            "question": question.manifest,
        }
        text = json.dumps(told)
        return Frame({"signed": text, "signature": self._key.sign(PURPOSE + text.encode()).hex()}, question.payload)


class Verifier:
    """Client's eye: it lets through what the kit's server asks this client, each question once."""

    def __init__(self, key: str, client: str) -> None:
        """Take the server's public key as it stands in the kit, and this client's name."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        self._key, self._client = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)), client
        self._known: dict[str, float] = {}
        """Ends of the questions that were let through, by their hashes."""
        self._forgotten_until = -math.inf
        """End of the last question that is no longer remembered: none that ends before it is let through."""

    def open(self, frame: Frame) -> Frame:
        """Return the question in a frame.

        Raises:
            LateError: its time is over.
            MessageError: it is not the kit's server's, not for this client, or here for the second time.
        """
        text = self._check_signature(frame)
        told = read_manifest(text)
        if told is None or told.keys() != FIELDS or not isinstance(told["question"], dict):
            raise MessageError("this version of fedloom can't read the server's question")
        if told["client"] != self._client:
            raise MessageError("the question is to another client")
        if told["payload"] != hash_pieces([frame.payload]):
            raise MessageError("the question came with other numbers than its server's")
        self._take_once(hash_text(text), told["until"])
        return Frame(told["question"], frame.payload)

    def leave(self) -> list[Any]:
        """Return what `take_up` needs in another process, as JSON can hold it."""
        return [self._known, self._forgotten_until]

    def take_up(self, left: list[Any] | None) -> None:
        """Let through no question that was let through in the process which left this."""
        if left:
            self._known, self._forgotten_until = left

    def _check_signature(self, frame: Frame) -> str:
        """Return the text that was signed; until here nothing of it is read."""
        from cryptography.exceptions import InvalidSignature

        text, signature = frame.manifest.get("signed"), frame.manifest.get("signature")
        if not isinstance(text, str) or not isinstance(signature, str):
            raise MessageError("the question is not signed")
        try:
            self._key.verify(bytes.fromhex(signature), PURPOSE + text.encode())
        except (InvalidSignature, ValueError):
            raise MessageError("the question is not signed by the kit's server") from None
        return text

    def _take_once(self, question: str, until: Any) -> None:
        if not isinstance(until, float) or not math.isfinite(until):
            raise MessageError("the question has no end")
        if time.time() > until + CLOCKS_SECONDS:
            raise LateError(
                "the question came too late for its answer to count: it was long on its way, or this machine's clock is"
                " ahead of the server's"
            )
        # Not by the clock alone, which may be set back: what was forgotten is never taken again.
        if question in self._known or until <= self._forgotten_until:
            raise MessageError("the question was here before: it is answered once")
        if len(self._known) >= MOST_KNOWN:
            first = min(self._known, key=self._known.__getitem__)
            self._forgotten_until = max(self._forgotten_until, self._known.pop(first))
        self._known[question] = until
