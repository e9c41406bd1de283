"""Account of one server's questions: each is held to the policy, written into the journal, and shown to the owner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.deployment.client.journal import (
    COUNTED,
    HIDES,
    Entry,
    Journal,
    Kind,
    describe_ledger,
    hash_task,
    open_ledger,
    rounds_of,
    standing,
)
from fedloom.deployment.client.ledger import Bound, Ledger, afford, judge, judge_delta
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.refusals import check_policy
from fedloom.errors import DeploymentError, PolicyError, SpentError
from fedloom.host.failpoints import failpoint
from fedloom.host.files import hash_json, hash_text
from fedloom.host.frames import Frame
from fedloom.text import count, format_seconds

if TYPE_CHECKING:
    from fedloom.deployment.client.policy import PrivacyPolicy
    from fedloom.recipe.recipe import Recipe
    from fedloom.training.jobs import ClientTask

LAST_SECONDS = 60.0
"""Silence after a run's last round, after which it is taken to be over."""
LONGEST_SECONDS = 86400.0
"""Longest silence that any run is waited through: a server says how long it waits, from which this is reckoned."""

ANOTHER_RUN = "the server's owner begins a run of another seed or name, which is added up in this journal"
"""Mend where all rounds of a recipe were trained."""


class Budget(NamedTuple):
    """Budget of a private recipe at this client: what its rounds cost, what was told before, and what is left."""

    bound: Bound
    all_runs: Ledger
    this_run: Ledger
    rounds: int
    """Rounds that the recipe's ε is for, and that are not trained yet."""

    def judge(self, owner: PrivacyPolicy | None, rounds: int) -> Iterator[tuple[str, str]]:
        """Yield which keys of a policy refuse so many more rounds, and why."""
        yield from judge(owner, self.all_runs, self.this_run, self.bound.cost_of(rounds))

    def afford(self, owner: PrivacyPolicy | None) -> int:
        """Return how many of the rounds that are left a policy allows."""
        return afford(owner, self.all_runs, self.this_run, self.bound, self.rounds)


def open_budget(entries: list[Entry], bound: Bound, run: str) -> Budget:
    """Return a recipe's budget, by what counts in a journal; `run` is the hash of what is told of the recipe."""
    ledgers = open_ledger(entries, bound.unit), open_ledger(entries, bound.unit, run)
    return Budget(bound, *ledgers, max(0, bound.rounds - len(rounds_of(entries, run))))


def hash_alike(told: Mapping[str, Any]) -> str:
    """Return the hash of what is told of a recipe but the commits of its model, which a server finds out."""
    model = {key: value for key, value in told["model"].items() if key not in ("revision", "weights_revision")}
    return hash_json({**told, "model": model})


def find_run(entries: list[Entry], told: Mapping[str, Any]) -> str:
    """Return by which hash a recipe is one that a journal knows: the last like it, where it leaves a commit open."""
    run, alike = hash_json(told), hash_alike(told)
    known = [
        str(entry.told.get("run")) for entry in entries if entry.kind == "meet" and entry.told.get("alike") == alike
    ]
    return known[-1] if known and "revision" not in told["model"] else run


@dataclass
class Run:
    """Run of a recipe as a client sees it."""

    recipe: str
    id: str
    """Hash of what was told of the recipe: all runs of it have the same. Its first digits are shown."""
    quiet_seconds: float
    """Silence after which it is taken to be over."""
    asked: float
    """Time of the last question, or of its answer, of the monotonic clock."""
    keeps: bool = False
    """True where an adapter of the client's own is to come of it behind the last round."""
    is_last: bool = False
    """True once its last round was trained, or the adapter was kept that comes behind it."""
    is_over: bool = False
    said: dict[str, str] = field(default_factory=dict)
    """Words that its owner saw last of each thing that is asked for in every round."""

    @property
    def until(self) -> float:
        """Return when it is taken to be over, of the monotonic clock, if no question comes before."""
        return self.asked + (LAST_SECONDS if self.is_last else self.quiet_seconds)


