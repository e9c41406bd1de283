"""Writes a run down: its rounds, its adapters, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from fedloom.adapters.adapter import Adapter
from fedloom.errors import FedloomError
from fedloom.experiment.preparation import Prepared
from fedloom.experiment.private import SECRET, Account
from fedloom.experiment.session import Session
from fedloom.federation.aggregation import WEIGHTS
from fedloom.federation.lora_error import AveragingMeter
from fedloom.federation.noised_sum import norm_of
from fedloom.federation.rounds import FederatedRun, RoundResult
from fedloom.host.failpoints import failpoint
from fedloom.host.files import hash_folder, writing
from fedloom.host.machine import describe_machine
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.records.card import write_card
from fedloom.records.plan import Plan
from fedloom.records.run import Record, RoundRecord, has_plan, overfitting_onsets, read_run
from fedloom.records.state import RunState, damaged_adapters
from fedloom.records.writer import RunWriter
from fedloom.report.run_report import write_report
from fedloom.training.jobs import ClientUpdate


class Recorder:
    """Writes a run down, round by round, and keeps its adapters."""

    def __init__(self, recipe: Recipe, plan: Plan, session: Session, writer: RunWriter) -> None:
        self._recipe, self._plan, self._session = recipe, plan, session
        self.writer = writer
        self.adapters = writer.folder / "adapters"
        self.runs_together = 1
        """Runs that train in one pass: a round's seconds are those of all of them."""
        self.saved: dict[str, dict[str, str]] = {}
        """SHA-256 of each file, by adapter."""
        self._meter = AveragingMeter(session.adapted.layout)
        self._weigh = WEIGHTS[recipe.federation.strategy.weight_by]
        self._account = Account(plan.privacy) if plan.privacy else None

    def open(self, name: str) -> Adapter:
        """Read an adapter of the run: `initial`, `best` or `last`."""
        return self._session.adapted.open(self.adapters / name)

    def begin(self, initial: Adapter) -> None:
        """Keep the adapter that every client starts from."""
        self._save(initial, "initial", write_card(self._recipe, self._plan, None))
        self.writer.write_status("running", round=0, rounds=self._recipe.federation.rounds)

    def mend(self, state: RunState, read_initial: Callable[[], Adapter], say: Callable[[str], object]) -> None:
        """Write again what is no longer as a state knows it. Rounds to come write what is theirs."""
        self.saved = {name: dict(files) for name, files in state.adapters.items()}
        held = {"initial", "last", *(("best",) if state.best_round == state.round else ())}
        rounds = read_run(self.writer.folder).rounds
        if self._account:
            for past in rounds:
                self._account.add(past["round"], past["clients"])
        for name, files in damaged_adapters(self.writer.folder, state).items():
            if name in held:
                say(f"adapters/{name} ({', '.join(files)}) is not what it was: written again")
                adapter, record = (read_initial(), None) if name == "initial" else (state.adapter, rounds[state.round])
                self._save(adapter, name, write_card(self._recipe, self._plan, record))

    def add_client(self, update: ClientUpdate) -> None:
        """Write one client's work in a round down."""
        self.writer.append_client(update.report)
        self._meter.add(update.adapter.weights_P, self._weigh(update.report) * update.weight_scale)

    def record(self, result: RoundResult, run: FederatedRun) -> RoundRecord:
        """Write one round down, and keep its adapter."""
        error = self._meter.take()
        measured: Record = {"lora_error": error.whole, "lora_error_layers": error.layers} if error else {}
        if self._account:
            self._account.add(result.round, [report.client for report in result.reports])
            measured["epsilon"] = self._account.epsilon
        if "quantile" in self._plan.privacy.get("central", {}):
            measured["next_max_norm"] = norm_of(run.strategy_state)
        if self.runs_together > 1:
            measured["runs_together"] = self.runs_together
        lowered = self._session.take_lowered()
        if self._plan.strategy:  # the caller's own, which weighs clients as it likes
            result = replace(result, shares={}, capped=())
        record = self.writer.append_round(result, {**self._session.telemetry.take(), **measured, **lowered})
        card = write_card(self._recipe, self._plan, record)
        self._save(result.adapter, "last", card)
        if is_best(result, run):
            self._save(result.adapter, "best", card)
        every = self._recipe.federation.keep_every
        if every and result.round and result.round % every == 0:
            # Not among `saved`: whoever has no use for it any more may remove it, and no run is damaged.
            self._write(result.adapter, f"round-{result.round}", card)
        self.writer.write_status("running", round=result.round, stopped_early=run.stopped_early, **lowered)
        return record

    def forget_measured(self) -> None:
        """Drop what was measured since the last round was recorded: it is no round's."""
        self._session.telemetry.take()

    def _save(self, adapter: Adapter, name: str, card: str) -> None:
        self._write(adapter, name, card)
        with writing(self.adapters / name):
            self.saved[name] = hash_folder(self.adapters / name)

    def _write(self, adapter: Adapter, name: str, card: str) -> None:
        with writing(self.adapters / name):
            self._session.adapted.save(adapter, self.adapters / name, card)


def is_best(result: RoundResult, run: FederatedRun) -> bool:
    """Return whether a round's adapter is the best so far: of equal ones, the last; never one not evaluated."""
    loss = result.judged_loss
    return loss is not None and all(loss <= other for other in run.losses if other is not None)


@contextmanager
def open_run(writer: RunWriter, recipe: Recipe, prepared: Prepared) -> Iterator[RunWriter]:
    """Write a run directory whose status and report say how the run ended, whatever happens inside."""
    try:
        writer.write_status("running")
        if not has_plan(writer.folder):
            writer.write_text("recipe.toml", recipe_to_toml(recipe))
            writer.write_json("resolved.json", recipe.model_dump(mode="json"))
            writer.write_json("environment.json", describe_machine())
            writer.write_json("plan.json", prepared.plan.to_json())
        failpoint("run.opened")
        yield writer
        writer.write_status("done", overfitting_onset=overfitting_onsets(read_run(writer.folder).rounds))
        (writer.folder / SECRET).unlink(missing_ok=True)
    except KeyboardInterrupt:
        _write_end(writer, "interrupted")
        raise
    except FedloomError as error:
        _write_end(writer, "failed", error=str(error))
        raise
    except BaseException as error:
        _write_end(writer, "failed", error=f"bug: {type(error).__name__}")
        raise
    # After the status: a run is done without its report.
    write_report(writer.folder)
    failpoint("report.written")


def _write_end(writer: RunWriter, state: str, **more: Any) -> None:
    """Write down that a run ended early. Errors in here are dropped: the one that ended the run is what is raised."""
    with suppress(Exception):
        writer.write_status(state, **more)
        write_report(writer.folder)
