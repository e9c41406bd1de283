"""Backup of a server's folder: what comes back is that server, and what is no backup leaves nothing behind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.full_disk import no_file_above
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from cryptography import x509
from support.federation_here import federation, split, tiny

from fedloom.cli import app
from fedloom.deployment import backup, keys
from fedloom.deployment.approvals import note_seen
from fedloom.deployment.backup import back_up, read_backup, restore
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.client_list import list_server
from fedloom.deployment.queue import Queue
from fedloom.deployment.signing import Signer, Verifier
from fedloom.errors import DeploymentError, RunError
from fedloom.host.files import hash_json
from fedloom.host.frames import Frame
from fedloom.recipe.loading import recipe_to_toml


@pytest.fixture
def server(tmp_path: Path) -> Path:
    folder = keys.init(tmp_path / "server", "fed.example.org", 8443).folder
    for name in ("alice", "bob", "carol"):
        keys.approve(folder, keys.request(name, tmp_path), tmp_path)
    keys.revoke(folder, "carol")
    note_seen(folder, ["alice"])
    queue = Queue(folder)
    for name in ("first", "second", "third"):
        queue.add(name, {"name": name}, tmp_path / "runs" / name)
    taken = queue.take()
    assert taken
    queue.end(taken, "done")
    queue.take()
    (folder / "queue" / "lock").unlink()
    return folder


@pytest.fixture
def saved(server: Path, tmp_path: Path) -> Path:
    assert back_up(server, tmp_path / "saved") == 2
    return tmp_path / "saved"


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode & 0o777, path.read_text())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_comes_back_is_the_same_server_to_its_clients(server: Path, saved: Path, tmp_path: Path) -> None:
    assert saved.stat().st_mode & 0o777 == 0o600
    kit = read_kit(tmp_path / "alice.kit")
    before, listed = contents(server), list_server(server)
    server.rename(tmp_path / "lost")
    restored = restore(saved, tmp_path / "elsewhere" / "server")
    assert contents(restored.folder) == before
    assert list_server(restored.folder) == listed, "who was seen when, too"
    states = [(entry.name, entry.state) for entry in Queue(restored.folder).read()[0]]
    assert states == [("first", "done"), ("second", "running"), ("third", "waiting")]
    going_on = Queue(restored.folder).take()
    assert going_on
    assert (going_on.name, going_on.resume) == ("second", True)
    assert restored.folder.stat().st_mode & 0o777 == 0o700
    keys.open_server(restored.folder)
    certificate = x509.load_pem_x509_certificate(restored.certificate.read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(kit.ca.encode()))
    question = Signer(restored.signing_key).sign(Frame({"do": "meet"}), "alice", 60.0)
    assert Verifier(kit.signer, "alice").open(question).manifest == {"do": "meet"}
    keys.approve(restored.folder, keys.request("dave", tmp_path), tmp_path)
    assert read_kit(tmp_path / "dave.kit").fingerprint == kit.fingerprint


def test_nothing_is_written_over(server: Path, saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    with pytest.raises(DeploymentError, match=r"saved: the file exists; name another with --to"):
        back_up(server, saved)
    assert saved.read_bytes() == content
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for there in (server, tmp_path / "empty", tmp_path / "link", saved):
        with pytest.raises(DeploymentError, match="the folder exists; name another with --to"):
            restore(saved, there)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_from_before_is_backed_up_too(server: Path, tmp_path: Path) -> None:
    (server / "signing.key").unlink()
    shutil.rmtree(server / "seen")
    shutil.rmtree(server / "revoked")
    shutil.rmtree(server / "queue")
    back_up(server, tmp_path / "saved")
    assert list_server(restore(tmp_path / "saved", tmp_path / "new").folder)["fingerprint"] is None


@pytest.mark.parametrize("room", [0, 200, 3000])
def test_a_full_disk_leaves_no_half_of_either(room: int, server: Path, tmp_path: Path) -> None:
    there = {*tmp_path.iterdir()}
    with no_file_above(room), pytest.raises(RunError, match="can't be written"):
        back_up(server, tmp_path / "saved")
    assert {*tmp_path.iterdir()} == there
    back_up(server, tmp_path / "saved")
    with no_file_above(min(room, 200)), pytest.raises(RunError, match="can't be written"):
        restore(tmp_path / "saved", tmp_path / "new")
    assert {*tmp_path.iterdir()} == {*there, tmp_path / "saved"}


def test_a_folder_that_is_no_server_is_not_backed_up(server: Path, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no server is set up in it"):
        back_up(tmp_path, tmp_path / "saved")
    other = keys.init(tmp_path / "other", "localhost", 1)
    shutil.copy(other.key, server / "server.key")
    with pytest.raises(DeploymentError, match="its keys and certificates do not belong together"):
        back_up(server, tmp_path / "saved")
    (server / "server.key").unlink()
    with pytest.raises(DeploymentError, match="do not belong together"):
        back_up(server, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_queue_that_is_damaged_is_mended_before_it_is_backed_up(server: Path, tmp_path: Path) -> None:
    """What comes of it could not be restored."""
    (server / "queue" / "000009.json").write_text("{")
    with pytest.raises(DeploymentError, match=r"000009.json: not a run of a queue: .*; remove it, and submit the run"):
        back_up(server, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# What is no backup


def refused(file: Path, tmp_path: Path, why: str) -> None:
    there = {*tmp_path.rglob("*")}
    with pytest.raises(DeploymentError, match=why) as error:
        restore(file, tmp_path / "new")
    assert error.value.mend
    assert {*tmp_path.rglob("*")} == there, "nothing is left, here or elsewhere"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"\xff\0", b"[" * 99999, b"1" * 9999, b'{"fedloom_backup": 1}']
)
def test_a_file_that_is_no_backup_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "file").chmod(0o600)
    refused(tmp_path / "file", tmp_path, "not a backup of fedloom provision backup; name a file")


def test_a_backup_that_is_not_whole_is_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[:-100])
    refused(saved, tmp_path, "not a backup")
    saved.write_bytes(content.replace(b"8443", b"8444"))
    refused(saved, tmp_path, "damaged, or of another version of fedloom")
    saved.write_bytes(content.replace(b'"fedloom_backup": 1', b'"fedloom_backup": 2'))
    refused(saved, tmp_path, "damaged, or of another version of fedloom")
    refused(tmp_path / "nothing", tmp_path, "can't read the backup: No such file")
    refused(tmp_path, tmp_path, "can read the private key|can't read the backup")


def test_a_backup_that_is_too_large_is_not_parsed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "MOST_BYTES", saved.stat().st_size - 1)
    refused(saved, tmp_path, "larger than")
    monkeypatch.setattr(backup, "MOST_BYTES", saved.stat().st_size)
    assert read_backup(saved)["files"]


def test_a_backup_that_others_can_read_is_refused(saved: Path, tmp_path: Path) -> None:
    saved.chmod(0o644)
    refused(saved, tmp_path, r"others on this machine can read the private key; chmod 600 '.*saved'")


Change = Callable[[dict[str, Any], Path], None]


def put(name: str, text: Any = "x") -> Change:
    """Put a file into a backup, or take one out of it."""

    def change(told: dict[str, Any], other: Path) -> None:
        told["files"][name] = text
        if text is None:
            del told["files"][name]

    return change


def of_another(*names: str) -> Change:
    """Take files of another server's."""
    return lambda told, other: told["files"].update({name: (other / name).read_text() for name in names})


