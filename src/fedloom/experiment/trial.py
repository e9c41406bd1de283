"""One run over a session: the fleet, the rounds, and who writes them down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedloom.adapters.adapter import Adapter
from fedloom.evaluation.held_out import Score
from fedloom.experiment.baselines import Baseline, set_up_baselines
from fedloom.experiment.preparation import Prepared, choose_judges
from fedloom.experiment.recorder import Recorder
from fedloom.experiment.session import Workshop
from fedloom.federation.fleet import LocalFleet, LoyalFleet
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.federation.rounds import FederatedRun
from fedloom.host.files import clear_unfinished
from fedloom.recipe.recipe import Recipe
from fedloom.records.state import RunState, forget_states, save_state
from fedloom.records.writer import RECORDS, RunWriter


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
