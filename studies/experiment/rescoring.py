"""The loss over real tokens of a run that counted padding: its last adapter, scored as an honest run's is."""

from __future__ import annotations

from pathlib import Path

from fedloom.evaluation.held_out import evaluate
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.preparation import gather
from fedloom.handover.finished_run import open_adapter
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import load_recipe


def score_real_tokens(folder: Path) -> float:
    """Return the central loss of a run's last adapter over the tokens of documents alone, in nats a token."""
    recipe = load_recipe(folder / "recipe.toml", ["data.pad_in_loss=false"])
    material = gather(recipe, Observer())
    adapted = load_adapted_model(recipe, material.source)
    adapter = open_adapter(adapted, folder, "last")
    return evaluate(adapted, adapter, material.central, batch_size=recipe.evaluation.batch_size).loss
