"""Keys and certificates: what is made where, what leaves a machine, and what is refused."""

import json
import os
import ssl
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.full_disk import no_file_above

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedloom.deployment import keys
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.fingerprints import identify_server
from fedloom.deployment.keys import approve, init, open_server, request, revoke
from fedloom.deployment.server.serving import serve
from fedloom.errors import DeploymentError, RunError
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import load_recipe


def test_the_servers_certificate_has_its_names_and_is_signed_by_its_authority(tmp_path: Path) -> None:
    security = init(tmp_path / "server", "fed.example.org", 8443)
    certificate = x509.load_pem_x509_certificate(security.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(security.ca.read_bytes()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(security.certificate, security.key)
    for key in ("ca.key", "server.key"):
        assert stat.S_IMODE((tmp_path / "server" / key).stat().st_mode) == 0o600
    assert not security.is_local
    assert open_server(tmp_path / "server").port == 8443


def test_a_clients_key_stays_where_it_was_made(tmp_path: Path) -> None:
    security = init(tmp_path / "server", "localhost", 8443)
    sent = request("alice", tmp_path / "alice")
    secret = (tmp_path / "alice" / "alice.key").read_text()
    assert stat.S_IMODE((tmp_path / "alice" / "alice.key").stat().st_mode) == 0o600
    kit, name, _, read_aloud, *_ = approve(security.folder, sent, tmp_path / "alice")
    assert set(json.loads(sent.read_text())) == {"fedloom", "name", "key"}
    for file in (sent, kit, *(tmp_path / "server").rglob("*.pub")):
        assert "PRIVATE KEY" not in file.read_text()
    assert "PRIVATE KEY" in secret
    assert read_aloud == identify_server(security.ca.read_text(), read_kit(kit).signer)
    assert list(security.clients()) == [name] == ["alice"]
    assert read_kit(kit).server == "localhost:8443"
    assert read_kit(kit).key == (tmp_path / "alice" / "alice.key").resolve()


def test_a_kit_without_its_key_is_refused(tmp_path: Path) -> None:
    security = init(tmp_path / "server", "localhost", 8443)
    kit = approve(security.folder, request("alice", tmp_path / "alice"), tmp_path).kit
    with pytest.raises(DeploymentError, match="alice's key is not there"):
        read_kit(kit)


def test_a_kit_without_a_certificate_is_for_the_loopback_alone(tmp_path: Path) -> None:
    for server in ("fed.example.org:8443", "192.0.2.7:8443", "localhost.example.org:8443", "127.0.0.2:8443"):
        (tmp_path / "a.kit").write_text(f'name = "a"\nserver = "{server}"\n')
        with pytest.raises(DeploymentError, match=r"for this machine alone; ask .* fedloom provision approve"):
            read_kit(tmp_path / "a.kit")


@pytest.mark.parametrize("cut", ["ca", "ca and signer"])
@pytest.mark.parametrize("server", ["localhost:8443", "127.0.0.1:8443", "fed.example.org:8443"])
def test_a_kit_that_lies_about_tls_is_not_joined_in_clear(cut: str, server: str, tmp_path: Path) -> None:
    """Without a certificate no fingerprint is asked for: whoever changed the kit on its way would be the server."""
    security = init(tmp_path / "server", "fed.example.org", 8443)
    kit, *_ = approve(security.folder, request("alice", tmp_path), tmp_path)
    told = tomllib.loads(kit.read_text())
    lines = {"name": told["name"], "server": server} | ({"signer": told["signer"]} if cut == "ca" else {})
    kit.write_text("".join(f'{key} = "{value}"\n' for key, value in lines.items()))
    with pytest.raises(DeploymentError) as refused:
        read_kit(kit)
    assert refused.value.mend
    # Nor where the kit calls itself otherwise, to be taken for one without a key: it is for this machine alone then.
    kit.write_text(kit.read_text().replace('"alice"', '"mallory"'))
    if server.startswith("fed"):
        with pytest.raises(DeploymentError):
            read_kit(kit)
    else:
        assert read_kit(kit).server.partition(":")[0] in keys.LOCAL


def test_a_kit_without_a_certificate_is_refused_wherever_the_key_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kit is often saved in another folder than the key's, from which `join` is started."""
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "alice.kit").write_text('name = "alice"\nserver = "localhost:8443"\n')
    request("alice", tmp_path)
    assert read_kit(tmp_path / "downloads" / "alice.kit").key is None
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeploymentError, match="where alice's key lies"):
        read_kit(tmp_path / "downloads" / "alice.kit")


