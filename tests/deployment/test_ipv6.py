"""A federation over IPv6 alone: the kit's address, nginx, the look at the server, and Flower's own connection."""

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import federation, run_here, split, tiny

from fedloom.deployment.server.nginx import find_nginx, has_ipv6
from fedloom.recipe.loading import recipe_to_toml

if find_nginx() is None:
    pytest.skip("nginx is not installed", allow_module_level=True)
if not has_ipv6():
    pytest.skip("no IPv6 here", allow_module_level=True)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_client_joins_over_ipv6(tmp_path: Path) -> None:
    recipe = tiny("data.clients=1", "federation.rounds=1")
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    (data,) = split(recipe, tmp_path / "split")
    with federation(tmp_path, secure=True, host="::1") as there:
        server = there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out))
        there.join("alice", data)
        there.wait_for("alice", f"joining   [::1]:{there.port} as alice")
        served = there.finish(server)
    local = run_here(recipe, tmp_path / "local")
    assert [record["adapter_sha256"] for record in served.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ]
