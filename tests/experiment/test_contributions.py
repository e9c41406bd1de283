"""What each client brings: federations without it, and Shapley values of them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.marks import first
from support.planted import run_planted
from support.tiny import make_blocks, make_recipe

from fedloom import run
from fedloom.data.tokens import ClientBlocks, TokenBlocks
from fedloom.deployment.server.serving import check_deployable
from fedloom.errors import RecipeError
from fedloom.experiment import arms, contributions
from fedloom.experiment.run import plan
from fedloom.experiment.sweep import sweep
from fedloom.federation.coalitions import Coalition
from fedloom.host import failpoints
from fedloom.monitoring.display import render_plan
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import judged_loss

NOBODYS = make_blocks(0, 16)
CENTRAL = make_blocks(6, 16, seed=50)


def recipe_of(**changes: Any) -> Recipe:
    return make_recipe(**{"contributions": True, "model": {"dtype": "float64"}, **changes})


def told_by(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "contributions.json").read_text()))


def arms_of(folder: Path) -> dict[Coalition, dict[str, Any]]:
    return {frozenset(one["clients"]): one for one in told_by(folder)["coalitions"]}


def held_by(number: int) -> list[ClientBlocks]:
    return [
        ClientBlocks(make_blocks(4 + client, 16, seed=client), make_blocks(3, 16, seed=20 + client))
        for client in range(number)
    ]


@pytest.mark.parametrize(
    ("central", "changes"),
    first(
        [
            (False, {}),
            (True, {"federation": {"rounds": 3, "fraction": 0.6, "strategy": {"kind": "fedadam"}}}),
            (False, {"federation": {"lora_rule": "fedsa"}}),
            (True, {"federation": {"lora_rule": "fedex"}}),
            (False, {"training": {"engine": "reference"}, "federation": {"lora_rule": "rolora"}}),
            (True, {"federation": {"lora_rule": "svd", "client_ranks": [1, 2, 2]}}),
        ],
        every=2,
    ),
)
def test_an_arm_is_the_run_that_there_would_be_without_the_client(
    central: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Its own run directory, in which the client holds nothing to train on, has the same losses."""
    held, own = held_by(3), CENTRAL if central else NOBODYS
    whole = run_planted(recipe_of(**changes), tmp_path / "run", held, own)
    told, found = told_by(tmp_path / "run"), arms_of(tmp_path / "run")
    assert len(found) == 6
    for client in range(3):
        left = [one if k != client else ClientBlocks(NOBODYS, one.holdout) for k, one in enumerate(held)]
        recipe = recipe_of(**changes, contributions=False)
        without = run_planted(recipe, tmp_path / f"without-{client}", left, own)
        arm = found[frozenset({0, 1, 2} - {client})]
        assert arm["tokens"] == sum(record["train_tokens"] for record in without.rounds)
        best, ours = without.rounds[without.best_round or 0], whole.rounds[whole.best_round or 0]
        if central:
            assert arm["losses"] == {"central": pytest.approx(best["central_loss"], rel=1e-9)}
            brings = best["central_loss"] - ours["central_loss"]
        else:
            assert arm["losses"] == pytest.approx(best["client_losses"], rel=1e-9)
            others = [str(other) for other in range(3) if other != client]
            tokens = {other: int((held[int(other)].holdout.lengths_N - 1).sum()) for other in others}
            changed = {other: best["client_losses"][other] - ours["client_losses"][other] for other in others}
            brings = sum(changed[other] * tokens[other] for other in others) / sum(tokens.values())
        assert told["leave_one_out"][str(client)] == pytest.approx(brings, rel=1e-6, abs=1e-9)
    fell = judged_loss(whole.rounds[0]) - judged_loss(whole.rounds[whole.best_round or 0])
    assert sum(one["value"] for one in told["shapley"].values()) == pytest.approx(fell, rel=1e-9)


@pytest.mark.long
def test_identical_clients_bring_the_same(tmp_path: Path) -> None:
    same = ClientBlocks(make_blocks(6, 16, seed=1), make_blocks(4, 16, seed=2))
    recipe = recipe_of(training={"batch_size": 6, "epochs": 8, "proximal_mu": 0.0})
    whole = run_planted(recipe, tmp_path / "run", [same] * 3, CENTRAL)
    told = told_by(tmp_path / "run")
    assert [*told["leave_one_out"].values()] == pytest.approx([0.0] * 3, abs=1e-9)
    fell = whole.rounds[0]["central_loss"] - whole.rounds[-1]["central_loss"]
    assert [one["value"] for one in told["shapley"].values()] == pytest.approx([fell / 3] * 3, rel=1e-6)
    assert fell > 0.01


