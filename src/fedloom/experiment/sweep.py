"""Every combination of a few settings of a recipe, over as few base models and in as few passes as can be.

Runs whose base model and adapter are alike share them. Where the engine takes many clients at once, the clients of
all these runs are clients of one pass, and then those of all their baselines: seeds, μ, learning rates, schedules,
batch sizes, epochs, strategies and data ride along.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import tomllib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

from fedloom.adapters.adapter import Adapter
from fedloom.errors import FedloomError, RecipeError, RunError, TrainingError
from fedloom.experiment.baselines import Baseline, describe
from fedloom.experiment.preparation import Material, Prepared, gather, load_adapted_model, prepare
from fedloom.experiment.recorder import open_run
from fedloom.experiment.session import Workshop
from fedloom.experiment.trial import Arm, baselines_of, set_up, train_baselines
from fedloom.federation.fleet import LocalFleet
from fedloom.host.files import take_lock, write_json
from fedloom.monitoring.display import Display, Terminal
from fedloom.monitoring.telemetry import Telemetry
from fedloom.recipe.loading import load_recipe
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run, judged_loss, read_run
from fedloom.records.writer import RunWriter, default_folder
from fedloom.report.comparison import write_comparison
from fedloom.training.batched import OF_ALL_CLIENTS
from fedloom.training.engines import choose_engine

MANIFEST = "sweep.json"


@dataclass(frozen=True)
class Trial:
    """One combination: its recipe, and the folder of its run."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe


def sweep(
    source: str | Path,
    axes: Sequence[str],
    out: str | Path | None = None,
    display: Display | None = None,
    *,
    num_random: int | None = None,
) -> Path:
    """Run every combination of `section.key=value,value,...`, or `num_random` of them drawn; return the folder.

    Each is a run directory of its own in it, and `comparison.html` sets them side by side. With a folder of an earlier
    sweep of the same combinations, those that are done stay, and the others are run.

    Raises:
        RecipeError: a setting or a combination that no run could have; nothing is run.
        RunError: the folder is something else, or some of the runs failed: the others are done.
    """
    display = display or Terminal()
    trials = list(expand(source, axes, num_random))
    folder = Path(out) if out else default_folder(f"{trials[0].recipe.name}-sweep")
    open_sweep(folder, trials)
    lock = take_lock(folder)
    done = {trial.name for trial in trials if read_done(folder / trial.name)}
    left = [trial for trial in trials if trial.name not in done]
    display.show_step("sweep", f"{len(trials)} runs, {len(done)} of them done, in {folder}")
    errors: dict[str, str] = {}
    materials: dict[Hashable, Material] = {}
    try:
        for group in group_by(left, same_model):
            try:
                errors |= run_group(folder, group, materials, display)
            except FedloomError as error:  # what they share: the base model, say
                errors |= {trial.name: str(error) for trial in group if not read_done(folder / trial.name)}
    finally:
        display.close()
        lock.close()
    finished = [run for trial in trials if (run := read_done(folder / trial.name))]
    if len(finished) > 1:
        write_comparison([run.folder for run in finished], folder)
    display.show_sweep_end(rank(finished), folder)
    if errors:
        name, why = next(iter(errors.items()))
        raise RunError(
            f"{len(errors)} of {len(trials)} runs failed, {name} for one: {why}",
            where=str(folder),
            mend="the others are done; run the same sweep with the same --out to try these again",
        )
    return folder


def expand(source: str | Path, axes: Sequence[str], num_random: int | None = None) -> Iterator[Trial]:
    """The combinations, each as a recipe.

    Raises:
        RecipeError: an axis that can't be read, or a recipe that can't be.
    """
    choices = [[(key, value) for value in values] for key, values in map(read_axis, axes)]
    if not choices:
        raise RecipeError("nothing to sweep over", where="fedloom sweep", mend="name some: training.proximal_mu=0,0.1")
    combinations = list(itertools.product(*choices))
    if num_random is not None:
        drawn = random.Random(0).sample(range(len(combinations)), min(num_random, len(combinations)))
        combinations = [combinations[number] for number in sorted(drawn)]
    for combination in combinations:
        overrides = tuple(f"{key}={value}" for key, value in combination)
        short = "_".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in combination)
        name = re.sub(r"[^\w.=+-]+", "-", short).strip("-")
        yield Trial(name, overrides, load_recipe(source, overrides))


