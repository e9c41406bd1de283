"""Contributions: what each client brings to the others, found by federations without it.

Each is the run once more, from the same adapter, with the same seeds, over as many rounds, for some of its clients;
many of them train in one pass. It is judged as the run is, by its best adapter: on the central hold-out, or where there
is none on what the clients hold out. What was found is written down after each pass, and a run that goes on has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import ClientBlocks
from fedloom.errors import TrainingError
from fedloom.experiment.arms import choose_arms, divide_arms
from fedloom.experiment.session import Session
from fedloom.experiment.trial import AT_ONCE, Trial
from fedloom.federation.coalitions import Coalition, shapley_values, without_each
from fedloom.federation.fleet import LocalFleet
from fedloom.federation.lora_rules import open_own_parts
from fedloom.federation.rounds import FederatedRun, RoundResult
from fedloom.host.failpoints import failpoint
from fedloom.progress import Say
from fedloom.recipe.training_section import Training
from fedloom.records.run import Record, read_json, read_run
from fedloom.report.figures import seconds_at_rate
from fedloom.text import count, format_seconds

FILE = "contributions.json"
CENTRAL = "central"
"""Name of the central hold-out among those of the clients."""


@dataclass
class Arm:
    """A federation of some of the clients."""

    clients: Coalition
    run: FederatedRun
    fleet: LocalFleet
    losses: dict[str, float] = field(default_factory=dict)
    """Losses of its best adapter on each hold-out that judges it."""
    targets: dict[str, int] = field(default_factory=dict)
    """Tokens that each of them scores."""
    tokens: int = 0
    """Tokens trained on."""
    error: str = ""

    def note(self, result: RoundResult | TrainingError, rounds: int) -> None:
        """Keep what the arm's next round came to; it ends where the run did."""
        if isinstance(result, TrainingError):
            self.error = str(result)
            return
        self.tokens += sum(report.tokens for report in result.reports)
        known = [loss for loss in self.run.losses if loss is not None]
        if result.judged_loss is not None and result.judged_loss <= min(known):
            scores = {CENTRAL: result.central} if result.central else {str(c): s for c, s in result.clients.items()}
            self.losses = {name: score.loss for name, score in scores.items()}
            self.targets = {name: score.num_targets for name, score in scores.items()}
        if result.round == rounds:
            self.run.stop("as many rounds as the run has")

    def to_json(self) -> Record:
        """Return what is on record of the arm."""
        if self.error:
            return {"clients": sorted(self.clients), "error": self.error}
        told = {"losses": self.losses, "targets": self.targets, "tokens": self.tokens}
        return {"clients": sorted(self.clients), **told}


def find_contributions(trial: Trial, session: Session, say: Say) -> None:
    """Train the arms of a finished run, and write down what each client brings."""
    writer, rounds = trial.recorder.writer, trial.run.completed
    arms = choose_arms(trial.recipe, trial.fleet.clients)
    if not arms.coalitions:
        return
    known = _read_known(trial)
    divided = divide_arms(trial.recipe, trial.prepared.plan.engine, arms.coalitions)
    passes = [one for one in divided if not all(arm in known for arm in one)]
    if passes:
        left = sum(len(one) for one in passes)
        say("without", f"{count(left, 'federation')} of some of the clients{_estimate(trial, left)}")
        session.begin_stage("contributions", left / trial.prepared.plan.arms)
    initial = session.adapted.open(trial.recorder.adapters / "initial")
    # As many at once as the run was planned with, whatever memory there is now, since that moves results by rounding:
    # unless it went on with another number that somebody asked for.
    asked, planned = writer.status.get("moved_to", {}).get(AT_ONCE), read_run(writer.folder).plan.get("arms_at_once")
    training = trial.recipe.training.model_copy(update={"clients_at_once": asked or planned})
    for one in passes:
        opened = [_open_arm(trial, session, training, initial, clients, number) for number, clients in enumerate(one)]
        for number, result in session.run_all([(arm.run, arm.fleet) for arm in opened]):
            opened[number].note(result, rounds)
        known |= {arm.clients: arm.to_json() for arm in opened}
        writer.write_json(FILE, {"rounds": rounds, "coalitions": [*known.values()]})
        writer.note_work()
        failpoint("contributions.written")
    # The run itself is the federation of everybody; before its first round stands what there is without anybody.
    losses = {clients: one["losses"] for clients, one in known.items() if "error" not in one}
    losses |= {frozenset(): _losses_of_the_run(trial, 0)}
    losses |= {frozenset(trial.fleet.clients): _losses_of_the_run(trial, read_run(writer.folder).best_round or 0)}
    targets = {name: number for one in known.values() for name, number in one.get("targets", {}).items()}
    found = _conclude(losses, targets, arms.orders)
    writer.write_json(FILE, {"rounds": rounds, "coalitions": [*known.values()], **found})


