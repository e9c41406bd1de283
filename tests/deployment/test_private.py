"""A private run over real processes, by a column: bounded on the client, a killed worker answers the same."""

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import federation, split, tiny

from fedloom.deployment.client.journal import Journal, open_ledger, standing
from fedloom.recipe.loading import recipe_to_toml

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_a_private_run_is_bounded_by_its_clients_and_a_killed_worker_answers_the_same(tmp_path: Path) -> None:
    recipe = tiny(
        "data.clients=2", "federation.rounds=3", "data.client_holdout=0.0", "data.central_holdout=20",
        "privacy.epsilon=8.0", "privacy.delta=1e-3", "privacy.unit=package",
    )  # fmt: skip
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    (tmp_path / "policy.toml").write_text(
        '[privacy]\nunit = "package"\nmax_epsilon = 20.0\ndelta = 1e-3\nmin_noise_multiplier = 3.0\n'
    )
    with federation(tmp_path, secure=True) as there:
        data = split(recipe, tmp_path / "split")
        # The answer to round 2 is on disk, and nobody has it yet.
        there.join("client-0", data[0], "--columns", "package", FEDLOOM_FAILPOINT="answer.written=kill@2")
        there.join("client-1", data[1], "--policy", str(tmp_path / "policy.toml"))
        served = there.finish(there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out)))
        said = {name: there.said(name) for name in ("client-0", "client-1", "serve")}
    assert "the worker ended; starting it again" in said["client-0"]
    assert "the same adapter of round 2 as before, which costs nothing more" in said["client-0"]
    spent = "of all documents of any one package together is spent (δ = 0.001), 20 is left"
    assert spent in said["client-1"], "when it began"
    assert 'values of "package", whatever they say' in said["client-1"]
    assert "on average; told to nobody" in said["client-0"]
    assert "min_noise_multiplier = 3 is taken" in said["client-1"]
    for name in ("client-0", "client-1"):
        journal = Journal(tmp_path / name / f"{name}.journal.jsonl")
        kinds = [entry.kind for entry in journal.read()]
        assert (kinds.count("train"), kinds.count("answer")) == (3, 3)
        told = served.plan["privacy"]["clients"][name[-1]]
        assert open_ledger(standing(journal.read()), "package").epsilon(1e-3) == pytest.approx(
            told["epsilon"], rel=1e-3
        )
    assert served.plan["privacy"]["clients"]["1"]["noise_multiplier"] == 3.0
    assert served.rounds[-1]["lost"] == []
    records = json.dumps([served.rounds, served.clients])
    assert not [key for key in ("train_loss", "holdout_loss", "loss_first") if key in records]
    assert {record["tokens"] for record in served.clients} == {0}