def read_axis(axis: str) -> tuple[str, list[str]]:
    """`section.key=value,value` as the key and its values, each as it stands in TOML.

    Raises:
        RecipeError: there is no key, or a value twice.
    """
    key, equals, text = axis.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise RecipeError(f"{axis!r} is nothing to sweep over", mend="write section.key=value,value")
    values = list(_split(text))
    if len(set(values)) < len(values):
        raise RecipeError(f"{axis!r} has a value twice", mend="leave one out")
    return key.strip(), values


def _split(text: str) -> Iterator[str]:
    """Parts between commas; a comma inside brackets or quotes is part of a value."""
    part = ""
    for piece in text.split(","):
        part = f"{part},{piece}" if part else piece
        try:
            tomllib.loads(f"value = {part}")
        except tomllib.TOMLDecodeError:
            if any(mark in part for mark in "[{\"'"):
                continue  # a value that is not complete yet
        yield part.strip()
        part = ""
    if part:
        yield part.strip()


def open_sweep(folder: Path, trials: Sequence[Trial]) -> None:
    """Make the sweep's folder, or make sure that it is one of these very combinations.

    Raises:
        RunError: it is not, or can't be made.
    """
    manifest = {trial.name: trial.recipe.model_dump(mode="json") for trial in trials}
    path = folder / MANIFEST
    if len(manifest) < len(trials):
        raise RecipeError("two combinations have the same name", mend="name each key once")
    if path.is_file():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == manifest
        except ValueError:
            same = False
        if not same:
            raise RunError("this is a sweep over something else", where=str(folder), mend="name another with --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise RunError("the folder exists and is no sweep", where=str(folder), mend="name another with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, manifest)
    except OSError as error:
        raise RunError(f"can't make the folder: {error.strerror}", where=str(folder)) from error


def read_done(folder: Path) -> Run | None:
    """A run that was carried out to its end; None for one that was not."""
    with suppress(RunError):
        run = read_run(folder)
        return run if run.status.get("state") == "done" else None
    return None


def same_model(recipe: Recipe) -> Hashable:
    """Recipes for which this is equal can share an adapted model."""
    rule = recipe.federation.lora_rule
    layers = rule if rule in ("ffa", "fedex") else "plain"
    # What is frozen comes from the seed with "ffa", and other methods than plain LoRA have more than one vector.
    seed = None if choose_engine(recipe) == "batched" and rule != "ffa" else recipe.seed
    return recipe.model, recipe.adapter.model_dump_json(), layers, choose_engine(recipe), seed


def same_pass(recipe: Recipe) -> Hashable:
    """Recipes for which this is equal, and `same_model`, can train in one pass."""
    alone = None if choose_engine(recipe) == "batched" and recipe.federation.lora_rule != "fedex" else id(recipe)
    return alone, *(getattr(recipe.training, name) for name in OF_ALL_CLIENTS)


def group_by(trials: Sequence[Trial], key: Callable[[Recipe], Hashable]) -> list[list[Trial]]:
    """Trials whose recipes have an equal key together, in the order in which they came."""
    groups: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(key(trial.recipe), []).append(trial)
    return list(groups.values())