class Account:
    """Owner's side of a conversation with one server: what it may ask, what it asked, and what was told."""

    def __init__(self, policy: Policy, journal: Journal, say: Callable[[str, str], object], server: str = "") -> None:
        self.policy = policy
        self._begun = ""
        """Event of the round that was begun last."""
        self._journal, self._say, self._server = journal, say, server
        self._run: Run | None = None

    @property
    def run_id(self) -> str:
        """Return the hash of what was told of the run's recipe."""
        return self._running().id

    @property
    def is_over(self) -> bool:
        """Return whether the last run ended, as far as this client can tell."""
        return self._run is not None and self._run.is_over

    @property
    def goes_on(self) -> bool:
        """Return whether a run was begun and is not over."""
        return self._run is not None and not self._run.is_over

    @property
    def until(self) -> float | None:
        """Return when the run is to be looked at again, of the monotonic clock; None where none goes on."""
        return self._run.until if self._run and not self._run.is_over else None

    def leave(self) -> dict[str, Any] | None:
        """Return what `take_up` needs in another process of this machine, as JSON can hold it."""
        return asdict(self._run) if self._run else None

    def take_up(self, left: Mapping[str, Any] | None) -> None:
        """Go on with the run that another process left."""
        self._run = Run(**left) if left else None

    def begin(self, recipe: Recipe, told: Any) -> None:
        """Allow a recipe, for which the documents are about to be read and counted.

        Raises:
            PolicyError: the policy does not allow it, or too many others were asked for today.
            DeploymentError: the journal can't be kept.
        """
        # All runs of a recipe are one to a client: what else tells them apart is a server's word.
        keeps = recipe.personalise is not None or recipe.federation.lora_rule == "fedsa"
        run = Run(recipe.name, hash_json(told), LONGEST_SECONDS, time.monotonic(), keeps)
        by = f"{self._server}: " if self._server else ""
        if self._run and self.goes_on and self._run.id == run.id:  # loaded again after a rest: what was said was said
            run.said = self._run.said
        else:
            self._say("asked", f'{by}to read and count the documents for "{run.recipe}" (run {run.id[:16]})')
        check_policy(self.policy, recipe)
        where = {"model": recipe.model.source, "rounds": recipe.federation.rounds, "alike": hash_alike(told)}
        hides = {HIDES: True, "unit": recipe.privacy.unit} if recipe.privacy else {}
        self._note(run, run.id, {**where, **hides}, kind="meet", at_most=self.policy.max_meets_a_day)
        if self._run and self._run.id != run.id:
            self._end(self._run, "another recipe came")
        self._run = run

    def agree(self, bound: Bound) -> None:
        """Allow what the rounds of a recipe that are left would tell, before anything is loaded; show its owner.

        Raises:
            PolicyError: that is more than the policy lets be told.
            DeploymentError: the journal can't be read.
        """
        entries = standing(self._journal.read())
        budget = open_budget(entries, bound, self._running().id)
        owner = self.policy.privacy
        if refusals := [*judge_delta(owner, bound), *budget.judge(owner, budget.rounds)]:
            raise PolicyError(*refusals)
        self._show_spent(entries, bound)

    def train(
        self, asked: Frame, task: ClientTask, told: Mapping[str, Any], bound: Bound | None = None, documents: str = ""
    ) -> int:
        """Allow a round, which is about to be trained; return how many answers to it were given, and are gone.

        `documents` is their keyed hash.

        Raises:
            PolicyError: too many were trained, of this recipe or today, or it would tell more than may be told.
            SpentError: all rounds that the recipe's ε is for were trained.
            DeploymentError: the journal can't be kept.
        """
        run = self._running()
        if "outdated" in told:
            self._say(
                "outdated", "the documents were changed since they were read: this run goes on with what was read"
            )
        limits: dict[str, Any] = {"at_most": self.policy.max_rounds_a_day, "of_run": self.policy.max_rounds}
        attempt, event = 0, hash_task(asked)
        if bound:
            # Another answer to the same task has other noise, and costs anew; so has one of other documents.
            attempt = self._answers(event)
            event = hash_json([event, documents, bound.cost.noise, attempt])
            promised = {"unit": bound.unit, "units": bound.units, "delta": bound.delta}
            privacy = {**promised, **bound.told, **bound.cost._asdict()}
            told = {**told, "privacy": privacy, "documents": documents}
            limits["judge"] = partial(self._judge_round, run, bound)
        self._note(run, event, told, **limits)
        self._begun, run.is_last = event, task.round == task.rounds and not run.keeps
        self._say(f"round {task.round}", f"training, of {count(task.rounds, 'round')}: {_describe_work(told)}")
        if bound:
            self._show_spent(standing(self._journal.read()), bound)
            failpoint("round.noted")
        return attempt

    def give_up(self) -> None:
        """Note that the round which was begun last was given up: it does not count.

        Raises:
            DeploymentError: the journal can't be kept.
        """
        self._running().is_last = False
        self._journal.give_up(self._begun)

    def note_answer(self, asked: Frame) -> None:
        """Note that the answer to a round is on disk: from now on it may leave.

        Raises:
            DeploymentError: the journal can't be kept.
        """
        self._note(self._running(), hash_task(asked), {"round": asked.manifest["round"]}, kind="answer")
        failpoint("answer.noted")

    def has_noted_answer(self, asked: Frame) -> bool:
        """Return whether the journal knows of an answer to a round."""
        return self._answers(hash_task(asked)) > 0

    def _answers(self, task: str) -> int:
        return sum(entry.kind == "answer" and entry.event == task for entry in self._journal.read())

    def _judge_round(self, run: Run, bound: Bound, entries: list[Entry]) -> Iterator[tuple[str, str]]:
        budget = open_budget(entries, bound, run.id)
        if not budget.rounds:
            raise SpentError(
                f"{count(bound.rounds, 'round')} of this recipe were trained, and its ε is for no more",
                where="[privacy]",
                mend=ANOTHER_RUN,
            )
        yield from budget.judge(self.policy.privacy, 1)

    def _show_spent(self, entries: list[Entry], bound: Bound) -> None:
        owner, budget = self.policy.privacy, open_budget(entries, bound, self._running().id)
        more = f"{count(budget.afford(owner), 'round')} of this recipe may still be trained"
        self._say("privacy", f"{describe_ledger(owner, entries, bound.charge)}; {more}")

    def may_tell_loss(self, adapter_sha256: str) -> bool:
        """Return whether the loss of an adapter on the hold-out may be told: all that tells one asks here.

        Raises:
            DeploymentError: the journal can't be kept.
        """
        return self._may_tell("score", "the loss on the hold-out", "tell_holdout_loss", adapter_sha256)

    def may_tell_answers(self, adapter_sha256: str) -> bool:
        """Return whether it may be told how many of the owner's own tasks an adapter has right.

        Raises:
            DeploymentError: the journal can't be kept.
        """
        return self._may_tell("tasks", "the counts of its own tasks", "tell_tasks", adapter_sha256)

    def _may_tell(self, kind: Kind, what: str, key: str, adapter_sha256: str) -> bool:
        """Return whether something of an adapter may be told: a key of the policy allows it, and the limit of a day."""
        run = self._running()
        if not getattr(self.policy, key):
            self._say_once(kind, "kept", f"{what}: policy.{key}")
            return False
        event = hash_text(f"{run.id} {adapter_sha256}")
        try:
            self._note(run, event, {}, kind=kind, at_most=getattr(self.policy, COUNTED[kind][1]))
        except PolicyError as refusal:
            self._say_once(kind, "kept", f"{what}: {refusal}")
            return False
        self._say_once(kind, "told", f"{what}; each time that it is told is in the journal")
        return True

    def _say_once(self, kind: Kind, word: str, detail: str) -> None:
        """Say what became of what is asked for in every round, unless the same became of it before."""
        run = self._running()
        if run.said.get(kind) != word:
            run.said[kind] = word
            self._say(word, detail)

    def keep(self, asked: Frame, told: Mapping[str, Any]) -> None:
        """Allow an adapter that is this client's own, which is about to be made and stays here.

        Raises:
            PolicyError: too many were made today.
            DeploymentError: the journal can't be kept.
        """
        work = f": {_describe_work(told)}" if "steps" in told else ""
        self._say("asked", f"to keep an adapter of its own{work}")
        run = self._running()
        self._note(run, hash_task(asked), told, kind="own", at_most=self.policy.max_rounds_a_day)
        run.is_last = True

    def is_asked(self, seconds: float) -> None:
        """Note that a question came, for whose answer there are so many seconds: the run goes on."""
        run = self._running()
        run.asked, run.is_over = time.monotonic(), False
        # A round and the scores after it may each take that long, on the slowest of the clients.
        run.quiet_seconds = min(2 * seconds, LONGEST_SECONDS)

    def has_answered(self) -> None:
        """Note that a question was worked on until now: the silence begins here."""
        self._running().asked = time.monotonic()

    def look(self) -> None:
        """Note that the run is over, where none of its questions came for long enough."""
        run = self._run
        if not run or run.is_over:
            return
        now = time.monotonic()
        if now < run.until:
            return
        last = "its last round was trained, and " if run.is_last else ""
        try:
            self._end(run, f"{last}no question came for {format_seconds(now - run.asked)}")
        # Nobody waits for an answer here. The next question is refused for the same reason.
        except DeploymentError as error:
            self._say("error", str(error))

    def _end(self, run: Run, why: str) -> None:
        if not run.is_over:
            run.is_over = True
            self._say("ended", f'"{run.recipe}" (run {run.id[:16]}): {why}')
            self._note(run, run.id, {"why": why}, kind="end")

    def _running(self) -> Run:
        assert self._run, "a recipe comes before all else"
        return self._run

    def _note(self, run: Run, event: str, told: Mapping[str, Any], **limits: Any) -> None:
        """Write down what is about to be done in a run."""
        self._journal.note(event, {"server": self._server, "recipe": run.recipe, "run": run.id, **told}, **limits)


def _describe_work(told: Mapping[str, Any]) -> str:
    """Say how long a training will be: in epochs, too, where they are whole."""
    return ", ".join(count(told[f"{name}s"], name) for name in ("epoch", "step") if f"{name}s" in told)
