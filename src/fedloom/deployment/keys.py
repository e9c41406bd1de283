"""Keys and certificates of a deployment: the server's, and the list of clients whose keys it takes. No torch here.

A client's private key is made on its own machine and stays there: what it sends is a public key, what it gets back is
a kit with the server's address and certificate authority. Whoever holds a registered key is that client.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.deployment.addresses import join_address, read_host
from fedloom.deployment.approvals import (
    CLIENT_DAYS,
    CLIENTS,
    SEEN,
    Approval,
    changing,
    format_time,
    list_approvals,
    revoked_file,
    warn_of,
    write_approval,
)
from fedloom.deployment.certificates import certificate_pem, certify, private_pem, read_certificate
from fedloom.deployment.client_keys import (
    Request,
    ask_with,
    check_name,
    check_named,
    check_private,
    make_key,
    read_request,
    request_json,
)
from fedloom.deployment.fingerprints import identify_server
from fedloom.deployment.processes import check_flower
from fedloom.deployment.signing import make_signing_key
from fedloom.errors import DeploymentError
from fedloom.host.files import Lock, read_holder, replace_file, replace_folder, write_private, writing

if TYPE_CHECKING:
    from cryptography import x509

AGAIN = "run it again"
CA_DAYS, SERVER_DAYS = 3650, 365
SERVE_LOCK = "serve.lock"
"""File of a server's folder that the server which works with it holds locked."""
NEXT = ".next"
"""End of the name of a client's next key, which takes the place of its key once a kit names it."""
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
        """List the approvals that were not revoked, by the clients' names; some may have expired."""
        return {path.stem: path for path in sorted((self.folder / CLIENTS).glob("*.pub"))}

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
        raise DeploymentError("the folder exists", where=str(folder), mend="name another with --server")
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca = certify("fedloom CA", ca_key, None, CA_DAYS, hosts=())
    server = _certify_server(host, server_key, (ca, ca_key))
    with writing(folder, AGAIN), replace_folder(folder, existing="refuse") as made:
        made.chmod(0o700)
        for name in (CLIENTS, SEEN):
            (made / name).mkdir()
        for name, key in (("ca", ca_key), ("server", server_key)):
            write_private(made / f"{name}.key", private_pem(key))
        for name, certificate in (("ca", ca), ("server", server)):
            _write_public(made / f"{name}.crt", certificate_pem(certificate))
        _write_public(made / "server.toml", f'host = "{host}"\nport = {port}\n'.encode())
        make_signing_key(made / "signing.key")
    return open_server(folder)


@contextmanager
def in_use(folder: Path, work: Path) -> Iterator[None]:
    """Be the only server that works with a folder until the block ends: nginx's files lie beside its keys.

    `work` is what `fedloom stop` ends it by: its run, or this folder where it is a service.

    Raises:
        DeploymentError: another one is, or the folder can't be written.
    """
    path = folder / SERVE_LOCK
    try:
        lock = Lock(path, 0o600)
        lock.sign(str(work.absolute()))
    except BlockingIOError:
        holder = read_holder(path)
        raise DeploymentError(
            f"another server works with it ({holder.who})",
            where=str(folder),
            mend=f"end that one: fedloom stop {holder.work}",
        ) from None
    except OSError as error:
        raise DeploymentError(
            f"can't be written ({error.strerror})", where=str(folder), mend="see that it may be written"
        ) from None
    with lock:
        yield


def renew(folder: Path) -> Security:
    """Make the server another certificate, by the same authority: clients' kits stay as they are.

    Raises:
        DeploymentError: no server is set up there, or its keys can't be read.
    """
    security = read_server(folder)
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
    security = read_server(folder)
    for key in folder.glob("*.key"):
        check_private(key)
    if (expires := security.expires()) < datetime.now(UTC):
        raise DeploymentError(
            f"the server's certificate expired on {expires:%Y-%m-%d}",
            where=str(folder),
            mend="make another: fedloom provision renew",
        )
    return security


def read_server(folder: Path) -> Security:
    """Read what `init` made, whether it can still serve or not.

    Raises:
        DeploymentError: it is not there.
    """
    check_flower()
    try:
        told = tomllib.loads((folder / "server.toml").read_text(encoding="utf-8"))
        security = Security(folder.resolve(), str(told["host"]), told["port"])
        if type(security.port) is not int or not 0 < security.port < 2**16:
            raise ValueError("port")
        security.expires()
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise DeploymentError(
            "no server is set up in it", where=str(folder), mend="make one: fedloom provision init --host HOST"
        ) from error
    return security


def describe_expiry(expires: datetime) -> str:
    """Say when a certificate expires, with a warning from 30 days ahead."""
    warning = warn_of(expires, "fedloom provision renew, on the server")
    return f"the certificate is valid until {expires:%Y-%m-%d}{warning}"


def request(name: str, folder: Path) -> Path:
    """Make this client's key, which stays here, and the small file that goes to the server's owner.

    Raises:
        DeploymentError: the name can't be one, or has a key here already.
    """
    check_flower()
    check_name(name)
    key_file = folder / f"{name}.key"
    if key_file.exists():
        raise DeploymentError(
            "there is a key of that name",
            where=str(key_file),
            mend="use it, or another name; to begin anew, move it away",
        )
    private, public = make_key()
    with writing(folder, AGAIN):
        folder.mkdir(parents=True, exist_ok=True)
    return _write_key(key_file, private, folder, Request(name, public))


