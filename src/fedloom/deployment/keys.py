"""Keys and certificates of a deployment: the server's, and the list of clients whose keys it takes. No torch here.

A client's private key is made on its own machine and stays there: what it sends is a public key, what it gets back is
a kit with the server's address and certificate authority. Whoever holds a registered key is that client.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.deployment.addresses import join_address, read_host
from fedloom.deployment.certificates import certificate_pem, certify, private_pem, read_certificate
from fedloom.deployment.fingerprints import identify_client, identify_server
from fedloom.deployment.processes import check_flower
from fedloom.deployment.signing import make_signing_key
from fedloom.errors import DeploymentError
from fedloom.host.files import Lock, read_holder, replace_file, replace_folder, write_private, writing

if TYPE_CHECKING:
    from cryptography import x509

MOST_LETTERS = 2**16
"""Letters of a request that are read."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
AGAIN = "run it again"
CA_DAYS, SERVER_DAYS, WARN_DAYS = 3650, 365, 30
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine in every server's certificate."""
LOCAL = LOOPBACK[:2]
"""Hosts of the SuperLink itself, which has no IPv6: with ::1, clients come through the proxy."""


@dataclass(frozen=True)
class Security:
    """Server's certificate and keys, and the list of clients whose keys it takes."""

    folder: Path
    """Folder of the files, absolute as Flower wants them named."""
    host: str
    port: int
    """Port that clients connect to: nginx's, or on the loopback the SuperLink's own."""

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        return self.folder / "server.key"

    @property
    def signing_key(self) -> Path:
        """Key that this server's questions to clients are signed with; their kits have its public half."""
        return self.folder / "signing.key"

    @property
    def is_local(self) -> bool:
        """True where all clients are on this machine, so that no proxy is needed."""
        return self.host in LOCAL

    def clients(self) -> Mapping[str, Path]:
        """List the public keys of the clients that were approved and not revoked, by name."""
        return {path.stem: path for path in sorted((self.folder / "clients").glob("*.pub"))}

    def expires(self) -> datetime:
        """Return when the server's certificate expires."""
        return read_certificate(self.certificate).not_valid_after_utc


def init(folder: Path, host: str, port: int) -> Security:
    """Make a certificate authority, the server's certificate for its names, and an empty list of clients.

    Raises:
        DeploymentError: the folder exists, or the host is not a name or address.
        RunError: it can't be written; nothing of it is left.
    """
    check_flower()  # the library for keys comes with it
    from cryptography.hazmat.primitives.asymmetric import ec

    host = read_host(host, where=f"--host {host[:80]}")
    if folder.exists():
        raise DeploymentError("the folder exists", where=str(folder), mend="name another with --folder")
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca = certify("fedloom CA", ca_key, None, CA_DAYS, hosts=())
    server = _certify_server(host, server_key, (ca, ca_key))
    with writing(folder, AGAIN), replace_folder(folder, existing="refuse") as made:
        made.chmod(0o700)
        (made / "clients").mkdir()
        for name, key in (("ca", ca_key), ("server", server_key)):
            write_private(made / f"{name}.key", private_pem(key))
        for name, certificate in (("ca", ca), ("server", server)):
            _write_public(made / f"{name}.crt", certificate_pem(certificate))
        _write_public(made / "server.toml", f'host = "{host}"\nport = {port}\n'.encode())
        make_signing_key(made / "signing.key")
    return open_server(folder)


@contextmanager
def in_use(security: Security, run: Path) -> Iterator[None]:
    """Be the only server that works with these keys, on a run, until the block ends: nginx's files lie beside them.

    Raises:
        DeploymentError: another one is, or the folder can't be written.
    """
    path = security.folder / "serve.lock"
    try:
        lock = Lock(path, 0o600)
        lock.sign(str(run.absolute()))
    except BlockingIOError:
        holder = read_holder(path)
        raise DeploymentError(
            f"another fedloom serve works with it ({holder.who})",
            where=str(security.folder),
            mend=f"end that one: fedloom stop {holder.work}",
        ) from None
    except OSError as error:
        raise DeploymentError(
            f"can't be written ({error.strerror})", where=str(security.folder), mend="see that it may be written"
        ) from None
    with lock:
        yield


def renew(folder: Path) -> Security:
    """Make the server another certificate, by the same authority: clients' kits stay as they are.

    Raises:
        DeploymentError: no server is set up there, or its keys can't be read.
    """
    security = _read_server(folder)
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        ca_key, key = ((folder / name).read_bytes() for name in ("ca.key", "server.key"))
        issuer = read_certificate(security.ca), load_pem_private_key(ca_key, None)
        certificate = _certify_server(security.host, load_pem_private_key(key, None), issuer)
    except (OSError, ValueError) as error:
        raise DeploymentError(
            "the keys in it can't be read", where=str(folder), mend="bring ca.key and server.key back to it"
        ) from error
    _write_public(security.certificate, certificate_pem(certificate))
    return security


def open_server(folder: Path) -> Security:
    """Read what `init` made.

    Raises:
        DeploymentError: it is not there, its certificate has expired, or others can read its keys.
    """
    security = _read_server(folder)
    for key in folder.glob("*.key"):
        check_private(key)
    if (expires := security.expires()) < datetime.now(UTC):
        raise DeploymentError(
            f"the server's certificate expired on {expires:%Y-%m-%d}",
            where=str(folder),
            mend="make another: fedloom provision renew",
        )
    return security