def test_a_kit_without_a_certificate_is_refused_where_the_key_was_used_before(tmp_path: Path) -> None:
    """The key may lie elsewhere, and what was confirmed for it still says that this client has one."""
    (tmp_path / "alice.kit").write_text('name = "alice"\nserver = "localhost:8443"\n')
    assert read_kit(tmp_path / "alice.kit").key is None
    (tmp_path / "alice.known").write_text("")
    with pytest.raises(DeploymentError, match="it would ask for no fingerprint; ask the server's owner for the kit"):
        read_kit(tmp_path / "alice.kit")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('name = "a"\nserver = \n', r"it is not TOML: .*at line 2, column 10"),
        ('name = "a"\n', "it names no client or server"),
        ('name = "../a"\nserver = "localhost:1"\n', "not a name for a client"),
    ],
)
def test_a_kit_that_is_none_says_what_is_wrong_and_what_to_do(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.kit").write_text(text)
    with pytest.raises(DeploymentError, match=why) as refused:
        read_kit(tmp_path / "a.kit")
    assert refused.value.mend
    with pytest.raises(DeploymentError, match="No such file or directory; name the file"):
        read_kit(tmp_path / "b.kit")


def test_a_kits_authority_is_one_certificate_and_that_is_what_is_trusted(tmp_path: Path) -> None:
    """Fingerprints are told aloud: a second one would be trusted unseen."""
    security = init(tmp_path / "server", "localhost", 8443)
    other = init(tmp_path / "other", "localhost", 8443)
    kit, _, _, read_aloud, *_ = approve(security.folder, request("alice", tmp_path), tmp_path)
    sent, ca = kit.read_text(), security.ca.read_text()
    for wrong in (ca + other.ca.read_text(), ca.replace("MII", "MIX"), ca[:200], "none", other.key.read_text()):
        kit.write_text(sent.replace(ca, wrong))
        with pytest.raises(DeploymentError, match=r"alice.kit: ca: not exactly one certificate"):
            read_kit(kit)
    kit.write_text(sent.replace(ca, f"of the server's owner\n{ca}{other.key.read_text()}"))
    assert read_kit(kit).ca == ca
    assert read_kit(kit).fingerprint == read_aloud


@pytest.mark.parametrize(
    "server",
    ["localhost", "localhost:", ":8443", "localhost:0", "localhost:65536", "localhost:8443x", "localhost:८४४३",
     "localhost :8443", "localhost: 8443", "https://localhost:8443", "localhost:8443/", "a..b:1", f"{'a' * 64}:1", "",
     "::1:8443", "2001:db8::1:8443", "[localhost]:8443", "[::1]", "[::1]:",
     "[fe80::1%eth0]:8443", "[::1:8443", "[1:2]:8443"],
)  # fmt: skip
def test_a_kit_whose_server_is_mistyped_is_refused(server: str, tmp_path: Path) -> None:
    security = init(tmp_path / "server", "localhost", 8443)
    kit = approve(security.folder, request("alice", tmp_path), tmp_path).kit
    kit.write_text(kit.read_text().replace("localhost:8443", server))
    with pytest.raises(DeploymentError, match=r"alice.kit: server: not HOST:PORT"):
        read_kit(kit)


@pytest.mark.parametrize("server", ["fed.example.org:1", "10.0.0.1:65535", "[::1]:8443", "[2001:db8::1]:8443"])
def test_a_kits_server_is_a_name_or_an_address(server: str, tmp_path: Path) -> None:
    security = init(tmp_path / "server", "localhost", 8443)
    kit = approve(security.folder, request("alice", tmp_path), tmp_path).kit
    kit.write_text(kit.read_text().replace("localhost:8443", server))
    assert read_kit(kit).server == server


@pytest.mark.parametrize("text", ["", "\0", "name = 5", "x = " + "[" * 9999])
def test_a_kit_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.kit").write_text(text)
    with pytest.raises(DeploymentError, match="not a fedloom kit"):
        read_kit(tmp_path / "a.kit")


def test_a_name_has_one_key_until_it_is_revoked(tmp_path: Path) -> None:
    security = init(tmp_path / "server", "localhost", 8443)
    approve(security.folder, request("alice", tmp_path / "one"), tmp_path)
    other = request("alice", tmp_path / "two")
    with pytest.raises(DeploymentError, match="alice has another key already"):
        approve(security.folder, other, tmp_path)
    revoke(security.folder, "alice")
    assert not security.clients()
    approve(security.folder, other, tmp_path)
    with pytest.raises(DeploymentError, match='no client is named "bob"; known: alice'):
        revoke(security.folder, "bob")


@pytest.mark.parametrize("make", [ed25519.Ed25519PrivateKey.generate, lambda: ec.generate_private_key(ec.SECP256R1())])
def test_a_key_of_another_kind_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    """Flower would take none or another, when the run has begun."""
    security = init(tmp_path / "server", "localhost", 8443)
    public = make().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    (tmp_path / "a.request").write_text(json.dumps({"fedloom": 1, "name": "a", "key": public}))
    with pytest.raises(DeploymentError, match=r"a\.request: its key is not ECDSA on P-384; .*provision request"):
        approve(security.folder, tmp_path / "a.request", tmp_path)
    assert not security.clients()


def test_a_key_has_one_name(tmp_path: Path) -> None:
    security = init(tmp_path / "server", "localhost", 8443)
    asked = request("alice", tmp_path)
    approve(security.folder, asked, tmp_path)
    approve(security.folder, asked, tmp_path)
    told = json.loads(asked.read_text())
    asked.write_text(json.dumps({**told, "name": "bob", "key": told["key"] + " a comment"}))
    with pytest.raises(DeploymentError, match=r"alice has that key already; .*fedloom provision revoke alice"):
        approve(security.folder, asked, tmp_path)
    revoke(security.folder, "alice")
    approve(security.folder, asked, tmp_path)
    assert list(security.clients()) == ["bob"]


@pytest.mark.parametrize("name", ["../alice", "", "a b", "a" * 64, ".hidden"])
def test_a_name_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="not a name for a client"):
        request(name, tmp_path)
    security = init(tmp_path / "server", "localhost", 8443)
    asked = request("alice", tmp_path)
    asked.write_text(json.dumps({**json.loads(asked.read_text()), "name": name}))
    with pytest.raises(DeploymentError, match="not a name for a client"):
        approve(security.folder, asked, tmp_path)
    (tmp_path / "a.kit").write_text(f'name = "{name}"\nserver = "localhost:1"\n')
    with pytest.raises(DeploymentError, match=r"a\.kit: not a name for a client"):
        read_kit(tmp_path / "a.kit")


