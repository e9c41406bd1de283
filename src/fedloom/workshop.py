"""What runs over one base model share, and one run on it: the fleet, the rounds, and who writes them down."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.baselines import Baseline, set_up_baselines
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import FedloomError, TrainingError
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.federation.aggregation import WEIGHTS
from fedloom.federation.fleet import LocalFleet, LoyalFleet
from fedloom.federation.lora_error import AveragingMeter
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.federation.rounds import FederatedRun, RoundResult, run_together
from fedloom.host.failpoints import failpoint
from fedloom.host.files import clear_unfinished, hash_folder, writing
from fedloom.host.machine import describe_machine
from fedloom.monitoring.telemetry import Telemetry
from fedloom.preparation import Prepared, choose_judges
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.records.card import write_card
from fedloom.records.plan import Plan
from fedloom.records.run import Record, overfitting_onsets, read_run
from fedloom.records.state import RunState, damaged_adapters, forget_states, hash_tensors, save_state
from fedloom.records.writer import RECORDS, RunWriter
from fedloom.report.run_report import write_report
from fedloom.training.engines import ENGINES
from fedloom.training.jobs import ClientJob, ClientResult, ClientUpdate


class Workshop:
    """A model, an engine and what measures them: all that runs share which train on the same base model.

    What is neither training nor evaluation here is aggregation and its records.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        engine: str,
        telemetry: Telemetry,
        say: Callable[[str, str], object] = "{}: {}".format,
    ) -> None:
        self.adapted = adapted
        self.telemetry = telemetry
        self._engine_name = engine
        self._engine = ENGINES[engine](adapted, telemetry.watch, self._lower)
        self._say = say
        self._lowered: int | None = None

    def _lower(self, clients: int) -> None:
        self._lowered = clients
        self._say("memory", f"not enough: {clients} at once from now on; the clients under way begin their round again")

    def take_lowered(self) -> dict[str, int]:
        """How many clients train at once since memory ran out, where it did since the last look."""
        lowered, self._lowered = self._lowered, None
        return {"clients_at_once": lowered} if lowered else {}

    def train_clients(self, jobs: Sequence[ClientJob]) -> Iterator[ClientResult]:
        return self.telemetry.iterate("training", self._engine(jobs))

    def run_all(
        self, runs: Sequence[tuple[FederatedRun, LocalFleet]]
    ) -> Iterator[tuple[int, RoundResult | TrainingError]]:
        """The rounds of several runs, by their arms: in one pass where the engine takes all their clients at once."""
        for group in [runs] if self._engine_name == "batched" else [[run] for run in runs]:
            yield from run_together(group, self.train_clients)

    def score(self, adapter: Adapter, blocks: TokenBlocks, *, batch_size: int) -> Score:
        with self.telemetry.phase("evaluation"):
            return evaluate(self.adapted, adapter, blocks, batch_size=batch_size, watch=self.telemetry.watch)


@dataclass(frozen=True)
class Arm:
    """A run that is ready to begin, the clients that train for it, and who writes it down."""

    recipe: Recipe
    prepared: Prepared
    run: FederatedRun
    fleet: LoyalFleet
    recorder: Recorder

    def begin(self, initial: Adapter) -> None:
        """Nothing is on record of a run that never was at its first round, or that can't go on from any other."""
        forget_states(self.recorder.writer.folder)
        self.recorder.writer.cut_records(dict.fromkeys(RECORDS, 0))
        clear_unfinished(self.recorder.adapters)
        self.recorder.begin(initial)

    def commit(self, identity: Mapping[str, str]) -> None:
        """Make the last round one that is never lost."""
        run, fleet, writer = self.run, self.fleet, self.recorder.writer
        state = RunState(
            adapter=run.adapter,
            strategy=run.strategy_state,
            losses=run.losses,
            scores=fleet.scores,
            optimizers=fleet.optimizer_states,
            record_bytes=writer.record_bytes,
            record_hashes=writer.record_hashes,
            adapters=self.recorder.saved,
            norms=run.gate.norms,
            identity=identity,
        )
        save_state(writer.folder, state)

    def restore(self, state: RunState, read_initial: Callable[[], Adapter], say: Callable[[str], object]) -> None:
        """Go on from a committed round; what was written of a later one is taken back, and `say` told what was mended.

        `read_initial` gives the adapter that the run began with.
        """
        self.recorder.writer.cut_records(state.record_bytes)
        clear_unfinished(self.recorder.adapters)
        self.recorder.mend(state, read_initial, say)
        self.run.restore(state.adapter, state.strategy, state.losses, state.norms)
        self.fleet.restore(state.optimizers, state.scores)