def _read_server(folder: Path) -> Security:
    check_flower()
    try:
        told = tomllib.loads((folder / "server.toml").read_text(encoding="utf-8"))
        security = Security(folder.resolve(), str(told["host"]), int(told["port"]))
        security.expires()
    except (OSError, ValueError, KeyError) as error:
        raise DeploymentError(
            "no server is set up in it", where=str(folder), mend="make one: fedloom provision init --host HOST"
        ) from error
    return security


def describe_expiry(expires: datetime) -> str:
    """Say when a certificate expires, with a warning from 30 days ahead."""
    left = (expires - datetime.now(UTC)).days
    warning = f": ONLY {left} DAYS LEFT (fedloom provision renew, on the server)" if left < WARN_DAYS else ""
    return f"the certificate is valid until {expires:%Y-%m-%d}{warning}"


def request(name: str, folder: Path) -> Path:
    """Make this client's key, which stays here, and the small file that goes to the server's owner.

    Raises:
        DeploymentError: the name can't be one, or has a key here already.
    """
    check_flower()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    check_name(name)
    key_file = folder / f"{name}.key"
    if key_file.exists():
        raise DeploymentError("there is a key of that name", where=str(key_file), mend="use it, or another name")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path = folder / f"{name}.request"
    with writing(folder, AGAIN):
        folder.mkdir(parents=True, exist_ok=True)
    # The key last: one without its request could be neither used nor made again.
    _write_public(path, (json.dumps({"fedloom": 1, "name": name, "key": public.decode()}) + "\n").encode())
    with writing(key_file, AGAIN):
        write_private(key_file, private)
    return path


class Approved(NamedTuple):
    """Kit to send back, whose it is, and the fingerprints that two people compare."""

    kit: Path
    name: str
    client: str
    """Fingerprint of the key that was approved."""
    server: str


def read_request(file: Path) -> tuple[str, str]:
    """Return the name and the public key in what a client sent.

    Raises:
        DeploymentError: the file is not a request.
    """
    try:
        with file.open(encoding="utf-8") as sent:
            told = json.loads(sent.read(MOST_LETTERS))  # whose end is missing where it is longer
        name, public = str(told["name"]), _read_public_key(str(told["key"]))
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
    return name, public


def approve(folder: Path, file: Path, to: Path) -> Approved:
    """Take a client's key onto the list, and write its kit.

    Raises:
        DeploymentError: the file is not a request, or another client has that name or key.
    """
    security = open_server(folder)
    name, public = read_request(file)
    known = folder / "clients" / f"{name}.pub"
    if known.exists() and known.read_text(encoding="utf-8").strip() != public:
        raise DeploymentError(
            f"{name} has another key already",
            where=str(known),
            mend=f"revoke it first: fedloom provision revoke {name}",
        )
    for other, path in security.clients().items():
        if other != name and path.read_text(encoding="utf-8").strip() == public:
            raise DeploymentError(
                f"{other} has that key already",
                where=str(path),
                mend=f"have {name}'s owner make another (fedloom provision request), or revoke it: "
                f"fedloom provision revoke {other}",
            )
    _write_public(known, (public + "\n").encode())
    ca, signer = security.ca.read_text(encoding="utf-8"), make_signing_key(security.signing_key)
    kit = to / f"{name}.kit"
    address = join_address(security.host, security.port)
    told = f'name = "{name}"\nserver = "{address}"\nsigner = "{signer}"\nca = """\n{ca}"""\n'
    _write_public(kit, told.encode())
    return Approved(kit, name, identify_client(name, public), identify_server(ca, signer))


def _read_public_key(text: str) -> str:
    """Read a key of the kind that `request` makes and Flower takes, without the comment that it may have.

    Raises:
        DeploymentError: it is of another kind.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_ssh_public_key(text.strip().encode())
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)):
        raise DeploymentError("its key is not ECDSA on P-384", mend="have its owner run fedloom provision request anew")
    public = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


def public_key_of(file: Path) -> str:
    """Return the public key, as OpenSSH has it, of a private key that `request` made.

    Raises:
        DeploymentError: the file is none.
    """
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None).public_key()
    except Exception as error:  # of a dozen kinds, as in a request
        raise DeploymentError(
            "not a key of fedloom provision request",
            where=str(file),
            mend="bring it back from a copy, or make another under a new name, and have that approved",
        ) from error
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def revoke(folder: Path, name: str) -> None:
    """Take a client's key off the list: a server that runs lets go of it within seconds.

    Raises:
        DeploymentError: nobody of that name is on it.
    """
    security = open_server(folder)
    known = security.clients()
    if name not in known:
        raise DeploymentError(f'no client is named "{name}"', where=str(folder), mend=f"known: {', '.join(known)}")
    (folder / "revoked").mkdir(exist_ok=True)
    known[name].replace(folder / "revoked" / f"{name}-{datetime.now():%Y%m%d-%H%M%S}.pub")


def read_authority(pem: str, where: str) -> str:
    """Read the one certificate in a kit: all that stand there would be trusted, but one fingerprint is compared.

    Raises:
        DeploymentError: there is none, or more than one.
    """
    check_flower()
    from cryptography import x509

    try:
        (certificate,) = x509.load_pem_x509_certificates(pem.encode())
    except ValueError:
        raise DeploymentError(
            "not exactly one certificate", where=where, mend="ask the server's owner for the kit again"
        ) from None
    return certificate_pem(certificate).decode()


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


def _certify_server(host: str, key: Any, issuer: tuple[x509.Certificate, Any]) -> x509.Certificate:
    return certify(host, key, issuer, SERVER_DAYS, hosts=(host, *LOOPBACK))


def _write_public(path: Path, content: bytes) -> None:
    """Write a file that others may read, as the umask says, and nobody else change, whatever it says."""
    with writing(path, AGAIN):
        replace_file(path, content, rights=0o644)
