"""SuperLink of a server: another user of its machine operates nothing there; and its clients' keys."""

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import DOORS, Served
from support.marks import first

from fedloom.deployment import keys
from fedloom.deployment.approvals import last_seen, read_approval, write_approval
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.client_keys import public_key_of
from fedloom.deployment.processes import private_folder
from fedloom.deployment.server import superlink
from fedloom.deployment.server.superlink import SuperLink
from fedloom.errors import DeploymentError
from fedloom.host.frames import Frame
from fedloom.run_options import choose_port


@pytest.mark.timeout(900)
@pytest.mark.xdist_group("served")
@pytest.mark.parametrize("path", first(DOORS))
def test_who_has_the_certificate_alone_operates_nothing(path: str, served: Served) -> None:
    """Knock where the server itself operates it: its app was submitted there."""
    assert served.doors[path] == DOORS[path]


class ScriptedSuperLink(SuperLink):
    """Takes keys as Flower does: none twice while it runs, even one whose node was unregistered."""

    def __init__(self, folder: Path, security: keys.Security, said: list[str]) -> None:
        super().__init__(folder, security.port, security, lambda what, detail: said.append(f"{what} {detail}"))
        self.begun = 0
        self.let_go: list[str] = []
        self.given: dict[str, str] = {}

    def open(self) -> None:
        self.begun += 1
        self.given.clear()
        self._registered, self._taken = {}, {}
        self._register()

    def _change_nodes(self, asked: Mapping[str, str], let_go: Sequence[str]) -> Mapping[str, str]:
        if let_go:
            self.let_go += let_go
            return {}
        refused = {name: "Public key already in use." for name in asked if asked[name] in self.given or name == "eve"}
        self.given |= {key: name for name, key in asked.items() if name not in refused}
        return refused

    def _ask(self, frame: Frame) -> Frame:
        return Frame({"nodes": [[name, name, key] for key, name in self.given.items()]})


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[tuple[ScriptedSuperLink, list[str]]]:
    said: list[str] = []
    security = keys.init(tmp_path / "server", "localhost", 1)
    with private_folder() as folder, closing(ScriptedSuperLink(folder, security, said)) as link:
        link.open()
        yield link, said


@pytest.mark.parametrize(
    ("host", "mend"),
    [
        ("localhost", "fedloom provision init --host localhost --port N --server FOLDER"),
        ("fed.example.org", "choose another with --port"),
    ],
)
def test_a_port_that_is_taken_is_told_with_what_leads_to_another(
    host: str, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink, "FREE_SECONDS", 0.0)
    said: list[tuple[str, str]] = []
    with socket.create_server(("127.0.0.1", 0)) as taken, private_folder() as folder:
        security = keys.init(tmp_path / "server", host, port := taken.getsockname()[1])
        with closing(SuperLink(folder, port, security, lambda *words: said.append(words))) as link:
            with pytest.raises(DeploymentError, match=f"port {port} is taken") as caught:
                link.open()
            assert mend in caught.value.mend
    assert said == [("server", f"port {port} is taken: it is waited for, 0 s at most")]


def test_a_local_server_has_its_kits_port_and_says_so_where_another_is_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = keys.init(tmp_path / "local", "localhost", 8501)
    far = keys.init(tmp_path / "far", "fed.example.org", 8501)
    assert [choose_port(typed, local) for typed in (None, 8501)] == [8501, 8501]
    assert [choose_port(typed, far) for typed in (None, 8502)] == [8000, 8502]
    assert [choose_port(typed, None) for typed in (None, 8502)] == [8000, 8502]
    assert not capsys.readouterr().out
    assert choose_port(8502, local) == 8501
    assert "--port 8502 has no effect: kits of a server on localhost lead to 8501" in capsys.readouterr().out


def names_of(link: SuperLink) -> list[str]:
    return [node.name for node in link.nodes()]


@pytest.mark.parametrize("looks", [True, False])
def test_a_name_that_has_another_key_is_not_open_to_the_old_one(
    looks: bool, scripted: tuple[ScriptedSuperLink, list[str]], tmp_path: Path
) -> None:
    """Nodes may not have been there when the key was revoked, so that Flower still takes it."""
    link, _ = scripted
    server = tmp_path / "server"
    keys.approve(server, keys.request("alice", tmp_path / "old"), tmp_path)
    assert names_of(link) == ["alice"]
    keys.revoke(server, "alice")
    if looks:
        link._register()
    keys.approve(server, keys.request("alice", tmp_path / "new"), tmp_path)
    with pytest.raises(OSError, match="keys changed"):
        link.nodes()
    link.reopen()
    assert link.begun == 2
    assert names_of(link) == ["alice"]
    assert [*link.given] == [read_approval(server / "clients" / "alice.pub").key]