def run_group(
    folder: Path, trials: Sequence[Trial], materials: dict[Hashable, Material], display: Display
) -> dict[str, str]:
    """Runs over one base model; what went wrong, by name."""
    errors: dict[str, str] = {}
    ready: dict[str, Prepared] = {}
    for trial in trials:
        recipe = trial.recipe
        try:
            key = recipe.model, recipe.data, recipe.seed
            if key not in materials:
                materials[key] = gather(recipe, display)
            ready[trial.name] = prepare(recipe, display, materials[key])
        except FedloomError as error:
            errors[trial.name] = str(error)
    able = [trial for trial in trials if trial.name in ready]
    if not able:
        return errors
    first = able[0]
    device = ready[first.name].device
    with Telemetry(gpu=device.type == "cuda", watch=display.watch) as telemetry, ExitStack() as stack:
        display.show_step("weights", ready[first.name].source.name)
        adapted = load_adapted_model(first.recipe, ready[first.name].source)
        workshop = Workshop(adapted, ready[first.name].plan.engine, telemetry, display.show_step)
        first_adapter = adapted.read()
        stack.enter_context(telemetry.phase("aggregation"))
        for together in group_by(able, same_pass):
            display.show_pass([trial.name for trial in together], [ready[trial.name].plan for trial in together])
            with ExitStack() as all_open:
                arms: list[OpenArm] = []
                at_once = min(ready[trial.name].capacity for trial in together)
                for trial in together:
                    shutil.rmtree(folder / trial.name, ignore_errors=True)  # of an earlier try that was not done
                    seed = trial.recipe.seed
                    initial = first_adapter if seed == first.recipe.seed else adapted.draw(seed)
                    opened = OpenArm(folder, trial, ready[trial.name], workshop, initial, at_once, len(arms), all_open)
                    arms.append(opened)
                errors |= run_pass(arms, workshop, display)
    return errors


class OpenArm:
    """A trial under way: its run directory is open, and says in the end how it went."""

    def __init__(
        self,
        folder: Path,
        trial: Trial,
        prepared: Prepared,
        workshop: Workshop,
        initial: Adapter,
        clients_at_once: int,
        number: int,
        all_open: ExitStack,
    ) -> None:
        self.trial = trial
        self._exits = all_open.enter_context(ExitStack())
        self.writer = self._exits.enter_context(closing(RunWriter(folder / trial.name)))
        self._exits.enter_context(open_run(self.writer, trial.recipe, prepared))
        self.arm: Arm = set_up(
            trial.recipe,
            prepared,
            workshop,
            self.writer,
            initial,
            clients_at_once=clients_at_once,
            number=number,
        )
        assert isinstance(self.arm.fleet, LocalFleet), "a sweep's clients are here"
        self.fleet = self.arm.fleet
        self.arm.begin(initial)
        self.baselines: list[Baseline] = []

    def finish(self) -> None:
        """Its run, and those of its baselines, are complete."""
        if self.trial.recipe.baselines:
            told = describe(self.baselines, self.arm.run, self.trial.recipe.baselines)
            self.writer.write_json("baselines.json", told)
        self._exits.close()

    def fail(self, error: FedloomError) -> None:
        with suppress(FedloomError), self._exits:
            raise error


def run_pass(arms: Sequence[OpenArm], workshop: Workshop, display: Display) -> dict[str, str]:
    """Train arms together where the engine can, then all their baselines; what went wrong, by name."""
    errors: dict[str, str] = {}
    for arm in arms:
        arm.arm.recorder.runs_together = len(arms)
    for number, result in workshop.run_all([(arm.arm.run, arm.fleet) for arm in arms]):
        arm = arms[number]
        try:
            if isinstance(result, TrainingError):
                raise result
            display.show_arm(arm.trial.name, arm.arm.recorder.record(result, arm.arm.run))
        except FedloomError as error:
            errors[arm.trial.name] = str(error)
            arm.arm.run.end()
            arm.fail(error)
    whole = [arm for arm in arms if arm.trial.name not in errors]
    baselines: list[Baseline] = []
    for arm in whole:
        arm.baselines = baselines_of(arm.arm, workshop, rounds=arm.arm.run.completed, first_arm=len(baselines))
        baselines += arm.baselines
    train_baselines(baselines, workshop)
    workshop.telemetry.take()  # of the baselines: no round's
    for arm in whole:
        try:
            arm.finish()
        except FedloomError as error:
            errors[arm.trial.name] = str(error)
    return errors


def rank(runs: Sequence[Run]) -> list[tuple[str, float, float, int]]:
    """Name, best and last judged loss and best round of each run, the best first."""
    rows = []
    for run in runs:
        losses = [judged_loss(record) for record in run.rounds]
        rows.append((run.folder.name, min(losses), losses[-1], run.best_round or 0))
    return sorted(rows, key=lambda row: row[1])