def seen(name: str, moment: Any) -> Change:
    return lambda told, other: told["seen"].update({name: moment})


def as_signer(told: dict[str, Any], other: Path) -> None:
    told["files"]["signing.key"] = told["files"]["ca.key"]


def in_nginx(told: dict[str, Any], other: Path) -> None:
    """A host that would be more lines of the proxy's configuration."""
    told["files"]["server.toml"] = 'host = "a; } http { include /etc/passwd"\nport = 8443\n'


STRANGE = "it holds what no server's folder does"
NOT_ONE = "do not belong together"
WRONG: list[tuple[Change, str]] = [
    (put("../evil"), STRANGE),
    (put("/tmp/evil"), STRANGE),
    (put("clients/../../evil.pub"), STRANGE),
    (put("clients/.pub"), STRANGE),
    (put("clients/a/b.pub"), STRANGE),
    (put("clients"), STRANGE),
    (put("nginx.conf"), STRANGE),
    (put("queue/000004.json"), STRANGE),
    (put("queue/000004.json", "[" * 99999), STRANGE),
    (put("queue/000004.json", '{"name": "x", "recipe": {}, "out": "relative", "submitted": ""}'), STRANGE),
    (put("queue/4.json"), STRANGE),
    (put("queue/../000004.json"), STRANGE),
    (put("queue/lock"), STRANGE),
    (put("clients/a\0.pub"), STRANGE),
    (put("clients/alice.pub", 5), STRANGE),
    (put("clients/alice.pub", ["x"]), STRANGE),
    (put("clients/alice.pub", {"link": "/etc/passwd"}), STRANGE),
    (put("clients/alice.pub", "\ud800"), STRANGE),
    (put("clients/alice.pub", "x" * (2**16 + 1)), STRANGE),
    (put("clients/alice.pub", "ecdsa AAAA expires=never"), "not an approval"),
    (put("revoked/alice-20269999-000000.pub"), "not an approval"),
    (put("server.toml", None), "no server is set up in it"),
    (put("server.toml", "host = ["), "no server is set up in it"),
    (in_nginx, "not a host name or address"),
    (put("ca.key", None), NOT_ONE),
    (put("server.key", "x"), NOT_ONE),
    (put("signing.key", "x"), NOT_ONE),
    (as_signer, NOT_ONE),
    (of_another("ca.key"), NOT_ONE),
    (of_another("server.key"), NOT_ONE),
    (of_another("server.crt", "server.key"), NOT_ONE),
    (seen("../alice", "2026-01-01T00:00:00Z"), STRANGE),
    (seen("nobody", "2026-01-01T00:00:00Z"), STRANGE),
    (seen("alice", "yesterday"), STRANGE),
    (put("server.toml", 'host = "localhost"\nport = inf\n'), "no server is set up in it"),
    (seen("alice", 5), STRANGE),
]