def test_a_key_that_was_revoked_can_be_approved_again(
    scripted: tuple[ScriptedSuperLink, list[str]], tmp_path: Path
) -> None:
    link, said = scripted
    asked = keys.request("alice", tmp_path)
    keys.approve(tmp_path / "server", asked, tmp_path)
    assert names_of(link) == ["alice"]
    for _ in range(2):
        keys.revoke(tmp_path / "server", "alice")
        link._register()
        keys.approve(tmp_path / "server", asked, tmp_path)
        with pytest.raises(OSError, match="keys changed"):
            link.nodes()
        link.reopen()
        assert names_of(link) == ["alice"]
    assert link.begun == 3
    assert not [words for words in said if words.startswith("refused")]


def test_a_key_that_flower_does_not_take_does_not_end_the_run(
    scripted: tuple[ScriptedSuperLink, list[str]], tmp_path: Path
) -> None:
    link, said = scripted
    for name in ("alice", "eve"):
        keys.approve(tmp_path / "server", keys.request(name, tmp_path), tmp_path)
    assert names_of(link) == names_of(link) == ["alice"]
    assert said == ["refused eve's key, which Flower does not take: Public key already in use."], "once"
    keys.revoke(tmp_path / "server", "eve")
    assert names_of(link) == ["alice"]
    assert link.begun == 1


def test_a_key_whose_approval_ends_is_let_go_of_and_taken_again_when_it_is_renewed(
    scripted: tuple[ScriptedSuperLink, list[str]], tmp_path: Path
) -> None:
    link, said = scripted
    server = tmp_path / "server"
    keys.approve(server, keys.request("alice", tmp_path), tmp_path)
    assert names_of(link) == ["alice"]
    keys.approve(server, keys.request("bob", tmp_path), tmp_path, days=20)
    assert names_of(link) == ["alice", "bob"]
    assert last_seen(server, "bob")
    assert len(said) == 1
    assert re.fullmatch(
        r"keys bob's key is taken until \S+: ONLY 19 DAYS LEFT \(fedloom provision renew bob\)", said[0]
    )

    ended = replace(read_approval(server / "clients" / "bob.pub"), expires=datetime.now(UTC) - timedelta(seconds=1))
    write_approval(server, ended)
    link.let_go.clear()
    assert names_of(link) == names_of(link) == ["alice"]
    assert link.let_go == ["bob", "bob"], "whoever is there with it, at each look"
    assert len(said) == 2, "once"
    assert re.fullmatch(
        r"expired bob's key is taken no longer: its approval ended on \S+ \(fedloom provision renew bob\)", said[1]
    )
    keys.renew_client(server, "bob", tmp_path, 365)
    with pytest.raises(OSError, match="keys changed"):
        link.nodes()
    link.reopen()
    assert names_of(link) == ["alice", "bob"]


def test_a_key_that_took_the_place_of_another_is_the_only_one_that_is_taken(
    scripted: tuple[ScriptedSuperLink, list[str]], tmp_path: Path
) -> None:
    link, _ = scripted
    server = tmp_path / "server"
    kit = keys.approve(server, keys.request("alice", tmp_path), tmp_path).kit
    assert names_of(link) == ["alice"]
    key = read_kit(kit).key
    assert key
    keys.approve(server, keys.rotate("alice", key), tmp_path)
    with pytest.raises(OSError, match="keys changed"):
        link.nodes()
    link.reopen()
    assert [*link.given] == [public_key_of(tmp_path / "alice.key.next")]
    assert names_of(link) == ["alice"]


def test_an_approval_that_can_not_be_read_is_refused_and_ends_no_run(
    scripted: tuple[ScriptedSuperLink, list[str]], tmp_path: Path
) -> None:
    link, said = scripted
    keys.approve(tmp_path / "server", keys.request("alice", tmp_path), tmp_path)
    (tmp_path / "server" / "clients" / "eve.pub").write_text("ecdsa AAAA expires=never\n")
    assert names_of(link) == names_of(link) == ["alice"]
    assert len(said) == 1, "once"
    assert "eve.pub: not an approval" in said[0]


def test_a_superlink_that_had_worked_for_long_has_all_its_restarts_again(
    scripted: tuple[ScriptedSuperLink, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service waits for weeks without an answer in between: it was given up for the sixth time in all."""
    link, _ = scripted
    monkeypatch.setattr(superlink, "SETTLED_SECONDS", 0.0)
    for _ in range(superlink.RESTARTS + 2):
        link.reopen()
    monkeypatch.setattr(superlink, "SETTLED_SECONDS", 1e12)
    for _ in range(superlink.RESTARTS - 1):
        link.reopen()
    with pytest.raises(DeploymentError, match="the SuperLink ended 5 times in a row"):
        link.reopen()
