"""Links between a client and the server that are cut, slow, or slower than the deadline, under TLS."""

import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import federation, run_here, split, tiny
from support.slow_link import slow_link

from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
CUT_SECONDS = 20.0
ROUNDS = 40
"""Rounds of a run in which a client is lost: while it is, they take seconds, and it needs a minute to come back."""
MEGABIT = 125_000
"""Bytes."""
OF_OPT_350M = [
    "adapter.rank=768",
    'adapter.targets=["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]',
]
"""Adapter as large as one of OPT-350M's, 6.3 MB, on a tiny model."""


def write(recipe: Recipe, folder: Path) -> str:
    (folder / "recipe.toml").write_text(recipe_to_toml(recipe))
    return str(folder / "recipe.toml")


def hashes(run: Run) -> list[str]:
    return [record["adapter_sha256"] for record in run.rounds]


def test_a_link_that_is_cut_and_healed_costs_no_round(tmp_path: Path) -> None:
    """Cut a link in training, and between rounds."""
    asked = tiny("data.clients=2", "federation.rounds=3", "training.epochs=5")
    with federation(tmp_path, secure=True) as there, slow_link(there.port) as link:
        folders = split(asked, tmp_path / "split")
        there.join("client-0", folders[0])
        there.join("client-1", folders[1], through=link.port)
        server = there.serve(write(asked, tmp_path), "--out", str(there.out))
        for cut in ("in training", "between rounds"):
            if cut == "in training":
                there.wait_for("client-1", "round 1   training")
            else:
                there.wait_for_rounds(3)
            before = there.committed()
            link.cut()
            time.sleep(CUT_SECONDS)
            link.heal()
            healed = time.monotonic()
            there.wait_for_rounds(before + 1)
            print(f"{cut}: {time.monotonic() - healed:.0f} s from healed to the next round")
        served = there.finish(server)
    assert link.carried_bytes > 0
    assert hashes(served) == hashes(run_here(asked, tmp_path / "local"))
    assert [record["lost"] for record in served.rounds] == [[]] * 4
    assert len(served.clients) == 6


@pytest.mark.parametrize("when", ["in training", "between rounds"])
def test_a_connection_that_vanishes_without_a_word_costs_no_round(when: str, tmp_path: Path) -> None:
    """Have all of a client's connections carry nothing any more, and neither side hear that: what it opens later works.

    Flower's client gives up an answer after 30 s; it asks again on a new connection, and the round goes on.
    """
    asked = tiny("data.clients=3", "federation.rounds=4", "federation.max_lost_clients=1", "training.epochs=4")
    with federation(tmp_path, secure=True) as there, slow_link(there.port) as link:
        folders = split(asked, tmp_path / "split")
        for number in range(3):
            there.join(f"client-{number}", folders[number], through=link.port if number == 1 else None)
        server = there.serve(write(asked, tmp_path), "--out", str(there.out))
        if when == "in training":
            there.wait_for("client-1", "round 2   training")
        else:
            there.wait_for_rounds(3)
        before, vanished = there.committed(), time.monotonic()
        link.vanish()
        there.wait_for_rounds(before + 1)
        print(f"{when}: {time.monotonic() - vanished:.0f} s from vanished to the next round")
        served = there.finish(server)
    assert hashes(served) == hashes(run_here(asked, tmp_path / "local"))
    assert [record["lost"] for record in served.rounds] == [[]] * 5
    assert len(served.clients) == 12


def test_a_link_of_a_megabit_a_second_carries_an_adapter_of_opt_350m(tmp_path: Path) -> None:
    asked = tiny("data.clients=2", "federation.rounds=1", *OF_OPT_350M)
    with federation(tmp_path, secure=True) as there, slow_link(there.port) as link:
        folders = split(asked, tmp_path / "split")
        (tmp_path / "policy.toml").write_text("max_trained = 1.0\n")  # so large an adapter of so small a model
        allowed = "--policy", str(tmp_path / "policy.toml")
        there.join("client-0", folders[0], *allowed)
        there.join("client-1", folders[1], *allowed, through=link.port)
        server = there.serve(write(asked, tmp_path), "--out", str(there.out))
        there.wait_for("serve", "client-1:")
        link.bytes_per_second = MEGABIT
        started, before = time.monotonic(), link.carried_bytes
        assert server.wait(900) == 0, there.said("serve")
        seconds, carried = time.monotonic() - started, link.carried_bytes - before
        served = there.finish(server)
    print(f"{carried / 1e6:.1f} MB in {seconds:.0f} s; the round {served.rounds[1]['train_seconds']:.0f} s")
    payload = 4 * served.plan["trainable_parameters"]
    assert 6.2e6 < payload < 6.4e6
    assert carried > 3 * payload, "two adapters to the client and one back"
    assert hashes(served) == hashes(run_here(asked, tmp_path / "local"))
    assert "retry" not in there.said("serve")


def test_a_client_slower_than_the_deadline_is_lost_and_comes_back(tmp_path: Path) -> None:
    """Slow a link so far that an answer takes more than ten deadlines."""
    overrides = ("federation.max_lost_clients=1", "federation.round_deadline=30", "training.epochs=5")
    asked = tiny("data.clients=2", f"federation.rounds={ROUNDS}", *overrides)
    with federation(tmp_path, secure=True) as there, slow_link(there.port) as link:
        folders = split(asked, tmp_path / "split")
        there.join("client-0", folders[0])
        there.join("client-1", folders[1], through=link.port)
        server = there.serve(write(asked, tmp_path), "--out", str(there.out))
        there.wait_for("client-1", "round 2   training")
        link.bytes_per_second = 20
        there.wait_for("serve", "lost")
        there.wait_for_rounds(3)
        link.bytes_per_second = float("inf")
        served = there.finish(server)
    lost = [record["lost"] for record in served.rounds]
    assert lost[1] == []
    assert lost[2] == [1]
    assert lost[-1] == []
    assert "no answer within 0:30" in served.rounds[2]["lost_because"]["1"]
    assert "what comes later is refused" in there.said("serve")
    assert len(served.clients) == 2 * ROUNDS - sum(map(len, lost))
