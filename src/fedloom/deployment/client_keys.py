"""Keys of clients on their way to a server: in a request, alone or named by the key before. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.deployment.approvals import MOST_LETTERS, NAME, Approval
from fedloom.errors import DeploymentError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

PURPOSE = b"fedloom next key 1\n"
"""Words before what a key signs to name the next one: Flower has it sign other things."""


class Request(NamedTuple):
    """Wish of a client that its key be taken."""

    name: str
    key: str
    """Public key, as OpenSSH has it."""
    signature: bytes = b""
    """Signature by the key that it is to take the place of; empty where there was none."""


def make_key() -> tuple[bytes, str]:
    """Make a client's key: return its private half as a file has it, and its public one as OpenSSH does."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), _to_text(key.public_key())


def request_json(asked: Request) -> bytes:
    """Return a request as its file has it."""
    told: dict[str, Any] = {"fedloom": 1, "name": asked.name, "key": asked.key}
    if asked.signature:
        told["signature"] = asked.signature.hex()
    return (json.dumps(told) + "\n").encode()


def read_request(file: Path) -> Request:
    """Read what a client sent; whether a signature in it is good, `check_named` says.

    Raises:
        DeploymentError: the file is not a request.
    """
    try:
        with file.open(encoding="utf-8") as sent:
            told = json.loads(sent.read(MOST_LETTERS))  # whose end is missing where it is longer
        name = str(told["name"])
        public = _to_text(_load_public_key(str(told["key"])))  # without the comment that it may have
        signature = bytes.fromhex(told.get("signature", ""))
    except OSError as error:
        raise DeploymentError(
            f"can't read the request: {error.strerror}", where=str(file), mend="name the file that a client sent"
        ) from None
    except DeploymentError as error:
        raise DeploymentError(error.what, where=str(file), mend=error.mend) from None
    except Exception as error:  # of a dozen kinds, from a file that may be anything
        raise DeploymentError(
            "not a fedloom request", where=str(file), mend="have its client send what fedloom provision request wrote"
        ) from error
    check_name(name)
    return Request(name, public, signature)


def ask_with(old: Path, name: str, public: str) -> Request:
    """Ask that a client's next key be taken, in the name of the one that it has.

    Raises:
        DeploymentError: the file holds none.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA384

    key = _read_private_key(old)
    signature = key.sign(_what_is_signed(name, _to_text(key.public_key()), public), ec.ECDSA(SHA384()))
    return Request(name, public, signature)


def check_named(asked: Request, before: Approval | None, file: Path) -> None:
    """Refuse a key that is to take another's place, unless that one is taken now and has signed for it.

    Raises:
        DeploymentError
    """
    first = "fedloom provision request, and both compare its fingerprint"
    if before is None:
        raise DeploymentError(
            f"it is signed by a key of {asked.name}'s that is not taken here",
            where=str(file),
            mend=f"have its owner make a first request: {first}",
        )
    if not asked.signature:
        raise DeploymentError(
            f"{before.name} has another key already",
            where=str(file),
            mend=f"have its owner ask with that one (fedloom provision rotate), or revoke it first: fedloom provision"
            f" revoke {before.name}",
        )
    if before.state != "approved":
        raise DeploymentError(
            f"the key that signed it is taken no longer: its approval ended on {before.expires:%Y-%m-%d}",
            where=str(file),
            mend=f"fedloom provision renew {before.name}; or revoke it, and have a first request made: {first}",
        )
    if not _is_named_by(asked, before.key):
        raise DeploymentError(
            f"it is not signed by the key that {before.name} has here",
            where=str(file),
            mend=f"ask {before.name}'s owner, aloud, whether it is theirs",
        )


def public_key_of(file: Path) -> str:
    """Return the public key, as OpenSSH has it, of a private key that `request` made.

    Raises:
        DeploymentError: the file is none.
    """
    return _to_text(_read_private_key(file).public_key())


def check_private(key: Path) -> None:
    """Refuse a private key that others on this machine can read or change, as ssh does.

    Raises:
        DeploymentError
    """
    if key.stat().st_mode & 0o077:
        raise DeploymentError(
            "others on this machine can read the private key",
            where=str(key),
            mend=f"chmod 600 '{key}'; if somebody else may have read it, make another",
        )


def check_name(name: str, where: str = "") -> None:
    """Refuse what can't be a client's name: it becomes part of paths.

    Raises:
        DeploymentError
    """
    if not NAME.fullmatch(name):
        raise DeploymentError(
            f"not a name for a client: {name[:80]!r}", where=where, mend="use letters, digits, . _ and -"
        )


def _is_named_by(asked: Request, old: str) -> bool:
    """Return whether a client's key, as OpenSSH has it, has signed that the one in a request is its next."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA384

    signed = _what_is_signed(asked.name, old, asked.key)
    try:
        _load_public_key(old).verify(asked.signature, signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def _what_is_signed(name: str, old: str, new: str) -> bytes:
    """Return what names the next key of one client, after one key: it is of no use for another, or later."""
    return PURPOSE + json.dumps([name, old, new]).encode()


def _load_public_key(text: str) -> ec.EllipticCurvePublicKey:
    """Load a key of the kind that `make_key` makes and Flower takes.

    Raises:
        DeploymentError: it is of another kind.
        ValueError, UnsupportedAlgorithm: it is none.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_ssh_public_key(text.strip().encode())
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)):
        raise DeploymentError("its key is not ECDSA on P-384", mend="have its owner run fedloom provision request anew")
    return key


def _read_private_key(file: Path) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except Exception as error:  # of a dozen kinds, as in a request
        raise _no_key(file) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _no_key(file)
    return key


def _no_key(file: Path) -> DeploymentError:
    return DeploymentError(
        "not a key of fedloom provision request",
        where=str(file),
        mend="bring it back from a copy, or make another under a new name, and have that approved",
    )


def _to_text(key: ec.EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
