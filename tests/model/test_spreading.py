"""Base models larger than their device: parts of them in their files, on a processor here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import first
from support.quick_runs import attempt, result_of
from support.small_models import write_small_model
from support.tiny import make_blocks, make_job, make_recipe, updates_of

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import ModelError, RecipeError
from fedloom.evaluation.held_out import evaluate
from fedloom.experiment.building import adapt, open_source
from fedloom.experiment.run import plan
from fedloom.experiment.session import hash_base
from fedloom.handover.export import export
from fedloom.model.loading import load_model
from fedloom.model.spreading import bytes_elsewhere
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import read_run
from fedloom.training import memory
from fedloom.training.assumptions import check_model, check_repeatable
from fedloom.training.engines import choose_engine
from fedloom.training.memory import room_for_weights
from fedloom.training.reference import ReferenceEngine

CPU = torch.device("cpu")
SPREAD = {"model": {"device_map": "auto"}, "training": {"gradient_checkpointing": True, "engine": "auto"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


def recipe_of(folder: Path, **sections: dict[str, Any]) -> Recipe:
    model = {"source": str(folder), "device": "cpu", **SPREAD["model"], **sections.pop("model", {})}
    training = {**SPREAD["training"], **sections.pop("training", {})}
    return make_recipe(model=model, training=training, **{"adapter": {"targets": ["q_proj", "v_proj"]}, **sections})


def load(recipe: Recipe, room: int | None, told: list[str] | None = None) -> AdaptedModel:
    source = open_source(recipe)
    say = [].append if told is None else told.append
    places = None if room is None else {"cpu": room}
    return adapt(load_model(source, dtype="float32", device=CPU, room=places, say=say), recipe, source)


def whole_bytes(adapted: AdaptedModel) -> int:
    return sum(value.numel() * value.element_size() for value in adapted.base.parameters())


@pytest.mark.parametrize("lora_rule", first(["factors", "ffa"]))
def test_a_model_whose_layers_lie_elsewhere_trains_and_scores_as_the_whole_one(folder: Path, lora_rule: str) -> None:
    recipe = recipe_of(folder, federation={"lora_rule": lora_rule}, adapter={"dropout": 0.3, "targets": ["q_proj"]})
    told: list[str] = []
    whole = load(recipe, None)
    spread = load(recipe, whole_bytes(whole) * 7 // 10, told)
    assert 0 < bytes_elsewhere(spread.model) < whole_bytes(whole)
    assert told == [line for line in told if "don't fit on cpu" in line] != []
    assert hash_base(spread) == hash_base(whole)
    assert torch.equal(spread.draw(11).weights_P, whole.draw(11).weights_P)
    found = []
    for adapted in (whole, spread):
        check_model(adapted, 16)
        check_repeatable(adapted, 16)
        jobs = [
            make_job(make_blocks(6 + client), adapted.read(), client=client, gradient_checkpointing=True)
            for client in range(2)
        ]
        updates = [*updates_of(ReferenceEngine(adapted).train(jobs))]
        found.append((updates, evaluate(adapted, updates[1].adapter, make_blocks(5, seed=9), batch_size=2).loss))
    (ours, our_loss), (theirs, their_loss) = found
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.adapter.weights_P, other.adapter.weights_P)
        assert one.report.loss_mean == other.report.loss_mean
    assert our_loss == their_loss


def test_weights_elsewhere_that_are_not_finite_are_found(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder)
    spread = load(recipe, whole_bytes(load(recipe, None)) * 7 // 10)
    name, value = next((name, value) for name, value in spread.model.named_parameters() if value.is_meta)
    path, _, own = name.rpartition(".")
    weights = spread.model.get_submodule(path)._hf_hook
    weights.weights_map = {own: torch.full(value.shape, torch.inf)}
    with pytest.raises(ModelError, match=r"has a weight that is not finite"):
        check_model(spread, 16)


@pytest.mark.long
def test_a_run_takes_from_its_files_what_has_no_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(folder, federation={"lora_rule": "fedex"})
    assert attempt(recipe, tmp_path / "whole") == ""
    planned = read_run(tmp_path / "whole").plan
    assert planned["engine"] == "reference"
    assert "weights that don't fit read anew for every pass" in planned["ways"]
    asked: list[int] = []

    def scant(beside: int, device: torch.device) -> dict[int | str, int]:
        asked.append(beside)
        return {"cpu": whole_bytes(load(recipe, None)) * 7 // 10}

    monkeypatch.setattr("fedloom.experiment.building.room_for_weights", scant)
    assert attempt(recipe, tmp_path / "spread") == ""
    assert asked
    assert result_of(tmp_path / "spread") == result_of(tmp_path / "whole")
    assert export(tmp_path / "spread", tmp_path / "adapter") < 1e-5  # its residual is further ranks
    assert export(tmp_path / "spread", tmp_path / "merged", merged=True) < 1e-5


def test_weights_have_the_room_that_a_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(memory, "free_memory", lambda: 4000)
    assert room_for_weights(300, CPU) == {"cpu": 600}
    assert room_for_weights(300, torch.device("cuda:1")) == {1: 600, "cpu": 3600}
    assert room_for_weights(3000, CPU) == {"cpu": 0}


def test_a_device_without_room_for_the_first_weights_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.device_map: beside a step, cpu has no room"):
        load(recipe_of(folder), 1000)


def test_the_engine_batched_has_no_weights_elsewhere(folder: Path) -> None:
    recipe = recipe_of(folder)
    assert choose_engine(recipe.adapter, recipe.training, recipe.model) == "reference"
    asked = recipe.training.model_copy(update={"engine": "batched"})
    with pytest.raises(RecipeError, match=r"the engine batched has no model\.device_map"):
        choose_engine(recipe.adapter, asked, recipe.model)


def test_a_random_model_has_no_files_to_lie_in(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^model\.device_map: a random model is made whole"):
        plan(recipe_of(folder, model={"source": "random:tiny-llama"}))


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"adapter": {"method": "ia3", "rank": None, "alpha": None}}, "reads or trains weights of the base model"),
        ({"adapter": {"dora": True}}, "reads or trains weights of the base model"),
        ({"adapter": {"options": {"modules_to_save": ["lm_head"]}}}, "reads or trains weights of the base model"),
        ({"model": {"quantization": "4bit"}}, r"packed weights \(model.quantization\) lie whole"),
        ({"training": {"devices": ["cpu"]}}, "each of training.devices has the whole model"),
        ({"training": {"gradient_checkpointing": False}}, "would hold every layer's weights"),
    ],
)
def test_what_needs_the_weights_themselves_is_refused(folder: Path, sections: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        recipe_of(folder, **sections)