def rotate(name: str, key: Path) -> Path:
    """Make this client's next key, and the request that it take the place of the one that it has, signed by that one.

    Raises:
        DeploymentError: there is a next one already, which its kit does not name.
    """
    current, coming = key.with_name(f"{name}.key"), key.with_name(f"{name}.key{NEXT}")
    if key.name == coming.name:  # the kit names it, so the one before is of no use any more
        with writing(current, AGAIN):
            key.replace(current)
    elif coming.exists():
        raise DeploymentError(
            "there is a next key already, which waits for its approval",
            where=str(coming),
            mend=f"send {name}.request, and join with the kit that comes back; to begin anew, remove this file",
        )
    private, public = make_key()
    return _write_key(coming, private, current.parent, ask_with(current, name, public))


def _write_key(file: Path, private: bytes, folder: Path, asked: Request) -> Path:
    """Write a client's key and its request, and return where that is.

    The key last: one without its request could be neither used nor made again.
    """
    path = folder / f"{asked.name}.request"
    _write_public(path, request_json(asked))
    with writing(file, AGAIN):
        write_private(file, private)
    return path


class Approved(NamedTuple):
    """Kit to send back, whose it is, and the fingerprints that two people compare."""

    kit: Path
    name: str
    client: str
    """Fingerprint of the key that was approved."""
    server: str
    expires: datetime
    replaced: bool
    """True where the client's key before has signed for this one, and is taken no longer."""


def approve(folder: Path, file: Path, to: Path, days: int | None = None) -> Approved:
    """Take a client's key onto the list, and write its kit.

    Without a number of days a key is taken for a year, and one that is on the list already, or takes the place of such
    a one, until the end that stands there: a signature prolongs nothing.

    Raises:
        DeploymentError: the file is not a request, another client has that name or key, or the key that signed for it
            is taken no longer.
    """
    security = open_server(folder)
    asked = read_request(file)
    with changing(folder):
        known = list_approvals(folder)
        before = known.get(asked.name)
        replaced = before if before and before.key != asked.key else None
        if replaced or (asked.signature and not before):
            check_named(asked, replaced, file)
        for other in known.values():
            if other.name != asked.name and other.key == asked.key:
                raise DeploymentError(
                    f"{other.name} has that key already",
                    where=str(security.clients()[other.name]),
                    mend=f"have {asked.name}'s owner make another (fedloom provision request), or revoke it: "
                    f"fedloom provision revoke {other.name}",
                )
        if replaced:
            # The name is never without a key on the list: a server that runs would let go of its client.
            taken = security.clients()[asked.name].read_bytes()
            replace_file(revoked_file(folder, asked.name), taken, rights=0o644)
        since = before.since if before and not replaced else None
        expires = before.expires if before and before.state == "approved" and days is None else None
        return _enlist(security, Approval(asked.name, asked.key, since, expires), to, days, replaced=bool(replaced))


def renew_client(folder: Path, name: str, to: Path, days: int) -> Approved:
    """Take a client's key for so many days from now, and write its kit.

    Raises:
        DeploymentError: nobody of that name is on the list.
    """
    security = open_server(folder)
    with changing(folder):
        _find_client(security, name)
        approval = list_approvals(folder)[name]
        return _enlist(security, replace(approval, expires=None), to, days, replaced=False)


def _enlist(security: Security, approval: Approval, to: Path, days: int | None, *, replaced: bool) -> Approved:
    """Write an approval and its kit; where it has no beginning or end yet, from now on for so many days."""
    now, name = datetime.now(UTC), approval.name
    expires = approval.expires or now + timedelta(days=days or CLIENT_DAYS)
    approval = replace(approval, since=approval.since or now, expires=expires)
    with writing(security.folder, AGAIN):
        write_approval(security.folder, approval)
    ca, signer = security.ca.read_text(encoding="utf-8"), make_signing_key(security.signing_key)
    kit = to / f"{name}.kit"
    address = join_address(security.host, security.port)
    told = f'name = "{name}"\nserver = "{address}"\nsigner = "{signer}"\nkey = "{approval.fingerprint}"\n'
    told += f'expires = {format_time(expires)}\nca = """\n{ca}"""\n'
    _write_public(kit, told.encode())
    return Approved(kit, name, approval.fingerprint, identify_server(ca, signer), expires, replaced)


def revoke(folder: Path, name: str) -> None:
    """Take a client's key off the list: a server that runs lets go of it within seconds.

    Raises:
        DeploymentError: nobody of that name is on it.
    """
    security = open_server(folder)
    with changing(folder):
        _find_client(security, name).replace(revoked_file(folder, name))


def _find_client(security: Security, name: str) -> Path:
    known = security.clients()
    if name not in known:
        raise DeploymentError(
            f'no client is named "{name}"', where=str(security.folder), mend=f"known: {', '.join(known) or 'none'}"
        )
    return known[name]


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


def _certify_server(host: str, key: Any, issuer: tuple[x509.Certificate, Any]) -> x509.Certificate:
    return certify(host, key, issuer, SERVER_DAYS, hosts=(host, *LOOPBACK))


def _write_public(path: Path, content: bytes) -> None:
    """Write a file that others may read, as the umask says, and nobody else change, whatever it says."""
    with writing(path, AGAIN):
        replace_file(path, content, rights=0o644)
