"""Ask a finished run's models tasks, and put the answers on record beside those that it gave itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from fedloom.errors import RunError
from fedloom.experiment.building import load_adapted_model, open_source
from fedloom.experiment.harness_tasks import HarnessExaminer, HarnessTasks
from fedloom.experiment.tasks import Examiner, describe_tasks, find_seen, gather_tasks
from fedloom.experiment.trained_texts import digest_documents
from fedloom.handover.finished_run import adapter_folder, open_recorded, recipe_of
from fedloom.host.files import GO_ON, take_lock
from fedloom.progress import Say, Watch, ignore, say_nothing
from fedloom.recipe.task_files import shipped_tasks
from fedloom.records.card import write_tasks
from fedloom.records.evaluations import kept_baselines
from fedloom.records.run import Record, Run, read_run
from fedloom.report.run_report import write_report

AGAIN = "ask again: what was answered is on record, and not asked twice"


def evaluate(
    folder: str | Path,
    tasks: Sequence[str | Path] = (),
    *,
    base: bool = False,
    which: Sequence[str] = ("best",),
    places: Sequence[str] = (),
    run_code: bool = False,
    harness: Sequence[str] = (),
    limit: int | None = None,
    examples: int | None = None,
    say: Say = say_nothing,
    watch: Watch = ignore,
) -> list[Record]:
    """Ask a run's adapters tasks, and the base model too with `base`; return the records, which join the run's.

    `tasks` are files, or names of those that ship; the run's own where none are named, here or of the `harness`.
    `which` are adapters: best, last, numbers of rounds, of which 0 is before any training, or baselines, pooled and
    local. Each of `places` is TASK=SOURCE: where a task's rows are read from instead. With `run_code`, tasks may run
    programs that a model wrote. `harness` are tasks of lm-evaluation-harness, by name or by their .yaml files: the
    first `limit` questions of each, with so many answered `examples` before each.

    Raises:
        RunError: there is no such run or adapter, or not the one on record; it is at work, there are no tasks, or
            programs can't be confined.
        RecipeError, DataError, ModelError: a task or the model can't be had, or an adapter is not applied.
    """
    run, recipe = read_run(folder), recipe_of(Path(folder))
    models = [model for one in which for model in find_models(run, one)]
    if not harness and (limit is not None or examples is not None):
        raise RunError("they are of the harness's tasks alone", where="--limit, --examples", mend="leave them out")
    sources = tasks or (() if harness else recipe.evaluation.tasks)
    if not sources and not harness:
        known = ", ".join(shipped_tasks())
        raise RunError("the run has no tasks of its own", where="--tasks", mend=f"name a file, or one of: {known}")
    loaded = gather_tasks(sources, places, say, run_code=run_code)
    of_harness = HarnessTasks(harness, limit=limit, examples=examples) if harness else None
    with _said_of_asking(), closing(take_lock(run.folder)):
        source = open_source(recipe)
        trained = digest_documents(recipe, run.plan, source, say) if loaded else None
        loaded = loaded if trained is None else find_seen(loaded, trained)
        for line in describe_tasks(loaded, recipe):
            say("task", line)
        adapted = load_adapted_model(recipe, source)
        # What training began with: of a whole model it is the base, and others are told apart from it.
        open_recorded(adapted, run.folder / "adapters" / "initial", run.record_of(0)["adapter_sha256"])
        examiners: list[Examiner | HarnessExaminer] = []
        if loaded:
            examiners.append(Examiner(loaded, recipe, source, adapted, run.folder, say=say, watch=watch))
        if of_harness:
            examiners.append(HarnessExaminer(of_harness, recipe, source, adapted, run.folder, say=say))
        records = [record for one in examiners for record in one.examine_base()] if base else []
        for model, where in models:
            adapter = open_recorded(adapted, where, model["adapter_sha256"])
            records += [record for one in examiners for record in one.examine(adapter, model)]
        write_tasks(run.folder)
        write_report(run.folder)
    return records


@contextmanager
def _said_of_asking() -> Iterator[None]:
    """Say of what can't be written how to go on with asking: the run itself is over."""
    try:
        yield
    except RunError as error:
        if GO_ON not in error.mend:
            raise
        raise RunError(error.what, where=error.where, mend=error.mend.replace(GO_ON, AGAIN)) from error


def find_models(run: Run, which: str) -> list[tuple[Record, Path]]:
    """Return the models that a name stands for, as records name them, each with the folder of its adapter.

    Raises:
        RunError: the run has no such adapter, or did not keep it.
    """
    if which in ("pooled", "local"):
        found = [(model, folder) for model, folder in kept_baselines(run) if model["baseline"] == which]
        if not found:
            mend = f'a run whose recipe has baselines = ["{which}"] keeps it'
            raise RunError(f'no adapter "{which}"', where=str(run.folder), mend=mend)
        return found
    round = find_round(run, which)
    model = {"round": round, "adapter_sha256": run.record_of(round)["adapter_sha256"]}
    return [(model, folder_of(run, round, which))]


def find_round(run: Run, which: str) -> int:
    """Return the round of an adapter: `best`, `last`, or the number itself.

    Raises:
        RunError: the run has no such round.
    """
    last = run.rounds[-1]["round"] if run.rounds else None
    known = {"best": run.best_round, "last": last, **{str(record["round"]): record["round"] for record in run.rounds}}
    found = known.get(which)
    if found is None:
        mend = f"choose best, last, or a round up to {last}" if run.rounds else "wait for its first round"
        raise RunError(f'no adapter "{which}"', where=str(run.folder), mend=mend)
    return int(found)


def folder_of(run: Run, round: int, which: str) -> Path:
    """Return the folder of the adapter of a round that was asked for by a name.

    Raises:
        RunError: it was not kept, or a part of it is with the clients alone.
    """
    kept = {0: "initial", run.best_round: "best", run.rounds[-1]["round"]: "last"}
    name = kept.get(round, f"round-{round}")
    if round not in kept and not (run.folder / "adapters" / name).is_dir():
        raise RunError(
            f"the adapter of round {which} was not kept", where=str(run.folder), mend="set federation.keep_every"
        )
    return adapter_folder(run.folder, name)
