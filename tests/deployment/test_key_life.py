"""Life of a client's key while a server runs: it ends, is renewed, and another takes its place."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import confirmed, end, federation, split, tiny

from fedloom.deployment import keys
from fedloom.deployment.approvals import Approval, list_approvals, write_approval
from fedloom.deployment.client.joining import read_kit
from fedloom.recipe.loading import recipe_to_toml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_key_ends_is_renewed_and_replaced_while_its_server_waits(tmp_path: Path) -> None:
    recipe = tiny("data.clients=2", "federation.rounds=1")
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    data = split(recipe, tmp_path / "split")
    with federation(tmp_path, secure=True) as there:
        assert there.server
        server = there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out), "--wait", "1200")
        there.wait_for("serve", "waiting")
        alice = there.join("alice", data[0])
        there.wait_for("serve", "client    alice")

        found = list_approvals(there.server)["alice"]
        ended = datetime.now(UTC) - timedelta(seconds=1)
        write_approval(there.server, Approval("alice", found.key, found.since, ended))
        there.wait_for("serve", "expired   alice's key is taken no longer")
        there.wait_for("alice", "not yet")  # she was let go of, and is refused
        keys.renew_client(there.server, "alice", tmp_path, 365)
        there.wait_for("serve", "client    alice", times=2)

        kit = tmp_path / "alice" / "alice.kit"
        key = read_kit(kit).key
        assert key
        keys.approve(there.server, keys.rotate("alice", key), kit.parent)
        there.wait_for("alice", "not yet", times=2)  # the old key, which the same `join` still has
        end(alice)
        there.start("alice-again", "join", str(kit), *confirmed(kit), "--data", str(data[0]))
        there.wait_for("serve", "client    alice", times=3)
        there.join("bob", data[1])
        assert there.finish(server).plan["data"] == "alice, bob: each its own"
