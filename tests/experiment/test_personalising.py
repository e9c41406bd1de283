"""Personalisation: each client goes on from the best global adapter, by itself, and its adapter is its own."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support.marks import first
from support.planted import run_planted
from support.tiny import make_blocks, make_recipe

from fedloom import run
from fedloom.data.tokens import ClientBlocks
from fedloom.experiment.building import load_base
from fedloom.experiment.sweep import sweep
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.records.check import check_run
from fedloom.training.jobs import ClientJob

CENTRAL = make_blocks(4, 16, seed=3)
PLAIN = {"proximal_mu": 0.0, "schedule": "constant"}


def recipe_of(rounds: int, **changes: Any) -> Recipe:
    return make_recipe(**{"federation": {"rounds": rounds}, "training": PLAIN, **changes})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def told_by(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "personalised.json").read_text()))


def test_by_itself_is_one_more_round_of_a_federation_of_one(tmp_path: Path) -> None:
    """To the bit: the same documents in the same order, from the same adapter."""
    data = {"clients": 1}
    training = {**PLAIN, "epochs": 2}
    short = run(recipe_of(2, data=data, training=training, personalise={"epochs": 2}), tmp_path / "2", Observer())
    longer = run(recipe_of(3, data=data, training=training), tmp_path / "3", Observer())
    assert (short.best_round, longer.best_round) == (2, 3)
    mine, theirs = weights_of(tmp_path / "2/clients/0/adapter"), weights_of(tmp_path / "3/adapters/last")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    told = told_by(tmp_path / "2")
    assert told["round"] == 2
    assert told["clients"]["0"]["global_loss"] == short.rounds[2]["client_losses"]["0"]
    assert told["clients"]["0"]["loss"] == longer.rounds[3]["client_losses"]["0"]
    assert told["clients"]["0"]["tokens"] == longer.rounds[3]["train_tokens"]
    assert told["clients"]["0"]["adapter_sha256"] == longer.rounds[3]["adapter_sha256"]


@pytest.mark.long
def test_identical_clients_gain_by_themselves_what_one_more_round_would_bring(tmp_path: Path) -> None:
    same = ClientBlocks(make_blocks(6, 16, seed=1), make_blocks(4, 16, seed=2))
    around = {"model": {"dtype": "float64"}, "training": {**PLAIN, "batch_size": 6}}
    personal = recipe_of(2, personalise={"epochs": 1}, baselines=["local"], **around)
    run_planted(personal, tmp_path / "2", [same] * 3, central=CENTRAL)
    longer = run_planted(recipe_of(3, **around), tmp_path / "3", [same] * 3, central=CENTRAL)
    told = told_by(tmp_path / "2")["clients"]
    alone = json.loads((tmp_path / "2" / "baselines.json").read_text())["local"]
    for client in ("0", "1", "2"):
        assert told[client]["loss"] == pytest.approx(longer.rounds[3]["client_losses"][client], rel=1e-9)
        assert alone[client]["own_loss"] == pytest.approx(told[client]["global_loss"], rel=1e-9)
        assert told[client]["loss"] < told[client]["global_loss"]


@pytest.mark.long
@pytest.mark.parametrize("rule", first(["svd", "rolora", "fedex", "ffa", "factors"], keep=2, every=2))
def test_the_engines_agree_on_it_under_every_rule(rule: str, tmp_path: Path) -> None:
    told = {}
    for engine in ("batched", "reference"):
        recipe = recipe_of(
            2,
            personalise={"epochs": 2},
            model={"dtype": "float64"},
            training={"engine": engine},
            federation={"rounds": 2, "lora_rule": rule, "client_ranks": [1, 2, 2] if rule == "svd" else None},
        )
        run(recipe, tmp_path / engine, Observer())
        told[engine] = told_by(tmp_path / engine)["clients"]
        assert not [finding for finding in check_run(tmp_path / engine) if not finding.well]
    for client, mine in told["reference"].items():
        theirs = told["batched"][client]
        assert mine["global_loss"] == pytest.approx(theirs["global_loss"], rel=1e-9)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert mine["loss"] != pytest.approx(mine["global_loss"], rel=1e-4)


def test_its_adapter_is_what_was_judged_and_its_card_says_whose_it_is(tmp_path: Path) -> None:
    """Plain PEFT, one text after another, comes to the loss on record."""
    recipe = recipe_of(1, personalise={"epochs": 3})
    held = [ClientBlocks(make_blocks(6, 16, seed=client), make_blocks(4, 16, seed=8 + client)) for client in range(3)]
    run_planted(recipe, tmp_path / "run", held)
    home = tmp_path / "run" / "clients" / "2" / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = PeftModel.from_pretrained(load_base(recipe, open_model(recipe.model.source)), home).eval()
    losses, targets = 0.0, 0
    for tokens_T, length in zip(held[2].holdout.tokens_NT, held[2].holdout.lengths_N.tolist(), strict=True):
        words_1T = tokens_T[None, :length]
        with torch.no_grad():
            losses += float(opened(input_ids=words_1T, labels=words_1T).loss) * (length - 1)
        targets += length - 1
    assert told_by(tmp_path / "run")["clients"]["2"]["loss"] == pytest.approx(losses / targets, rel=1e-5)
    check_card((home / "README.md").read_text(), losses / targets)


def check_card(card: str, loss: float) -> None:
    """It has the client's own figure alone, and begins with what its reader has to think of."""
    told = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    figures = [(metric["name"], metric["value"]) for result in told for metric in result["metrics"]]
    name = "Loss on what its client holds out (nats per token)"
    assert figures == [(name, pytest.approx(loss, rel=1e-5))]
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows == ["| metric | value |", f"| {name} | {figures[0][1]:.4f} |"]
    assert "# test: client 2's own\n" in card
    assert card.index("It may tell of the documents that it learnt from") < card.index("An adapter (lora")
    assert "it went on by itself, 3 epochs over this client's documents. It comes of round 1 of 1." in card
    assert "- Objective of the rounds: " in card, "it went on without the proximal term"
    assert "fedloom export RUN --ollama my-test --client 2\n" in card
    assert "fedloom export RUN --to merged --merged --client 2\n" in card
    assert card.endswith("```\n"), "nothing comes behind the recipe"