def set_up(
    recipe: Recipe,
    prepared: Prepared,
    workshop: Workshop,
    writer: RunWriter,
    initial: Adapter,
    *,
    clients_at_once: int,
    number: int = 0,
    fleet: LoyalFleet | None = None,
) -> Arm:
    """Everything for one run over the workshop's model, from an adapter that every client starts from.

    Its clients are those of `fleet`; without one, they are here.
    """
    training = recipe.training.model_copy(update={"clients_at_once": clients_at_once})
    recipe = recipe.model_copy(update={"training": training})
    score = partial(workshop.score, batch_size=recipe.evaluation.batch_size)

    def score_central(adapter: Adapter) -> Score | None:
        return score(adapter, prepared.central) if len(prepared.central) else None

    recorder = Recorder(recipe, prepared.plan, workshop, writer)
    judges = choose_judges([len(client.holdout) for client in prepared.clients], recipe)
    fleet = fleet or LocalFleet(prepared.clients, workshop.train_clients, score, judges)
    aggregate = LORA_RULES[recipe.federation.lora_rule](recipe.federation)
    run = FederatedRun(
        recipe,
        fleet,
        aggregate,
        score_central,
        initial,
        on_update=recorder.add_client,
        holdings=fleet.holdings,
        arm=number,
    )
    return Arm(recipe, prepared, run, fleet, recorder)


def baselines_of(arm: Arm, workshop: Workshop, *, rounds: int, first_arm: int = 0) -> list[Baseline]:
    """The baselines that a run's recipe asks for, ready to begin from the adapter that it began with."""
    initial = workshop.adapted.open(arm.recorder.adapters / "initial")
    score = partial(workshop.score, batch_size=arm.recipe.evaluation.batch_size)
    return set_up_baselines(
        arm.recipe,
        arm.prepared.clients,
        arm.prepared.central,
        initial,
        workshop.train_clients,
        score,
        rounds=rounds,
        judges=choose_judges([len(client.holdout) for client in arm.prepared.clients], arm.recipe),
        first_arm=first_arm,
    )


def train_baselines(baselines: Sequence[Baseline], workshop: Workshop) -> None:
    """All of them in one pass where the engine can; they are numbered as they stand here."""
    for number, result in workshop.run_all([(baseline.run, baseline.fleet) for baseline in baselines]):
        baselines[number].note(result)


def identify(prepared: Prepared, adapted: AdaptedModel) -> dict[str, str]:
    """Hashes of all that a run's result comes from beside its recipe: the model as it was loaded, and the data."""
    blocks = [prepared.central, *(part for client in prepared.clients for part in (client.train, client.holdout))]
    documents = hash_tensors(tensors_of(blocks))
    if prepared.told:
        documents = hashlib.sha256("".join([documents, *prepared.told]).encode()).hexdigest()
    return {"base model": hash_base(adapted), "documents": documents}


def hash_base(adapted: AdaptedModel) -> str:
    """Of the model as it was loaded, the adapter that it begins with included: before anything is trained."""
    return hash_tensors(adapted.model.state_dict().values())


def tensors_of(parts: Iterable[TokenBlocks]) -> list[Tensor]:
    """All that blocks consist of."""
    return [tensor for part in parts for tensor in (part.tokens_NT, part.lengths_N, part.counted_N)]


