"""One family of models tried: federated by fedloom in both engines, and judged by `by_hand`, which uses none of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from fedloom import run
from fedloom.data.documents import Document, load_documents
from fedloom.data.splits import documents_needed, split_documents
from fedloom.errors import FedloomError
from fedloom.experiment.building import load_base, open_source
from fedloom.handover.export import export
from fedloom.model.attention import MASKLESS, is_slow
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run
from support import by_hand
from support.families import FAMILIES, save_tiny_model
from support.tiny import make_recipe

TEXTS = (
    *("red kites", "the mill by the river turns", "seven small boats went out", "a loom", "wool and flax and silk"),
    *("nobody counts the sheep twice here", "under the arch", "two dogs", "rain on the roof of the barn", "blue"),
    *("an old map of the coast", "the clock stands still at noon today", "grain and salt", "who sang", "winter wheat"),
    "three keys for one door",
)
"""Documents of 4 to 36 tokens, so that there is padding; the longest are cut."""
LONGEST, ROUNDS, EPOCHS, MU = 24, 2, 2, 0.5
LOSS_TOLERANCE = 2e-6
"""Largest difference of two losses, relative to them: in float64 too, many models compute norms in float32."""
WEIGHTS_TOLERANCE = 5e-5
"""Largest distance of two adapters, relative to how far training moved them."""
COARSER = {"lfm3": 6}
"""Times that much, by family: its gated convolutions multiply what they get, and rounding with it, in both engines."""


@dataclass(frozen=True)
class Outcome:
    """What was found about a family."""

    family: str
    kind: str
    """Its class in transformers."""
    attention: str
    targets: str = ""
    engine: str = ""
    """Engine that `auto` takes."""
    works: str = ""
    remarks: tuple[str, ...] = ()

    def row(self) -> str:
        """Return what `docs/models.md` says of it."""
        name, _, setting = self.family.partition(" ")
        title = f"`{name}`, `{setting}`" if setting else f"`{name}`"
        remarks = "; ".join(" ".join(remark.split()).replace("|", "\\|") for remark in self.remarks)
        cells = [title, f"`{self.kind}`", self.targets, self.attention, self.engine, self.works, remarks]
        return f"| {' | '.join(cell or '—' for cell in cells)} |"


def try_family(name: str, folder: Path) -> Outcome:
    """Build a family, and its runs, in an empty folder.

    Raises:
        AssertionError: fedloom's numbers are not those that come out by hand.
    """
    base = folder / "model"
    kind = type(save_tiny_model(name, base)).__name__
    slow = is_slow(open_model(str(base)).config)
    found = Outcome(name, kind, "")
    if slow:
        found = replace(found, remarks=("slower: transformers has no fused attention for it",))

    recipe = make_tiny_recipe(name, base)
    try:
        auto = run(recipe, folder / "auto", Observer())
    except FedloomError as error:
        return replace(found, remarks=(f"refused: {error.what}",))
    targets = PeftConfig.from_pretrained(auto.folder / "adapters" / "last").target_modules
    found = replace(
        found,
        attention=attention_of(recipe, slow=slow),
        engine=auto.plan["engine"],
        targets=", ".join(f"`{target}`" for target in sorted(targets)),
        works="trains, reopens, merges",
    )
    runs, remarks = [auto], list(found.remarks)
    if found.engine == "batched":
        try:
            runs.append(run(with_engine(recipe, "reference"), folder / "reference", Observer()))
        except FedloomError as error:  # where padding is what it can't compute, which `batched` leaves out
            remarks.append(f"`reference` refused: {error.what}")
    else:
        with pytest.raises(FedloomError) as refused:
            run(with_engine(recipe, "batched"), folder / "batched", Observer())
        remarks.append(refused.value.what)
    remarks += judge(name, recipe, base, runs)
    try:
        export(auto.folder, folder / "merged", merged=True, which="last", display=Observer())
    except FedloomError as error:
        return replace(found, works="trains, reopens", remarks=(*remarks, f"merged: {error.what}"))
    judge_merged(name, recipe, base, folder / "merged", auto)
    return replace(found, remarks=tuple(remarks))


def attention_of(recipe: Recipe, *, slow: bool) -> str:
    """Return the page's word for the attention that the loaded model has."""
    attention = load_base(recipe, open_source(recipe)).config._attn_implementation
    return {MASKLESS: "maskless", "eager": "eager" if slow else "none"}.get(attention, attention)