def _read_known(trial: Trial) -> dict[Coalition, Record]:
    """Return what an earlier try of this run found, by coalition."""
    told = read_json(trial.recorder.writer.folder / FILE)
    if told.get("rounds") != trial.run.completed:
        return {}
    return {frozenset(one["clients"]): one for one in told["coalitions"]}


def _open_arm(
    trial: Trial, session: Session, training: Training, initial: Adapter, clients: Coalition, number: int
) -> Arm:
    """Return the federation of some of a run's clients, ready to begin: the others hold nothing to train on."""
    recipe, prepared = trial.recipe, trial.prepared
    held = [
        blocks if client in clients else ClientBlocks(blocks.train.take(blocks.train.lengths_N < 0), blocks.holdout)
        for client, blocks in enumerate(prepared.clients)
    ]
    scored = () if len(prepared.central) else prepared.scored_clients
    own = open_own_parts(initial.layout, recipe.federation.lora_rule, lambda: initial)
    fleet = LocalFleet(held, session.train_clients, session.scorer(recipe.evaluation.batch_size), scored, own)
    # It ends with the run's last round, whatever ended that.
    federation = recipe.federation.model_copy(update={"early_stop": None, "max_bytes": None})
    whole = trial.run.completed == federation.rounds
    run = FederatedRun(
        training,
        federation,
        recipe.seed,
        fleet,
        trial.run.aggregate,
        trial.run.evaluate_central,
        initial,
        sizes=fleet.sizes,
        foresee=fleet.foresee,
        trial=number,
        evaluate_every=recipe.evaluation.every if whole else 1,
    )
    return Arm(clients, run, fleet)


def _estimate(trial: Trial, left: int) -> str:
    """Say how long so many arms will take, if they are as fast as the run's rounds were."""
    plan, rounds = trial.prepared.plan, trial.past_rounds()
    stages = plan.stages_left(rounds, ended=trial.run.stopped_early is not None)
    (stage,) = (stage for stage in stages if stage.name == "contributions")
    seconds = seconds_at_rate([dict(one) for one in rounds], stage.part(left / plan.arms))
    return "" if seconds is None else f", in about {format_seconds(seconds)}"


def _losses_of_the_run(trial: Trial, round: int) -> dict[str, float]:
    """Return a round's losses on each hold-out that judges it."""
    record = trial.past_rounds()[round]
    return {CENTRAL: record["central_loss"]} if len(trial.prepared.central) else dict(record["client_losses"])


def _conclude(
    losses: Mapping[Coalition, Mapping[str, float]], targets: Mapping[str, int], orders: Sequence[Sequence[int]]
) -> Record:
    """Return by how much each client lowers the loss, in nats per token; who has an arm that failed is left out.

    `leave_one_out` is on what the others hold out, or on the central hold-out; `shapley` on the same for all.
    """

    def mean(clients: Coalition, leave_out: str = "") -> float | None:
        kept = {name: loss for name, loss in losses[clients].items() if name != leave_out}
        total = sum(targets[name] for name in kept)
        return sum(loss * targets[name] for name, loss in kept.items()) / total if total else None

    everybody = max(losses, key=len)
    brought = {}
    for client, others in without_each(sorted(everybody)).items():
        if others in losses:
            without, together = mean(others, str(client)), mean(everybody, str(client))
            if without is not None and together is not None:
                brought[str(client)] = without - together
    found: Record = {"leave_one_out": brought}
    means = {clients: loss for clients in losses if (loss := mean(clients)) is not None}
    if orders and means.keys() >= {frozenset(order[:size]) for order in orders for size in range(len(order))}:
        found["shapley"] = {str(client): value._asdict() for client, value in shapley_values(means, orders).items()}
        found["orders"] = len(orders)
    return found
