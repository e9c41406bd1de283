"""Proof of an export: the logits of the run's own model on a few held-out blocks, which the export has to give.

Letters: B sequences, T tokens, V vocabulary; M tokens of all sequences that are no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.formats import own_chat_template
from fedloom.errors import RunError
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.preparation import prepare
from fedloom.handover.finished_run import adapter_folder, open_adapter, recipe_of
from fedloom.model.source import ModelSource
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe

TEMPLATE_FILE = "chat_template.jinja"
"""Name by which transformers and vLLM find a chat template beside a tokenizer or an adapter."""
PROOF_BLOCKS = 4
"""Number of hold-out blocks on which the export must give the run's own logits."""
TOLERANCES = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 5e-2}
"""Largest distance of a merged model's logits, relative to their norm: W + BA rounds otherwise than W and BA apart.

Many models compute norms, positions or recurrences in float32 whatever their weights are in."""


@dataclass(frozen=True)
class Subject:
    """Finished run that is exported: its model with its adapter, and the logits of both on held-out blocks."""

    recipe: Recipe
    source: ModelSource
    dtype: str
    folder: Path
    """Folder of the adapter in the run directory."""
    adapted: AdaptedModel
    adapter: Adapter
    tokens_BT: Tensor
    real_BT: Tensor
    """False at padding, whose logits mean nothing, and are far apart where weights are rounded otherwise."""
    logits_MV: Tensor

    @property
    def chat_template(self) -> str | None:
        """Return the chat template that the run's documents were written by; None where they are no conversations."""
        data = self.recipe.data
        return (data.own_template or own_chat_template(self.source.tokenizer)) if data.is_chat else None

    def prove(self, opened: torch.nn.Module, to: Path, tolerance: float) -> float:
        """Return how far the logits of an export are from the run's, relative to their norm.

        Raises:
            RunError: they are further away than the tolerance.
        """
        found_MV = logits_of(opened, self.tokens_BT, self.real_BT)
        distance = float((found_MV - self.logits_MV).norm() / self.logits_MV.norm())
        # Not `distance >`: a distance that is no number must fail too.
        if not distance <= tolerance:
            raise RunError(
                f"the export does not match the run's adapter: its logits are {distance:.1e} away, relative to their"
                " norm; nothing was written",
                where=str(to),
            )
        return distance


def open_subject(folder: Path, which: str | int, display: Observer) -> Subject:
    """Load a run's model with one of its adapters.

    Raises:
        RunError: there is no such run or adapter, or it is not the one on record.
        ModelError: the base model can't be read.
    """
    recipe = recipe_of(folder)
    source = adapter_folder(folder, which)
    prepared = prepare(recipe, display, predict=False)
    display.show_step("weights", prepared.source.name)
    adapted = load_adapted_model(recipe, prepared.source)
    adapter = open_adapter(adapted, folder, which)
    adapted.load(adapter)
    held_out = (prepared.central, *(client.holdout for client in prepared.clients))
    blocks = next(blocks for blocks in held_out if len(blocks))
    tokens_BT = blocks.tokens_NT[:PROOF_BLOCKS].to(adapted.device)
    real_BT = blocks.is_real[:PROOF_BLOCKS].to(adapted.device)
    logits_MV = logits_of(adapted.model, tokens_BT, real_BT)
    dtype = prepared.plan.dtype
    return Subject(recipe, prepared.source, dtype, source, adapted, adapter, tokens_BT, real_BT, logits_MV)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Return the logits of the tokens that are real, [M, V]."""
    logits_BTV = model.eval()(input_ids=tokens_BT, use_cache=False).logits
    # A soft prompt has logits of its own before those of the tokens.
    found: Tensor = logits_BTV[:, -tokens_BT.shape[1] :][real_BT]
    return found