class Recorder:
    """Writes a run down, round by round, and keeps its adapters."""

    def __init__(self, recipe: Recipe, plan: Plan, workshop: Workshop, writer: RunWriter) -> None:
        self._recipe, self._plan, self._workshop = recipe, plan, workshop
        self.writer = writer
        self.adapters = writer.folder / "adapters"
        self.runs_together = 1
        """In one pass: its seconds are those of all of them."""
        self.saved: dict[str, dict[str, str]] = {}
        """SHA-256 of the files of each adapter."""
        self._meter = AveragingMeter(workshop.adapted.layout)
        self._weigh = WEIGHTS[recipe.federation.strategy.weight_by]

    def begin(self, initial: Adapter) -> None:
        """Keep the adapter that every client starts from."""
        self._save(initial, "initial", write_card(self._recipe, self._plan, None))
        self.writer.write_status("running", round=0, rounds=self._recipe.federation.rounds)

    def mend(self, state: RunState, read_initial: Callable[[], Adapter], say: Callable[[str], object]) -> None:
        """Write again what is no longer as a state knows it; of a later round, the rounds that come write it again."""
        self.saved = {name: dict(files) for name, files in state.adapters.items()}
        held = {"initial", "last", *(("best",) if state.best_round == state.round else ())}
        rounds = read_run(self.writer.folder).rounds
        for name, files in damaged_adapters(self.writer.folder, state).items():
            if name in held:
                say(f"adapters/{name} ({', '.join(files)}) is not what it was: written again")
                adapter, record = (read_initial(), None) if name == "initial" else (state.adapter, rounds[state.round])
                self._save(adapter, name, write_card(self._recipe, self._plan, record))

    def add_client(self, update: ClientUpdate) -> None:
        """One client's work in a round."""
        self.writer.append_client(update.report)
        self._meter.add(update.adapter.weights_P, self._weigh(update.report))

    def record(self, result: RoundResult, run: FederatedRun) -> Record:
        """One round, and whether the run ends with it."""
        error = self._meter.take()
        measured: Record = {"lora_error": error.whole, "lora_error_layers": error.layers} if error else {}
        if self.runs_together > 1:
            measured["runs_together"] = self.runs_together
        lowered = self._workshop.take_lowered()
        record = self.writer.append_round(result, {**self._workshop.telemetry.take(), **measured, **lowered})
        card = write_card(self._recipe, self._plan, record)
        self._save(result.adapter, "last", card)
        if result.judged_loss <= min(run.losses):
            self._save(result.adapter, "best", card)
        stopped = {"stopped_early": run.stopped_early} if run.stopped_early else {}
        self.writer.write_status("running", round=result.round, **stopped, **lowered)
        return record

    def _save(self, adapter: Adapter, name: str, card: str) -> None:
        with writing(self.adapters / name):
            self._workshop.adapted.save(adapter, self.adapters / name, card)
            self.saved[name] = hash_folder(self.adapters / name)


@contextmanager
def open_run(writer: RunWriter, recipe: Recipe, prepared: Prepared) -> Iterator[RunWriter]:
    """A run directory whose status and report say how the run ended, whatever happens inside."""
    try:
        writer.write_status("running")
        if not (writer.folder / "plan.json").is_file():
            writer.write_text("recipe.toml", recipe_to_toml(recipe))
            writer.write_json("resolved.json", recipe.model_dump(mode="json"))
            writer.write_json("environment.json", describe_machine())
            writer.write_json("plan.json", prepared.plan.to_json())
        failpoint("run.opened")
        yield writer
        writer.write_status("done", overfitting_onset=overfitting_onsets(read_run(writer.folder).rounds))
    except KeyboardInterrupt:
        _write_end(writer, "interrupted")
        raise
    except FedloomError as error:
        _write_end(writer, "failed", error=str(error))
        raise
    except BaseException as error:
        _write_end(writer, "failed", error=f"bug: {type(error).__name__}")
        raise
    write_report(writer.folder)  # a run is done without it
    failpoint("report.written")


def _write_end(writer: RunWriter, state: str, **more: Any) -> None:
    """How a run ended that was not meant to, and a report that says so; what failed is raised, not what comes after."""
    with suppress(Exception):
        writer.write_status(state, **more)
        write_report(writer.folder)