def test_a_client_that_can_not_go_on_is_named_and_the_others_have_theirs(tmp_path: Path) -> None:
    """Its documents make no number of a loss; the federation went on without it."""
    held = [ClientBlocks(make_blocks(6, 16, seed=client), make_blocks(4, 16, seed=9)) for client in range(3)]
    recipe = recipe_of(1, personalise={"epochs": 1})
    right = ClientJob.rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ClientJob, "rate", lambda job, *step: 1e35 if job.round == 2 == job.client * 2 else right(job, *step)
        )
        run_planted(recipe, tmp_path / "run", held)
    told = told_by(tmp_path / "run")["clients"]
    assert "client 1" in told["1"]["error"]
    assert {"loss", "global_loss"} <= told["0"].keys() & told["2"].keys()
    assert not (tmp_path / "run" / "clients" / "1").exists()
    assert "| client 1 |" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.long
def test_an_adapter_that_was_damaged_is_found_and_made_again(tmp_path: Path) -> None:
    recipe = recipe_of(1, personalise={"epochs": 1})
    run(recipe, tmp_path / "run", Observer())
    file = tmp_path / "run" / "clients" / "1" / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    for spoiled in (whole[:-4] + b"\0\0\0\1", whole[:9]):
        file.write_bytes(spoiled)
        assert [one.what for one in check_run(tmp_path / "run") if not one.well] == ["clients/1/adapter"]
        run(recipe, tmp_path / "run", Observer(), resume=True)
        assert file.read_bytes() == whole
        assert not [one for one in check_run(tmp_path / "run") if not one.well]


@pytest.mark.long
def test_each_arm_of_a_sweep_has_its_own(tmp_path: Path) -> None:
    recipe = recipe_of(1, personalise={"epochs": 1}, model={"dtype": "float64"})
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    folder = sweep(tmp_path / "recipe.toml", ["seed=7,8"], tmp_path / "sweep", Observer())
    run(recipe, tmp_path / "alone", Observer())
    swept, alone = told_by(folder / "seed=7")["clients"], told_by(tmp_path / "alone")["clients"]
    assert all(swept[client]["loss"] == pytest.approx(alone[client]["loss"], rel=1e-9) for client in alone)
    assert told_by(folder / "seed=8")["clients"]["0"]["loss"] != pytest.approx(alone["0"]["loss"], rel=1e-6)


def test_a_key_that_it_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        make_recipe(personalise={"steps": 1})
