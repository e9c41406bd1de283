"""Answers of a branch to the server above it, out of what its own clients answer.

It asks them for what its own recipe says and for nothing else: the server above may name another number of clients, and
no other key. It answers before its own time is up, keeps no documents, no model and nothing of a round that is over.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.adapters.adapter import Layout
from fedloom.deployment.message_recipe import CLIENTS
from fedloom.deployment.messages import (
    COUNTS,
    ClientFacts,
    pack_facts,
    pack_refusal,
    pack_score,
    pack_update,
    read_question,
    unpack_adapter,
    unpack_recipe,
    unpack_task,
)
from fedloom.deployment.server.facts import check_adds_up
from fedloom.deployment.server.remote_fleet import RemoteFleet
from fedloom.deployment.server.serving import check_deployable, gather, with_limits
from fedloom.deployment.server.superlink import SuperLink
from fedloom.errors import (
    DataError,
    DeploymentError,
    FedloomError,
    LateError,
    MessageError,
    RecipeError,
    RunError,
    TrainingError,
)
from fedloom.federation.branch import Branch
from fedloom.federation.schedule import choose_scored_clients
from fedloom.host.files import hash_json
from fedloom.host.frames import Frame
from fedloom.monitoring.observer import Observer
from fedloom.progress import Say
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import flatten
from fedloom.text import count

PART = 0.9
"""Part of a branch's own time that its clients have: the rest is for its answer's way up."""
OWN = "data.clients"
"""Key of the recipe in which a branch and the server above it differ."""
WORDS: dict[type[Exception], str] = {
    LateError: "late",
    MessageError: "question",
    RecipeError: "recipe",
    DataError: "documents",
    TrainingError: "clients",
}
"""Words that the server above is told of errors; the first kind that an error is of counts."""


def check_branchable(recipe: Recipe, first_client: int) -> None:
    """Refuse what a branch can't do, before anything is started.

    Raises:
        RecipeError
        DeploymentError: its clients' numbers would be too large.
    """
    check_deployable(recipe)
    check_adds_up(recipe)
    if recipe.federation.fraction < 1:
        raise RecipeError(
            "all clients of a branch train whenever it does: which branches do, the server above draws",
            where="federation.fraction",
            mend="leave it out here",
        )
    if first_client + recipe.data.clients > CLIENTS:
        raise DeploymentError(f"clients have numbers below {CLIENTS:,}", where="--first-client", mend="lower it")


def open_branch(
    name: str,
    recipe: Recipe,
    link: SuperLink,
    show: Observer,
    check: Callable[[], object],
    *,
    folder: Path,
    wait_seconds: float,
    first_client: int = 0,
    open_question: Callable[[Frame], Frame] | None = None,
) -> Answerer:
    """Wait for the clients of a branch that `check_branchable` let through, and return what answers for them.

    `name` is the branch's as a client; answers of its clients lie in `folder` until their turn comes. `open_question`
    lets a question through, or raises MessageError (`Verifier.open`).

    Raises:
        FedloomError: the model or the clients can't be had, or they don't have the same base model.
    """
    # What a server does by itself is the server's above: its hold-out is judged by there.
    own = with_limits(recipe.model_copy(update={"data": recipe.data.model_copy(update={"central_holdout": 0})}))
    ground, exchange, names = gather(link, own, show, check, wait_seconds)
    facts = {client: exchange.facts[client] for client in names}
    if len({fact.base for fact in facts.values()}) > 1:
        raise DeploymentError(
            f"{', '.join(names)} loaded different base models",
            where="model.source",
            mend='give all the same files, the same versions of packages and model.dtype = "float32"',
        )
    scored = choose_scored_clients(
        [fact.holdout_blocks for fact in facts.values()],
        own.evaluation,
        seed=own.seed,
        private=own.privacy is not None,
    )
    fleet = RemoteFleet(
        exchange,
        names,
        # A branch does not ask again in a round: that it was lost is for the server above to wait for.
        own.federation.model_copy(update={"on_quorum_lost": "stop"}),
        [first_client + place for place in scored],
        folder,
        counted_width=own.data.max_length if own.data.pad_in_loss else None,
        first_client=first_client,
    )
    told = join_facts(name, facts, own.federation.strategy.weight_by)
    return Answerer(own, exchange.recipe, fleet, ground.setup.shape.layout, told, show.show_step, open_question)


def join_facts(name: str, facts: Mapping[str, ClientFacts], weighs: str) -> ClientFacts:
    """Return the facts of clients, by their names, as those of one: what can be counted is summed.

    Its documents are theirs: with other clients, or other documents of one, it is another client.
    """
    told = [*facts.values()]
    sums: dict[str, Any] = {key: sum(getattr(one, key) for one in told) for key in COUNTS}
    documents = hash_json({client: fact.documents for client, fact in facts.items()})
    words: dict[str, Any] = {"name": name, "version": __version__, "base": told[0].base, "documents": documents}
    # Nobody above is told of their tasks: what is right is counted for each owner apart.
    return ClientFacts(**{**sums, **words, "tasks": 0, "weighs": weighs})


class Answerer:
    """Answerer of a branch, which has its clients and waits for questions."""

    def __init__(
        self,
        recipe: Recipe,
        told: Mapping[str, Any],
        fleet: RemoteFleet,
        layout: Layout,
        facts: ClientFacts,
        say: Say,
        open_question: Callable[[Frame], Frame] | None = None,
    ) -> None:
        """Make one; `told` is what clients are told of the recipe."""
        self._recipe, self._told, self._fleet, self._layout = recipe, unpack_recipe(told), fleet, layout
        self._facts, self._say, self._open_question = facts, say, open_question or (lambda asked: asked)
        self._branch = Branch(fleet, recipe.federation, say)
        self._last: tuple[Frame, Frame] | None = None

    def attend(self) -> None:
        """Look who of the clients is there, while nothing is asked."""
        self._fleet.exchange.attend()

    def answer(self, asked: Frame, came: float | None = None) -> Frame:
        """Do what is asked, or say in one word of a list why not; the reason is shown here alone.

        `came` is when the question came, on the monotonic clock; now, if left out.

        Raises:
            DeploymentError: the link to the clients is lost for good.
            RunError: there is no room for their answers.
        """
        came = time.monotonic() if came is None else came
        try:
            asked, seconds = read_question(self._open_question(asked))
            # The answer was lost on its way: the clients' work is not asked for twice.
            if self._last and self._last[0] == asked:
                return self._last[1]
            found = self._work(asked, came + seconds)
        except (DeploymentError, RunError):
            raise
        # Of any kind: what is a bug here must not be one that the server above can end this branch with.
        except Exception as error:
            word = next((word for kind, word in WORDS.items() if isinstance(error, kind)), "internal")
            self._say("refused", f"{error if isinstance(error, FedloomError) else type(error).__name__} (told: {word})")
            if word == "internal":
                traceback.print_exception(error)
            return pack_refusal(self._facts.name, word)
        self._last = asked, found
        return found

    def _work(self, asked: Frame, until: float) -> Frame:
        """Answer a question that was read, until some time of the monotonic clock.

        Raises:
            Exception: of any kind.
        """
        manifest, rule = asked.manifest, self._recipe.federation.lora_rule
        self._check_recipe(manifest["recipe"])
        if manifest["do"] == "meet":
            return pack_facts(self._facts)
        if manifest.get("documents", self._facts.documents) != self._facts.documents:
            raise DataError("the clients here are not those that were counted for this run, or their documents are not")
        self._give_clients_time(until)
        if manifest["do"] == "evaluate":
            return pack_score(self._branch.evaluate(unpack_adapter(asked, self._layout, rule)))
        if manifest["do"] != "train":
            raise MessageError("a branch has no adapters and no tasks of its own")
        task = unpack_task(asked, self._layout, self._told.federation)
        if not manifest["judge"]:
            self._fleet.forget_scores()
        self._say(f"round {task.round}", f"training: {count(len(self._fleet.clients), 'client')}")
        update = self._branch.train(task)
        if time.monotonic() > until:
            raise LateError("the clients' answers came too late")
        self._say("told", f"the mean of round {task.round}, of {count(update.report.examples, 'block')}")
        return pack_update(update, task.travels)

    def _give_clients_time(self, until: float) -> None:
        left = PART * (until - time.monotonic())
        if left <= 0:
            raise LateError("the question came too late")
        self._fleet.exchange.seconds = min(left, self._recipe.federation.round_deadline)

    def _check_recipe(self, told: Mapping[str, Any]) -> None:
        """Refuse a recipe that is not this branch's own, but for the number of clients.

        Raises:
            MessageError: this version can't read it.
            RecipeError: it has settings that can't be combined, or another value of a key.
        """
        theirs, ours = (flatten(one.model_dump(mode="json")) for one in (unpack_recipe(told), self._told))
        if others := [key for key in sorted({*theirs, *ours} - {OWN}) if theirs.get(key) != ours.get(key)]:
            raise RecipeError(
                f"the server above has another recipe than this branch: {', '.join(others[:5])}",
                mend=f"start both with one recipe, but for {OWN}",
            )
