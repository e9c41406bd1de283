"""The published experiment, replayed: run what is not done yet of a tier, and write docs/study.md from the records.

    python studies/experiment/study.py [nano | small | card | full]
    python studies/experiment/study.py page [--check]

A tier is a recipe, `TIER.toml`, and the sweeps in `sweeps.py`. Runs lie in the cache; of each, a line is kept in
`records/TIER/SWEEP.jsonl`, and the page is written from these lines alone. What was stopped goes on with the same
words; a sweep that is on record is not run again, until its file there is removed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tomlkit
from base_model import READ, UNREAD, cut_documents, gather_documents, make_base_model
from page import write_page
from records import RECORDS, keep, keep_plans
from sweeps import SEEDS, list_sweeps

from fedloom.errors import FedloomError
from fedloom.experiment.recognition import open_recipe as load_recipe
from fedloom.experiment.run import plan
from fedloom.experiment.sweep import sweep
from fedloom.host.files import write_text
from fedloom.host.machine import cache_folder

HERE = Path(__file__).parent


def run_tier(tier: str) -> None:
    """Run the sweeps of a tier that are not done yet, each with its records kept as soon as it is."""
    folder, recipes = prepare(tier), recipes_of(tier)
    plan_opt(folder / ("all" if tier == "full" else "unread"))
    for number, (name, text) in enumerate(recipes.items(), start=1):
        kept = RECORDS / tier / f"{name}.jsonl"
        if kept.is_file():
            continue
        print(f"\n{tier}: sweep {number} of {len(recipes)}, {name}\n", flush=True)
        source = folder / f"{name}.toml"  # beside the documents and the model that it names
        write_text(source, text)
        keep(sweep(source, out=folder / name), kept)


def plan_opt(documents: Path) -> None:
    """Plan the experiment over OPT-350M itself, with its adapter and with all weights: what each takes and sends.

    Nothing of it depends on the documents or on the weights, which are elsewhere.
    """
    here = ["model.source=random:opt-350m", "model.dtype=float32", f"data.source={documents}"]
    few = ["data.documents_per_client=20", "data.central_holdout=20", "training.clients_at_once=1"]
    names = ("opt350m-lora-fedprox-6k", "opt350m-fedprox-full-6k")
    keep_plans({name: plan(load_recipe(name, [*here, *few])) for name in names})


def recipes_of(tier: str) -> dict[str, str]:
    """Return each sweep of a tier as a recipe: the tier's own, with a table `[sweep]` behind it."""
    text = (HERE / f"{tier}.toml").read_text(encoding="utf-8")
    recipe = tomlkit.parse(text).unwrap()
    sweeps = list_sweeps(tier, recipe["data"]["documents_per_client"], recipe["training"]["learning_rate"])
    return {name: f"{text}\n{tomlkit.dumps({'sweep': axes})}" for name, axes in sweeps.items()}


def prepare(tier: str) -> Path:
    """Return a tier's folder in the cache, with its documents, and the base model that it trains first."""
    folder = cache_folder() / "study" / tier
    if tier == "full":
        gather_documents(folder / "all", (*READ, *UNREAD), tests=True)  # it takes 9,000 files
        return folder
    gather_documents(folder / "unread", UNREAD)
    if tier == "nano":
        cut_documents(folder / "unread", folder / "first-lines")
        gather_documents(folder / "read", READ)
        make_base_model(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="nano", choices=[*SEEDS, "page"])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    chosen = parser.parse_args()
    try:
        if chosen.what != "page":
            run_tier(chosen.what)
        return write_page(check=chosen.check)
    except FedloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