def judge(name: str, recipe: Recipe, base: Path, runs: Sequence[Run]) -> list[str]:
    """Compare runs with what comes out by hand; return what is to be said of the family."""
    family, setting = FAMILIES[name], setting_of(name)
    central, clients = documents_of(recipe, base)
    plain = by_hand.load(base, setting)
    loss, library_loss = by_hand.score(plain, central), by_hand.library_loss(plain, central)
    model = by_hand.load(base, setting, runs[0].folder / "adapters" / "initial")
    start = by_hand.copy(by_hand.trained_weights(model))
    assert_close(f"{name}: the initial adapter", by_hand.score(model, central), loss)
    expected = list(by_hand.federate(model, clients, ROUNDS, setting))
    for finished in runs:
        what = f"{name}, {finished.plan['engine']}"
        assert_close(f"{what}: round 0", finished.rounds[0]["central_loss"], loss)
        last = finished.folder / "adapters" / "last"
        reopened = by_hand.score(by_hand.load(base, setting, last), central)
        assert_close(f"{what}: the last adapter reopened", finished.rounds[-1]["central_loss"], reopened)
        if family.random:
            continue
        assert_same_adapter(what, load_file(last / "adapter_model.safetensors"), expected[-1].weights, start)
        for client in finished.clients:
            losses = expected[client["round"] - 1].losses
            assert_close(f"{what}: training", client["loss_mean"], losses[client["client"]])
    remarks = []
    if family.random:
        remarks.append("training is random, so it was not repeated by hand")
    if abs(library_loss - loss) > 100 * LOSS_TOLERANCE * loss:
        remarks.append("the loss is the next token's alone; transformers' own from `labels` is another for this class")
    return remarks


def judge_merged(name: str, recipe: Recipe, base: Path, merged: Path, finished: Run) -> None:
    """Compare the merged model, loaded by transformers alone, with the run's last loss."""
    central, _ = documents_of(recipe, base)
    found = by_hand.score(by_hand.load(merged, setting_of(name)), central)
    assert_close(f"{name}: the merged model", finished.rounds[-1]["central_loss"], found)


def assert_close(what: str, found: float, expected: float) -> None:
    """Fail where two losses differ by more than rounding."""
    assert abs(found - expected) <= LOSS_TOLERANCE * abs(expected), f"{what}: {found} instead of {expected}"


def assert_same_adapter(
    what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> None:
    """Fail where two adapters differ by more than a small share of how far training moved them."""
    assert found.keys() == expected.keys(), what

    def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        return sum(float((one[key] - other[key]).square().sum()) for key in expected) ** 0.5

    moved, off = distance(expected, start), distance(found, expected)
    assert moved > 0.01, f"{what}: the adapter hardly moved ({moved})"
    assert off <= WEIGHTS_TOLERANCE * COARSER.get(what.partition(",")[0], 1) * moved, (
        f"{what}: the adapter is {off / moved:.1e} off, of its way"
    )


def make_tiny_recipe(name: str, base: Path) -> Recipe:
    """Return the recipe that each family is run by: full batches, so that their order does not matter."""
    family, documents = FAMILIES[name], base.parent / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return make_recipe(
        model={"source": str(base), "dtype": family.dtype},
        adapter={"targets": family.targets_of(name)},
        data={
            "source": str(documents), "max_length": LONGEST, "clients": 2, "documents_per_client": None,
            "central_holdout": 4, "partition": {"kind": "linear"},
        },
        training={
            "clients_at_once": 2, "optimizer": "sgd", "learning_rate": family.rate, "epochs": EPOCHS,
            "batch_size": len(TEXTS), "proximal_mu": MU,
        },
        federation={"rounds": ROUNDS},
    )  # fmt: skip


def with_engine(recipe: Recipe, engine: str) -> Recipe:
    """Return the recipe with another engine."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"engine": engine})})


def setting_of(name: str) -> by_hand.Setting:
    """Return the same settings for training by hand."""
    family = FAMILIES[name]
    return by_hand.Setting(family.rate, MU, EPOCHS, getattr(torch, family.dtype), family.attention)


def documents_of(recipe: Recipe, base: Path) -> tuple[by_hand.Documents, list[by_hand.Documents]]:
    """Return the central hold-out and what each client trains on, tokenized by transformers alone."""
    splits = split_documents(
        load_documents(recipe.data, recipe.seed, documents_needed(recipe.data)), recipe.data, recipe.seed
    )

    def tokenize(documents: Sequence[Document]) -> by_hand.Documents:
        return by_hand.tokenize(base, [document.text for document in documents], LONGEST)

    return tokenize(splits.central), [tokenize(client.train) for client in splits.clients]