def test_what_no_server_wrote_is_refused_and_nothing_of_it_is_left(saved: Path, tmp_path: Path) -> None:
    other = keys.init(tmp_path / "other", "localhost", 1).folder
    whole = json.loads(saved.read_text())
    for number, (change, why) in enumerate(WRONG):
        told = json.loads(json.dumps({key: whole[key] for key in ("files", "seen")}))
        change(told, other)
        saved.write_text(json.dumps({"fedloom_backup": 1, "sha256": hash_json(told), **told}))
        try:
            refused(saved, tmp_path, why)
        except BaseException as error:
            raise AssertionError(f"number {number}: {why}") from error


def test_without_a_look_at_the_names_a_backup_would_write_elsewhere(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusals above are those of that look."""
    told = {key: json.loads(saved.read_text())[key] for key in ("files", "seen")}
    told["files"]["../evil"] = "x"
    saved.write_text(json.dumps({"fedloom_backup": 1, "sha256": hash_json(told), **told}))
    monkeypatch.setattr(backup, "KEY_FILE", re.compile(".*"))
    restore(saved, tmp_path / "new")
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["alice (1).pub", ".alice.pub"])
def test_what_could_not_be_restored_is_not_backed_up(name: str, server: Path, tmp_path: Path) -> None:
    shutil.copy(server / "clients" / "alice.pub", server / "clients" / name)
    with pytest.raises(DeploymentError, match="not an approval"):
        back_up(server, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_both_are_commands(server: Path, tmp_path: Path) -> None:
    def provision(*words: object) -> str:
        done = CliRunner().invoke(app, ["provision", *map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert "with 2 clients; whoever has this file can be this server" in provision(
        "backup", "--server", server, "--to", tmp_path / "saved"
    )
    shown = provision("restore", tmp_path / "saved", "--to", tmp_path / "new")
    assert "server fed.example.org, port 8443" in shown
    assert "alice" in shown


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_was_restored_elsewhere_serves_the_same_clients(tmp_path: Path) -> None:
    recipe = tiny("data.clients=2", "federation.rounds=1")
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    data = split(recipe, tmp_path / "split")
    with federation(tmp_path, secure=True) as there:
        assert there.server
        for name, documents in zip(("alice", "bob"), data, strict=True):
            there.join(name, documents)
        back_up(there.server, tmp_path / "saved")
        shutil.rmtree(there.server)
        there.server = restore(tmp_path / "saved", tmp_path / "elsewhere" / "keys").folder
        served = there.finish(there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out)))
        assert served.plan["data"] == "alice, bob: each its own"
        clients = list_server(there.server)["clients"]
        assert all(client["seen"] for client in clients), "serve noted that they were there"