def noise(num_blocks: int, seed: int) -> TokenBlocks:
    """Blocks of which nothing can be learnt: each token is drawn by itself."""
    blocks = make_blocks(num_blocks, 16, seed)
    drawn = torch.randint(0, 250, blocks.tokens_NT.shape, generator=torch.Generator().manual_seed(seed))
    return TokenBlocks(drawn, blocks.lengths_N, blocks.counted_NT)


@pytest.mark.long
def test_planted_use_and_planted_noise_stand_at_the_two_ends(tmp_path: Path) -> None:
    """Client 3 holds what the hold-out is of, client 1 noise, and two others a little of each."""
    some = [ClientBlocks(make_blocks(4, 16, seed=client), NOBODYS) for client in (10, 11)]
    held = [
        some[0],
        ClientBlocks(noise(16, seed=4), NOBODYS),
        some[1],
        ClientBlocks(make_blocks(24, 16, seed=5), NOBODYS),
    ]
    recipe = recipe_of(training={"learning_rate": 3e-2, "proximal_mu": 0.0}, federation={"rounds": 3})
    run_planted(recipe, tmp_path / "run", held, CENTRAL)
    told = told_by(tmp_path / "run")
    shares = {client: one["value"] for client, one in told["shapley"].items()}
    for found in (told["leave_one_out"], shares):
        assert max(found, key=found.__getitem__) == "3"
        assert min(found, key=found.__getitem__) == "1"
    assert told["leave_one_out"]["1"] < 0 < told["leave_one_out"]["3"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Client 3: without it, the right next word of the texts held out for all is" in text


@pytest.mark.long
def test_what_it_costs_is_in_the_plan(tmp_path: Path) -> None:
    recipe = recipe_of(training={"epochs": 2})
    planned = plan(recipe)
    run(recipe, tmp_path / "run", Observer())
    found = arms_of(tmp_path / "run")
    assert planned.arms == len(found) == 6
    assert planned.arm_tokens == sum(arm["tokens"] for arm in found.values())
    assert planned.arms_at_once == 3 * 2 + 3 * 1, "all of them in one pass"
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(render_plan(planned))
    assert (
        f"6 federations of some of the clients at the end, for their contributions: {planned.arm_tokens:,} tokens"
        in (console.export_text())
    )
    without = plan(recipe_of(contributions=False, training={"epochs": 2}))
    assert without.arms == 0
    assert planned.stages[:-1] == without.stages
    assert planned.stages[-1].name == "contributions"
    assert planned.stages[-1].train == planned.arm_tokens
    assert planned.stages[-1].evaluate == 6 * 3 * planned.central_tokens


@pytest.mark.long
def test_stopped_between_two_passes_it_goes_on_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, and without a second time training what is on record."""
    monkeypatch.setattr(arms, "UPDATES_HELD", 3)
    recipe = recipe_of(model={"dtype": "float32"}, adapter={"dropout": 0.1})
    run(recipe, tmp_path / "whole", Observer())
    failpoints.arm("contributions.written=raise@2")
    with pytest.raises(RuntimeError, match="a failpoint"):
        run(recipe, tmp_path / "run", Observer())
    failpoints.arm("")
    kept = told_by(tmp_path / "run")
    assert "leave_one_out" not in kept
    opened: list[Coalition] = []
    right = contributions._open_arm
    monkeypatch.setattr(contributions, "_open_arm", lambda *given: opened.append(given[4]) or right(*given))
    run(recipe, tmp_path / "run", Observer(), resume=True)
    assert (tmp_path / "run/contributions.json").read_text() == (tmp_path / "whole/contributions.json").read_text()
    trained = [frozenset(one["clients"]) for one in kept["coalitions"]]
    assert len(trained) == 2
    assert {*opened} | {*trained} == {*arms_of(tmp_path / "run")}
    assert not {*opened} & {*trained}


@pytest.mark.long
def test_arms_train_as_many_at_once_as_the_run_went_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of()
    failpoints.arm("round.begins=raise@2")
    with pytest.raises(RuntimeError, match="a failpoint"):
        run(recipe, tmp_path / "run", Observer())
    failpoints.arm("")
    at_once: list[int | None] = []
    right = contributions._open_arm
    monkeypatch.setattr(
        contributions, "_open_arm", lambda *given: at_once.append(given[2].clients_at_once) or right(*given)
    )
    run(recipe_of(training={"clients_at_once": 2}), tmp_path / "run", Observer(), resume=True)
    assert {*at_once} == {2}


@pytest.mark.long
def test_a_run_that_begins_again_does_not_believe_what_an_earlier_one_found(tmp_path: Path) -> None:
    recipe = recipe_of()
    failpoints.arm("record.round=raise@1")
    with pytest.raises(RuntimeError, match="a failpoint"):
        run(recipe, tmp_path / "run", Observer())
    failpoints.arm("")
    lie = {"rounds": 2, "coalitions": [{"clients": [0], "losses": {"central": 0.0}, "targets": {"central": 1}}]}
    (tmp_path / "run" / "contributions.json").write_text(json.dumps(lie))
    run(recipe, tmp_path / "run", Observer(), resume=True)
    assert arms_of(tmp_path / "run")[frozenset({0})]["losses"]["central"] > 1


@pytest.mark.long
def test_a_run_that_stopped_early_is_set_against_arms_of_as_many_rounds(tmp_path: Path) -> None:
    changes = {"federation": {"rounds": 4, "max_bytes": 50_000, "strategy": {"kind": "fedavgm"}}}
    whole = run_planted(recipe_of(**changes), tmp_path / "run", held_by(3), CENTRAL)
    assert whole.status["stopped_early"]
    rounds = len(whole.rounds) - 1
    assert 0 < rounds < 4
    longer = told_by(tmp_path / "run")
    assert longer["rounds"] == rounds
    tokens = int(held_by(3)[0].train.num_tokens)
    assert arms_of(tmp_path / "run")[frozenset({0})]["tokens"] == rounds * tokens


def test_an_arm_that_fails_leaves_out_its_client_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = contributions._open_arm

    def spoiled(*given: Any) -> contributions.Arm:
        arm = right(*given)
        if given[4] == {0, 2}:
            arm.run._training = arm.run._training.model_copy(update={"learning_rate": 1e300})
        return arm

    monkeypatch.setattr(contributions, "_open_arm", spoiled)
    run_planted(recipe_of(), tmp_path / "run", held_by(3), CENTRAL)
    told = told_by(tmp_path / "run")
    assert told["leave_one_out"].keys() == {"0", "2"}
    assert "shapley" not in told
    assert "The federation of 0, 2 failed" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.long
def test_each_arm_of_a_sweep_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe_of()))
    folder = sweep(tmp_path / "recipe.toml", ["seed=7,8"], tmp_path / "sweep", Observer())
    run(recipe_of(), tmp_path / "alone", Observer())
    swept, alone = told_by(folder / "seed=7"), told_by(tmp_path / "alone")
    assert swept["leave_one_out"] == pytest.approx(alone["leave_one_out"], rel=1e-6, abs=1e-9)
    assert told_by(folder / "seed=8")["leave_one_out"] != pytest.approx(alone["leave_one_out"], rel=1e-3)
    assert "Was it worth it?" in (folder / "comparison.md").read_text()


@pytest.mark.long
def test_a_strategy_that_needs_several_clients_has_no_federation_of_one(tmp_path: Path) -> None:
    changes = {"data": {"clients": 4}, "federation": {"rounds": 1, "strategy": {"kind": "krum"}}}
    run(recipe_of(**changes), tmp_path / "run", Observer())
    assert {len(arm) for arm in arms_of(tmp_path / "run")} == {3}
    assert "shapley" not in told_by(tmp_path / "run")
    with pytest.raises(RecipeError, match='"krum" needs 3 clients in a round, and without one of them there are 2'):
        plan(recipe_of(federation=changes["federation"]))


def test_a_deployment_refuses_it_by_name() -> None:
    with pytest.raises(RecipeError, match="contributions"):
        check_deployable(make_recipe(contributions=True))
