"""Approvals of clients: who is on the list, until when, and how a key is renewed or takes another's place."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.marks import first
from typer.testing import CliRunner

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from fedloom.cli import app
from fedloom.deployment import approvals, client_keys, keys
from fedloom.deployment.approvals import (
    Approval,
    changing,
    list_approvals,
    list_revoked,
    note_seen,
    read_approval,
    write_approval,
)
from fedloom.deployment.client.first_use import confirm_server
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.client_keys import public_key_of, read_request
from fedloom.deployment.fingerprints import identify_client
from fedloom.errors import DeploymentError
from fedloom.host import failpoints


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return keys.init(tmp_path / "server", "localhost", 8443).folder


def approve(server: Path, folder: Path, name: str = "alice", days: int | None = None) -> Path:
    """Return the kit of a new client, whose key is in a folder."""
    return keys.approve(server, keys.request(name, folder), folder, days).kit


def rotate(kit: Path) -> Path:
    """Return the request of a client's next key."""
    read = read_kit(kit)
    assert read.key
    return keys.rotate(read.name, read.key)


def set_end(server: Path, name: str, expires: datetime | None) -> None:
    found = list_approvals(server)[name]
    write_approval(server, Approval(name, found.key, found.since if expires else None, expires))


def ago(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def provision(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["provision", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


# The list


def test_the_list_says_who_is_taken_since_when_until_when_and_was_seen_when(server: Path, tmp_path: Path) -> None:
    approve(server, tmp_path)
    approve(server, tmp_path, "bob", 20)
    approve(server, tmp_path, "carol")
    approve(server, tmp_path, "dave")
    set_end(server, "carol", ago(1))
    keys.revoke(server, "dave")
    note_seen(server, ["alice"])
    os.utime(server / "seen" / "alice", (1_700_000_000, 1_700_000_000))

    told = json.loads(provision("list", "--server", server, "--json"))
    assert (told["host"], told["port"]) == ("localhost", 8443)
    assert told["fingerprint"] == read_kit(tmp_path / "alice.kit").fingerprint
    clients = {client["name"]: client for client in told["clients"]}
    states = {name: client["state"] for name, client in clients.items()}
    assert states == {"alice": "approved", "bob": "approved", "carol": "expired", "dave": "revoked"}
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    alice = clients["alice"]
    assert alice["fingerprint"] == identify_client("alice", public_key_of(tmp_path / "alice.key"))
    assert alice["since"][:10] == today == clients["dave"]["revoked"][:10]
    assert alice["seen"] == "2023-11-14T22:13:20Z"
    assert clients["bob"]["seen"] is None
    assert alice["expires"][:10] == f"{datetime.now(UTC) + timedelta(days=365):%Y-%m-%d}"

    shown = provision("list", "--server", server)
    row = re.search(r"^alice .*$", shown, re.MULTILINE)
    assert row
    assert row[0].split("  ")[-1] == alice["fingerprint"]
    assert "2023-11-14 22:13" in row[0]
    assert re.search(r"^dave +revoked \d{4}", shown, re.MULTILINE)
    assert "bob's key is taken until" in shown
    assert "ONLY 19 DAYS LEFT (fedloom provision renew bob)" in shown
    assert "carol's key is taken no longer: its approval ended on" in shown
    assert "alice's key" not in shown


def test_a_list_without_clients_or_server_says_what_to_do(server: Path, tmp_path: Path) -> None:
    assert "no clients yet: fedloom provision approve" in provision("list", "--server", server)
    assert json.loads(provision("list", "--server", server, "--json"))["clients"] == []
    with pytest.raises(DeploymentError, match="no server is set up in it; make one: fedloom provision init"):
        CliRunner().invoke(app, ["provision", "list", "--server", str(tmp_path / "nowhere")], catch_exceptions=False)


def test_a_server_whose_certificate_has_expired_is_listed_all_the_same(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "SERVER_DAYS", 0)
    keys.renew(server)
    assert ": THAT IS OVER (fedloom provision renew, on the server)" in provision("list", "--server", server)


PORTS = ["inf", "[1]", "-5", "65536", "true", "0x" + "f" * 9999, "[" * 9999]


@pytest.mark.parametrize("port", PORTS, ids=range(len(PORTS)))
def test_a_folder_whose_port_is_none_is_no_servers(port: str, server: Path) -> None:
    (server / "server.toml").write_text(f'host = "localhost"\nport = {port}\n')
    with pytest.raises(DeploymentError, match="no server is set up in it"):
        keys.read_server(server)


DAMAGES: list[Callable[[str], str]] = [
    lambda key: f"{key} since=yesterday",
    lambda key: f"{key} expires=2027-13-01T00:00:00Z",
    lambda key: f"{key} \xff",
    lambda key: "",
    lambda key: "hello",
    lambda key: key[:-5],
    lambda key: f"ssh-ed25519 {key.split()[1]}",
    lambda key: key + " " * 2**16,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_approval_that_can_not_be_read_is_named(damage: Callable[[str], str], server: Path, tmp_path: Path) -> None:
    approve(server, tmp_path)
    key = list_approvals(server)["alice"].key
    (server / "clients" / "alice.pub").write_text(damage(key), encoding="latin-1")
    with pytest.raises(DeploymentError, match=r"alice\.pub: not an approval .*; bring it back from a backup"):
        list_approvals(server)


def test_a_file_that_is_named_as_no_client_can_be_is_no_approval(server: Path, tmp_path: Path) -> None:
    approve(server, tmp_path)
    shutil.copy(server / "clients" / "alice.pub", server / "clients" / "alice (1).pub")
    with pytest.raises(DeploymentError, match=r"alice \(1\)\.pub: not an approval"):
        list_approvals(server)


def test_a_renewal_brings_no_key_back_that_was_revoked_meanwhile(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    approve(server, tmp_path)
    revoking = threading.Thread(target=keys.revoke, args=(server, "alice"))

    def list_slowly(folder: Path) -> dict[str, Approval]:
        found = list_approvals(folder)
        revoking.start()
        revoking.join(0.5)
        return found

    monkeypatch.setattr(keys, "list_approvals", list_slowly)
    keys.renew_client(server, "alice", tmp_path, 5)
    revoking.join()
    assert not list_approvals(server)
    assert [approval.name for approval in list_revoked(server)] == ["alice"]


def test_a_change_of_the_list_does_not_wait_for_ever(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approvals, "CHANGE_SECONDS", 0.1)
    with changing(server), pytest.raises(DeploymentError, match="another fedloom provision is changing the list"):
        keys.revoke(server, "alice")


# An end


def test_an_approval_ends_after_a_year_or_as_many_days_as_are_typed(server: Path, tmp_path: Path) -> None:
    for name, days in (("alice", None), ("bob", 7)):
        made = keys.approve(server, keys.request(name, tmp_path), tmp_path, days)
        assert abs(made.expires - ago(-(days or 365))) < timedelta(minutes=1)
        found = read_approval(server / "clients" / f"{name}.pub")
        assert found.expires == made.expires.replace(microsecond=0) == read_kit(made.kit).expires
        assert found.state == "approved"
    assert "approved until" in read_kit(tmp_path / "alice.kit").end
    assert "ONLY 6 DAYS LEFT (have the server's owner renew it" in read_kit(tmp_path / "bob.kit").end
    done = CliRunner().invoke(app, ["provision", "approve", str(tmp_path / "alice.request"), "--days", "0"])
    assert done.exit_code == 2


def test_a_key_is_renewed_by_its_clients_name(server: Path, tmp_path: Path) -> None:
    kit = approve(server, tmp_path)
    (tmp_path / "new").mkdir()
    before = list_approvals(server)["alice"]
    set_end(server, "alice", ago(1))
    assert list_approvals(server)["alice"].state == "expired"
    shown = provision("renew", "alice", "--days", 30, "--server", server, "--to", tmp_path / "new")
    after = list_approvals(server)["alice"]
    assert (after.key, after.since, after.state) == (before.key, before.since, "approved")
    assert after.expires
    assert f"taken until {after.expires:%Y-%m-%d}" in shown
    shutil.copy(tmp_path / "alice.key", tmp_path / "new")
    assert read_kit(tmp_path / "new" / "alice.kit").expires == after.expires
    assert read_kit(kit).key, "the kit that it has leads to the same server"
    with pytest.raises(DeploymentError, match='no client is named "bob"; known: alice'):
        keys.renew_client(server, "bob", tmp_path, 30)


def test_approving_again_prolongs_nothing_unless_days_are_typed(server: Path, tmp_path: Path) -> None:
    asked = keys.request("alice", tmp_path)
    first = keys.approve(server, asked, tmp_path, 7)
    assert keys.approve(server, asked, tmp_path).expires == first.expires.replace(microsecond=0)
    assert keys.approve(server, asked, tmp_path, 30).expires > first.expires
    set_end(server, "alice", ago(1))
    assert keys.approve(server, asked, tmp_path).expires > ago(-364), "what has ended begins anew"


def test_an_approval_and_a_kit_from_before_have_no_end(server: Path, tmp_path: Path) -> None:
    kit = approve(server, tmp_path)
    key = list_approvals(server)["alice"].key
    (server / "clients" / "alice.pub").write_text(f"{key}\n")
    shutil.rmtree(server / "seen")
    lines = [line for line in kit.read_text().splitlines() if not line.startswith(("key =", "expires ="))]
    kit.write_text("\n".join(lines) + "\n")
    found = list_approvals(server)["alice"]
    assert (found.key, found.since, found.expires, found.state) == (key, None, None, "approved")
    assert not found.describe_end()
    read = read_kit(kit)
    assert read.key == (tmp_path / "alice.key").resolve()
    assert read.end == "approved without an end: the kit is from before approvals had one"
    shown = provision("list", "--server", server)
    assert re.search(r"^alice +approved +unknown +never +no end", shown, re.MULTILINE)
    assert "alice: approved before approvals had an end, and taken until revoked; fedloom provision renew" in shown
    keys.renew_client(server, "alice", tmp_path, 365)
    assert "no end" not in provision("list", "--server", server)


@pytest.mark.parametrize("end", ['"soon"', "5", "2027-01-01", "2027-01-01T00:00:00"])
def test_a_kit_whose_end_is_none_is_refused(end: str, server: Path, tmp_path: Path) -> None:
    kit = approve(server, tmp_path)
    kit.write_text(re.sub(r"^expires = .*$", f"expires = {end}", kit.read_text(), flags=re.MULTILINE))
    with pytest.raises(DeploymentError, match=r"alice\.kit: expires: not a time in UTC; ask the server's owner"):
        read_kit(kit)


# Another key


def test_a_next_key_takes_the_place_of_the_one_that_signed_it(server: Path, tmp_path: Path) -> None:
    kit = approve(server, tmp_path, days=100)
    old, read = public_key_of(tmp_path / "alice.key"), read_kit(kit)
    confirm_server(read, read.fingerprint, None, lambda *_: None)
    before = list_approvals(server)["alice"]
    provision("rotate", kit)
    assert (tmp_path / "alice.key.next").stat().st_mode & 0o777 == 0o600
    assert read_kit(kit).key == tmp_path / "alice.key", "until the next kit comes"
    assert list_approvals(server)["alice"] == before, "nothing changes on the server until it approves"

    shown = provision("approve", tmp_path / "alice.request", "--server", server, "--to", tmp_path)
    new, after = read_request(tmp_path / "alice.request").key, list_approvals(server)["alice"]
    assert "the one before is taken no longer" in shown
    assert (after.key, after.expires) == (new, before.expires), "a signature prolongs nothing"
    assert old != new
    assert [found.key for found in list_revoked(server)] == [old]
    taken = read_kit(kit)
    assert taken.key == tmp_path / "alice.key.next"
    confirm_server(taken, None, None, lambda *_: None)  # the server is the one that was confirmed: nobody is asked
    assert not list(tmp_path.glob("*.key.known"))

    # And once more: the key in between is the one that signs.
    keys.approve(server, rotate(kit), tmp_path, days=200)
    assert public_key_of(tmp_path / "alice.key") == new
    last = read_kit(kit)
    assert last.key == tmp_path / "alice.key.next"
    assert last.expires
    assert last.expires > ago(-199)
    (tmp_path / "alice.key.next").rename(tmp_path / "alice.key")  # by whatever name it lies there
    assert read_kit(kit).key == tmp_path / "alice.key"


def test_a_next_key_is_waited_for_before_another_is_made(server: Path, tmp_path: Path) -> None:
    kit = approve(server, tmp_path)
    rotate(kit)
    with pytest.raises(DeploymentError, match="there is a next key already, which waits for its approval"):
        rotate(kit)
    (tmp_path / "a.kit").write_text('name = "a"\nserver = "localhost:1"\n')
    with pytest.raises(DeploymentError, match="a kit without a certificate has no key"):
        CliRunner().invoke(app, ["provision", "rotate", str(tmp_path / "a.kit")], catch_exceptions=False)


def by_nobody(told: dict[str, Any], other: dict[str, Any]) -> None:
    """Mallory's own key under alice's name, without a signature: as before, two people have to compare."""
    del told["signature"]


def by_another(told: dict[str, Any], other: dict[str, Any]) -> None:
    """A signature of another client's, who is approved too."""
    told["signature"] = other["signature"]


def with_another_key(told: dict[str, Any], other: dict[str, Any]) -> None:
    """Alice's signature beside a key that she did not name."""
    told["key"] = other["key"]


def under_another_name(told: dict[str, Any], other: dict[str, Any]) -> None:
    """What alice signed of herself, for bob."""
    told["name"] = "bob"


def no_signature_at_all(told: dict[str, Any], other: dict[str, Any]) -> None:
    told["signature"] = "00"


@pytest.mark.parametrize("forge", [by_nobody, by_another, with_another_key, under_another_name, no_signature_at_all])
def test_a_next_key_that_its_client_did_not_name_is_refused(
    forge: Callable[[dict[str, Any], dict[str, Any]], None], server: Path, tmp_path: Path
) -> None:
    asked = [rotate(approve(server, tmp_path / name, name)) for name in ("alice", "bob")]
    before = list_approvals(server)
    told, other = (json.loads(file.read_text()) for file in asked)
    forge(told, other)
    asked[0].write_text(json.dumps(told))
    with pytest.raises(DeploymentError, match=r"alice has another key already|not signed by the key that \w+ has here"):
        keys.approve(server, asked[0], tmp_path)
    assert list_approvals(server) == before
    assert not list_revoked(server)


def test_without_a_look_at_the_signature_a_forged_one_would_pass(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusals above are those of that look."""
    asked = rotate(approve(server, tmp_path))
    asked.write_text(json.dumps({**json.loads(asked.read_text()), "signature": "00"}))
    monkeypatch.setattr(client_keys, "_is_named_by", lambda asked, old: True)
    assert keys.approve(server, asked, tmp_path).replaced


def test_a_key_that_is_taken_no_longer_names_no_next_one(server: Path, tmp_path: Path) -> None:
    """Expired, revoked, or replaced: else a stolen key would live on for ever, and an old request bring one back."""
    kit = approve(server, tmp_path)
    first = rotate(kit)
    kept = first.read_bytes()
    set_end(server, "alice", ago(1))
    with pytest.raises(DeploymentError, match=r"the key that signed it is taken no longer: its approval ended on"):
        keys.approve(server, first, tmp_path)
    keys.revoke(server, "alice")
    with pytest.raises(DeploymentError, match=r"signed by a key of alice's that is not taken here; .* first request"):
        keys.approve(server, first, tmp_path)
    other = approve(server, tmp_path / "other")
    first.write_bytes(kept)
    with pytest.raises(DeploymentError, match="not signed by the key that alice has here"):
        keys.approve(server, first, tmp_path)
    # What brought the next key is of no use once there is one after it.
    second = rotate(other)
    played = second.read_bytes()
    keys.approve(server, second, tmp_path / "other")
    keys.approve(server, rotate(other), tmp_path / "other")
    second.write_bytes(played)
    with pytest.raises(DeploymentError, match="not signed by the key that alice has here"):
        keys.approve(server, second, tmp_path)


def is_killed(number: int, do: Callable[[], object]) -> bool:
    """Do something in another process, which is killed at a write, and return whether it came to that one."""
    child = os.fork()
    if child == 0:
        failpoints.arm(f"file.write=kill@{number}")
        do()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", first([2, 1, 3, 4]))
def test_what_is_killed_at_a_write_is_done_by_doing_it_again(number: int, server: Path, tmp_path: Path) -> None:
    kit = approve(server, tmp_path)
    first = list_approvals(server)["alice"].key
    assert is_killed(number, lambda: rotate(kit)) == (number <= 2)
    assert read_kit(kit).key == tmp_path / "alice.key", "she joins as before"
    asked = rotate(kit) if number <= 2 else tmp_path / "alice.request"
    coming = read_request(asked).key
    assert is_killed(number, lambda: keys.approve(server, asked, tmp_path)) == (number <= 3)
    assert list_approvals(server)["alice"].key in (first, coming), "the name is never without a key"
    keys.approve(server, asked, tmp_path)
    assert read_kit(kit).key == tmp_path / "alice.key.next"
    assert is_killed(number, lambda: keys.renew_client(server, "alice", tmp_path, 5)) == (number <= 3)
    keys.renew_client(server, "alice", tmp_path, 5)
    assert list_approvals(server)["alice"].key == coming
    assert {approval.key for approval in list_revoked(server)} == {first}
    assert is_killed(number, lambda: keys.revoke(server, "alice")) == (number == 1)
    if number == 1:
        keys.revoke(server, "alice")
    assert not list_approvals(server)


def test_a_kit_of_another_key_is_refused(server: Path, tmp_path: Path) -> None:
    kit = approve(server, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    keys.approve(server, rotate(kit), tmp_path / "elsewhere")
    (tmp_path / "alice.key.next").unlink()
    (tmp_path / "elsewhere" / "alice.kit").rename(kit)
    with pytest.raises(DeploymentError, match=r"alice\.kit: the kit is for another key of alice's than lies here"):
        read_kit(kit)
