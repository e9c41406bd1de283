"""Keys and certificates of a deployment: the server's, and the list of clients whose keys it takes. No torch here.

A client's private key is made on its own machine and stays there: what it sends is a public key, what it gets back is
a kit with the server's address and certificate authority. Whoever holds a registered key is that client.
"""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.deployment.processes import check_flower
from fedloom.deployment.signing import make_signing_key
from fedloom.errors import DeploymentError
from fedloom.host.files import replace_file, write_private

if TYPE_CHECKING:
    from cryptography import x509

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
HOST = re.compile(r"[A-Za-z0-9.:-]{1,253}")
PORT = re.compile(r"[1-9][0-9]{0,4}")
CA_DAYS, SERVER_DAYS, WARN_DAYS = 3650, 365, 30
LOOPBACK = ("localhost", "127.0.0.1", "::1")


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
        return self.host in LOOPBACK

    def clients(self) -> Mapping[str, Path]:
        """List the public keys of the clients that were approved and not revoked, by name."""
        return {path.stem: path for path in sorted((self.folder / "clients").glob("*.pub"))}

    def expires(self) -> datetime:
        """Return when the server's certificate expires."""
        return _read_certificate(self.certificate).not_valid_after_utc


def init(folder: Path, host: str, port: int) -> Security:
    """Make a certificate authority, the server's certificate for its names, and an empty list of clients.

    Raises:
        DeploymentError: the folder exists, or the host is not a name or address.
    """
    check_flower()  # the library for keys comes with it
    from cryptography.hazmat.primitives.asymmetric import ec

    if not HOST.fullmatch(host):
        raise DeploymentError("not a host name or address", where=f"--host {host[:80]}")
    if folder.exists():
        raise DeploymentError("the folder exists", where=str(folder), mend="name another with --folder")
    folder.mkdir(mode=0o700, parents=True)
    (folder / "clients").mkdir()
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca = _certify("fedloom CA", ca_key, None, CA_DAYS, hosts=())
    server = _certify_server(host, server_key, (ca, ca_key))
    for name, key in (("ca", ca_key), ("server", server_key)):
        write_private(folder / f"{name}.key", _private_pem(key))
    for name, certificate in (("ca", ca), ("server", server)):
        _write_public(folder / f"{name}.crt", _certificate_pem(certificate))
    _write_public(folder / "server.toml", f'host = "{host}"\nport = {port}\n'.encode())
    make_signing_key(folder / "signing.key")
    return open_server(folder)


def renew(folder: Path) -> Security:
    """Make the server another certificate, by the same authority: clients' kits stay as they are.

    Raises:
        DeploymentError: no server is set up there, or its keys can't be read.
    """
    security = _read_server(folder)
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        ca_key, key = ((folder / name).read_bytes() for name in ("ca.key", "server.key"))
        issuer = _read_certificate(security.ca), load_pem_private_key(ca_key, None)
        certificate = _certify_server(security.host, load_pem_private_key(key, None), issuer)
    except (OSError, ValueError) as error:
        raise DeploymentError(
            "the keys in it can't be read", where=str(folder), mend="bring ca.key and server.key back to it"
        ) from error
    _write_public(security.certificate, _certificate_pem(certificate))
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
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_private(key_file, private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path = folder / f"{name}.request"
    _write_public(path, (json.dumps({"fedloom": 1, "name": name, "key": public.decode()}) + "\n").encode())
    return path


def approve(folder: Path, file: Path, to: Path) -> tuple[Path, str]:
    """Take a client's key onto the list; return the kit to send back, and the fingerprint to read aloud.

    Raises:
        DeploymentError: the file is not a request, or another client has that name or key.
    """
    security = open_server(folder)
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        name, public = str(told["name"]), _read_public_key(str(told["key"]))
    except OSError as error:
        raise DeploymentError(f"can't read the request: {error.strerror}", where=str(file)) from None
    except DeploymentError as error:
        raise DeploymentError(error.what, where=str(file), mend=error.mend) from None
    except Exception as error:  # of a dozen kinds, from a file that may be anything
        raise DeploymentError("not a fedloom request", where=str(file)) from error
    check_name(name)
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
    told = f'name = "{name}"\nserver = "{security.host}:{security.port}"\nsigner = "{signer}"\nca = """\n{ca}"""\n'
    _write_public(kit, told.encode())
    return kit, fingerprint(security.ca)


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


def fingerprint(ca: Path) -> str:
    """Return the SHA-256 of a certificate, in groups that can be read aloud."""
    from cryptography.hazmat.primitives.hashes import SHA256

    digits = _read_certificate(ca).fingerprint(SHA256()).hex()
    return " ".join(digits[start : start + 8] for start in range(0, len(digits), 8))


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
    return _certificate_pem(certificate).decode()


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


def is_address(text: str) -> bool:
    """Return whether a text is HOST:PORT, as a kit names its server."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host[:1] + host[-1:] == "[]" else host
    try:
        # Whoever connects does this, and fails with another error: a part of it may be empty or too long.
        host.encode("idna")
    except UnicodeError:
        return False
    return bool(HOST.fullmatch(host) and PORT.fullmatch(port) and int(port) < 2**16)


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
    return _certify(host, key, issuer, SERVER_DAYS, hosts=(host, *LOOPBACK))


def _certify(
    name: str, key: Any, issuer: tuple[x509.Certificate, Any] | None, days: int, hosts: tuple[str, ...]
) -> x509.Certificate:
    """Make a certificate: one that signs itself, or one that an authority signs for hosts."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA384

    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])])
    now = datetime.now(UTC) - timedelta(minutes=5)  # clocks differ
    signer = issuer[1] if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if hosts:
        names = [_general_name(host) for host in dict.fromkeys(hosts)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    else:
        usage: dict[str, bool] = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        )
        builder = builder.add_extension(
            x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False),
            critical=True,
        )
    return builder.sign(signer, SHA384())


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read_certificate(path: Path) -> x509.Certificate:
    from cryptography import x509

    return x509.load_pem_x509_certificate(path.read_bytes())


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _private_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    found: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return found


def _write_public(path: Path, content: bytes) -> None:
    """Write a file that others may read, as the umask says, and nobody else change, whatever it says."""
    replace_file(path, content, rights=0o644)