@pytest.mark.parametrize("text", ["", "{}", '{"name": "a", "key": "ssh-rsa AAAA"}', "\0", "[" * 9999])
def test_a_request_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    security = init(tmp_path / "server", "localhost", 8443)
    (tmp_path / "a.request").write_text(text)
    with pytest.raises(DeploymentError, match="not a fedloom request"):
        approve(security.folder, tmp_path / "a.request", tmp_path)


def test_a_certificate_that_ends_soon_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "DAYS LEFT" not in keys.describe_expiry(init(tmp_path / "one", "localhost", 1).expires())
    monkeypatch.setattr(keys, "SERVER_DAYS", 20)
    assert "ONLY 19 DAYS LEFT" in keys.describe_expiry(init(tmp_path / "two", "localhost", 1).expires())
    monkeypatch.setattr(keys, "SERVER_DAYS", 0)
    with pytest.raises(DeploymentError, match=r"expired .*fedloom provision renew"):
        init(tmp_path / "three", "localhost", 1)


def test_a_certificate_is_renewed_by_the_same_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SERVER_DAYS", 20)
    security = init(tmp_path / "server", "fed.example.org", 8443)
    before = security.certificate.read_bytes()
    kit, _, _, read_aloud, *_ = approve(security.folder, request("alice", tmp_path), tmp_path)
    monkeypatch.setattr(keys, "SERVER_DAYS", 365)
    assert "DAYS LEFT" not in keys.describe_expiry(keys.renew(tmp_path / "server").expires())
    assert identify_server(security.ca.read_text(), read_kit(kit).signer) == read_aloud
    ca, renewed = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (security.ca, security.certificate))
    renewed.verify_directly_issued_by(ca)
    assert security.certificate.read_bytes() != before
    ssl.create_default_context(cafile=security.ca).load_cert_chain(security.certificate, security.key)
    (tmp_path / "server" / "ca.key").unlink()
    with pytest.raises(DeploymentError, match="can't be read"):
        keys.renew(tmp_path / "server")


