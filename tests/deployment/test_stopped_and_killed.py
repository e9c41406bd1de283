"""A server that is stopped and killed again and again while three clients stay: the adapters are those of one run."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import federation, run_here, split, tiny

from fedloom.deployment.server.nginx import find_nginx
from fedloom.recipe.loading import recipe_to_toml


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_stopped_and_killed_goes_on_with_the_clients_that_stayed(tmp_path: Path) -> None:
    asked = tiny("data.clients=3", "federation.rounds=4")
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(asked))
    with federation(tmp_path, secure=True, host="127.0.0.2" if find_nginx() else "localhost") as there:
        clients = [there.join(f"client-{number}", data) for number, data in enumerate(split(asked, tmp_path / "split"))]
        server = there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out))
        for complete, how in enumerate(("stop", "kill", "kill"), 2):
            there.wait_for_rounds(complete)
            if how == "stop":
                subprocess.run([sys.executable, "-m", "fedloom", "stop", str(there.out)], check=True, timeout=300)
            else:
                server.kill()
            server.wait(300)
            server = there.serve(str(there.out), "--resume")
        served = there.finish(server)
        assert [client.poll() for client in clients] == [None] * 3
    local = run_here(asked, tmp_path / "local")
    assert [record["adapter_sha256"] for record in served.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ]
