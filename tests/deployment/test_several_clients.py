"""Several clients of one `fedloom join`, over Flower and IPv6: the adapter of a run here, with processes killed.

Of IPv6 it shows the kit's address, nginx, the look at the server, and Flower's own connection.
"""

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import SECONDS, federation, find_process, run_here, split, tiny

from fedloom.deployment import keys
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.server.nginx import find_nginx, has_ipv6
from fedloom.recipe.loading import recipe_to_toml

IPV6 = find_nginx() is not None and has_ipv6()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_clients_of_one_join_make_the_adapter_of_a_run_here_though_worker_and_server_are_killed(tmp_path: Path) -> None:
    """Each with its own key, over TLS; trained one after another, since the engine is the same everywhere then.

    The server goes on with what it has on record, and its clients come back.
    """
    recipe = tiny("data.clients=2", "federation.rounds=2")
    local = run_here(recipe, tmp_path / "local")
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    data = split(recipe, tmp_path / "split")
    with federation(tmp_path, secure=True, host="::1" if IPV6 else "localhost") as there:
        assert there.server
        names = "alice", "bob"
        kits = [keys.approve(there.server, keys.request(name, tmp_path), tmp_path).kit for name in names]
        words = str(tmp_path / "tiny.toml"), "--out", str(there.out)
        server = there.serve(*words, FEDLOOM_FAILPOINT="round.begins=kill@2")
        documents = [word for folder in data for word in ("--data", str(folder))]
        confirmed = "--fingerprint", read_kit(kits[0]).fingerprint
        node = there.start("join", "join", *map(str, kits), *documents, *confirmed)
        there.wait_for("join", "round 1   bob: training")
        os.kill(find_process(node.pid, "fedloom.deployment.client.worker_process"), signal.SIGKILL)
        assert server.wait(SECONDS) == -signal.SIGKILL
        run = there.finish(there.serve(str(there.out), "--resume"))
        said = there.said("join")
    assert run.status["resumed"] == 1
    assert [one["adapter_sha256"] for one in run.rounds] == [one["adapter_sha256"] for one in local.rounds]
    assert [one["lost"] for one in run.rounds] == [[]] * 3
    assert "restart   the worker ended" in said
    assert f"joining   {'[::1]' if IPV6 else 'localhost'}:{there.port} as bob" in said
    for name in names:
        assert f"told      {name}: the adapter of round 2" in said
        assert (tmp_path / f"{name}.journal.jsonl").read_text().count('"kind": "train"') >= 2
