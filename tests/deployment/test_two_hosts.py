"""docs/deploy.md followed to the letter by a server and two clients, each on a host of its own."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import Federation, run_here, split, tiny
from support.hosts_here import hosts, why_no_hosts

from fedloom.deployment.server.nginx import find_nginx
from fedloom.recipe.loading import recipe_to_toml
from fedloom.records.run import read_run

if find_nginx() is None:
    pytest.skip("nginx is not installed", allow_module_level=True)
if why := why_no_hosts():
    pytest.skip(why, allow_module_level=True)

GUIDE = Path(__file__).parents[2] / "docs" / "deploy.md"
SERVER, CLIENTS = "fed.example.org", ("alice", "bob")
PROBE = """
import http.client, socket, ssl, sys
with socket.socket() as probe:
    print(probe.connect_ex((sys.argv[1], 8000)) != 0)
for path in ("/v1/control/list-runs", "/v1/runtime/pull-task", "/v1/fleet/../control/list-runs", "/"):
    connection = http.client.HTTPSConnection(sys.argv[1], 8443, context=ssl._create_unverified_context())
    connection.request("POST", path)
    print(connection.getresponse().status)
"""


def six_commands() -> dict[str, list[str]]:
    """Read the guide's commands, by what they do."""
    section = GUIDE.read_text().partition("## Six commands")[2].partition("\n## ")[0]
    found = re.findall(r"fedloom ((?:provision )?(init|request|approve|serve|join|report) [^#`\n]+)", section)
    return {what: words.split() for words, what in found}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_guide_leads_two_hosts_from_nothing_to_the_adapter_of_a_local_run(tmp_path: Path) -> None:
    commands = six_commands()
    assert list(commands) == ["init", "request", "approve", "serve", "join", "report"]
    recipe = tiny("data.clients=2", "federation.rounds=1")
    home = {name: tmp_path / name for name in (SERVER, *CLIENTS)}
    for folder in home.values():
        folder.mkdir()
    (home[SERVER] / "recipe.toml").write_text(recipe_to_toml(recipe))
    for client, part in zip(CLIENTS, split(recipe, tmp_path / "parts"), strict=True):
        part.rename(home[client] / "documents.jsonl")  # the guide's name for it; a folder that is taken as it stands

    with hosts(SERVER, *CLIENTS) as host, ExitStack() as stack:
        there = Federation(tmp_path, stack, secure=False)

        def start(what: str, where: str, stdin: int | None = None) -> "subprocess.Popen[bytes]":
            words = [word.replace("alice", where) for word in commands[what]]
            return there.start(f"{where}-{what}", *words, before=host[where], folder=home[where], stdin=stdin)

        first = [start("init", SERVER), *(start("request", client) for client in CLIENTS)]
        assert [process.wait(100) for process in first] == [0, 0, 0]
        for client in CLIENTS:
            shutil.copy(home[client] / f"{client}.request", home[SERVER])
            words = [word.replace("alice", client) for word in commands["approve"]]
            approved = there.start(f"approve-{client}", *words, before=host[SERVER], folder=home[SERVER])
            assert approved.wait(100) == 0, there.said(f"approve-{client}")
            shutil.copy(home[SERVER] / f"{client}.kit", home[client])
        heard = {client: there.said(f"approve-{client}").splitlines() for client in CLIENTS}
        assert all(there.said(f"{client}-request").splitlines()[-1] == heard[client][1] for client in CLIENTS)
        for client in CLIENTS:
            ours, theirs = os.openpty()
            stack.callback(os.close, ours)
            start("join", client, theirs)
            os.close(theirs)
            there.wait_for(f"{client}-join", f"has the fingerprint {heard[client][3]}")
            os.write(ours, b"yes\n")
        server = start("serve", SERVER)  # who joins may come first
        there.wait_for("alice-join", "joining")
        assert "waiting   for fed.example.org:8443: connection refused" in there.said("alice-join")
        probe = subprocess.run([*host["alice"], sys.executable, "-c", PROBE, SERVER], capture_output=True, text=True)
        assert server.wait(300) == 0, there.said(f"{SERVER}-serve")
        assert start("report", SERVER).wait(100) == 0, there.said(f"{SERVER}-report")
    assert probe.stdout.split() == ["True", "403", "403", "403", "403"], probe.stderr

    local = run_here(recipe, tmp_path / "local")
    served = read_run(home[SERVER] / "runs" / "first")
    assert [record["adapter_sha256"] for record in served.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ]
    assert len(served.clients) == len(local.clients) == 2
    assert not list(home[SERVER].glob("**/alice.key")), "a client's key left its machine"