@pytest.mark.parametrize("host", ["::1", "[::1]", "0:0:0:0:0:0:0:1"])
def test_a_server_with_an_ipv6_address_is_named_in_brackets(host: str, tmp_path: Path) -> None:
    security = init(tmp_path / "server", host, 8443)
    assert security.host == "::1"
    assert not security.is_local, "the SuperLink itself has no IPv6"
    kit = approve(security.folder, request("alice", tmp_path), tmp_path).kit
    assert read_kit(kit).server == "[::1]:8443"
    certificate = x509.load_pem_x509_certificate(security.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "::1" in map(str, names.get_values_for_type(x509.IPAddress))


@pytest.mark.parametrize("host", ["a:b", "::1:8443:", "fe80::1%eth0", "[localhost]", "a b", ""])
def test_a_server_whose_host_is_none_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="not a host name or address"):
        init(tmp_path / "server", host, 8443)
    assert not (tmp_path / "server").exists()


def test_a_servers_keys_are_worked_with_once_at_a_time(tmp_path: Path) -> None:
    """A second one would write its own nginx.conf, which the first one's nginx takes when it is started again."""
    security = init(tmp_path / "server", "fed.example.org", 8443)
    recipe = load_recipe("tiny")
    first = tmp_path / "first"
    with keys.in_use(security.folder, first):
        who = rf"process {os.getpid()} on \S+"
        with pytest.raises(
            DeploymentError,
            match=rf"another server works with it \({who}\); end that one: fedloom stop {first}$",
        ):
            serve(recipe, tmp_path / "run", Observer(), security=security)
        assert not (tmp_path / "server" / "nginx.conf").exists()
    with keys.in_use(security.folder, tmp_path / "run"):
        pass


@pytest.mark.parametrize("room", [0, 200, 500])
def test_a_full_disk_leaves_no_half_of_a_key_and_all_can_be_run_again(room: int, tmp_path: Path) -> None:
    folder = tmp_path / "server"
    with no_file_above(room), pytest.raises(RunError, match=r"can't be written .*; make room for it, and run it again"):
        init(folder, "fed.example.org", 8443)
    assert not [*tmp_path.iterdir()]
    init(folder, "fed.example.org", 8443)
    with no_file_above(room), pytest.raises(RunError, match="can't be written"):
        request("alice", tmp_path)
    assert not (tmp_path / "alice.key").exists()
    asked = request("alice", tmp_path)
    with no_file_above(room), pytest.raises(RunError, match="can't be written"):
        approve(folder, asked, tmp_path)
    assert not (tmp_path / "alice.kit").exists()
    assert read_kit(approve(folder, asked, tmp_path).kit).key == (tmp_path / "alice.key").resolve()
