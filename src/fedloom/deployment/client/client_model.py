"""Base model of one recipe on a client, and the client's blocks: what answers are made from."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

from fedloom import __version__
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.deployment.client.account import Account
from fedloom.deployment.client.display import say
from fedloom.deployment.client.documents import check_takes_all, gather_client, stamp_documents
from fedloom.deployment.client.journal import hash_task
from fedloom.deployment.client.ledger import Bound
from fedloom.deployment.client.own_adapter import DIGITS, OwnPart, Places, keep_adapter
from fedloom.deployment.client.own_tasks import OwnTasks
from fedloom.deployment.client.refusals import as_owner_wrote, check_model
from fedloom.deployment.client.secret import keyed_hash
from fedloom.deployment.client.shared_base import Bases, Wanted, check_time
from fedloom.deployment.client.terms import bound_of, take_terms
from fedloom.deployment.messages import (
    ClientFacts,
    hide_documents,
    pack_progress,
    pack_score,
    pack_update,
    unpack_adapter,
    unpack_task,
)
from fedloom.deployment.own_messages import KeptAdapter, pack_answers, pack_kept
from fedloom.errors import MessageError
from fedloom.evaluation.held_out import Score, score_adapters
from fedloom.evaluation.task_counts import OwnAnswers
from fedloom.experiment.personalising import personal_task
from fedloom.experiment.private import derive_ration, seed_secret, set_client_terms
from fedloom.experiment.session import tensors_of
from fedloom.federation.lora_rules import shared_part
from fedloom.host.frames import Frame
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.progress import Progress
from fedloom.recipe.privacy_section import DOCUMENT
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.task_section import Task
from fedloom.records.card import write_own_card
from fedloom.records.privacy import NOT_PRIVATE
from fedloom.records.state import hash_tensors
from fedloom.text import count, format_seconds
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientFailure, ClientJob, ClientResult, ClientTask, ClientUpdate
from fedloom.training.optimizers import check_optimizer

Found = TypeVar("Found")
Training = Generator[Wanted, ClientResult, Found]
"""Work that yields each training it needs, takes what came of it, and returns what it was for."""


class ClientModel:
    """Base model of one recipe with an adapter on it, and this client's blocks: answers are made from these."""

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        places: Places,
        account: Account,
        secret: bytes,
        bases: Bases,
        tasks: Sequence[Task] = (),
    ) -> None:
        """Load them, the base model unless `bases` holds it; `tasks` are the owner's own.

        Raises:
            FedloomError: documents, model or tasks can't be had, or the policy does not allow them.
        """
        policy = account.policy
        recipe = as_owner_wrote(policy, recipe)
        self._stamp = partial(stamp_documents, places.data, policy)
        self._read = self._stamp()  # before they are read: what is changed meanwhile was changed
        self.recipe, self._account, self._secret = recipe, account, secret
        self._terms: Terms | None = None
        """Terms of a private run."""
        self.bound: Bound | None = None
        """Bound on what its rounds tell; None also where everybody can take its noise off."""
        check_takes_all(recipe, places.data)
        data = gather_client(recipe, places.data, policy, self._agree)
        self._blocks, self._source = data.blocks, data.source
        self.until = float("inf")
        """Time, on the monotonic clock, after which nobody waits for what is worked on."""
        # Nothing that was counted on a document or a question leaves a private run without noise.
        asked = tasks if policy.tell_tasks and recipe.privacy is None else ()
        self._base = base = bases.open(recipe, data.source, asks=bool(asked))
        say("model", f"{data.source.name}@sha256:{base.weights}")
        self._adapted = base.adapted
        check_model(policy, recipe, weights=base.weights, **measure(base.adapted))
        check_optimizer(recipe.training, base.adapted.device)
        base.open_engine()
        self._progress: list[Progress] = []
        self._scored: tuple[str, Score | None] = "", None
        shares_P, run = shared_part(self._adapted.layout, recipe.federation.lora_rule), account.run_id
        sign, parts = partial(keyed_hash, secret, "own part", name, run), places.parts / name
        self._own = OwnPart(base.start, shares_P, parts, sign) if base.start and shares_P is not None else None
        how = recipe.data, data.source, self._adapted, recipe.evaluation.batch_size, self._note
        self._tasks = OwnTasks(asked, base.start, *how) if base.start and asked else None
        self._home = places.adapters / f"{name}-{recipe.name}-{run[:DIGITS]}"
        # Of the keys that were told: a later version may have others, and the documents are the same.
        hashed, read = base.sha256, recipe.data.model_dump_json(exclude_unset=True)
        blocks = hash_tensors(tensors_of([data.blocks.train, data.blocks.holdout]))
        units = data.places if self.is_private else None
        self.facts = ClientFacts(
            name=name,
            version=__version__,
            base=hashed,
            documents=keyed_hash(secret, hashed, str(recipe.seed), read, blocks),
            train_documents=units or len(data.documents.train),
            holdout_documents=len(data.documents.holdout),
            blocks=units or len(data.blocks.train),
            tokens=data.blocks.train.num_tokens,
            holdout_blocks=len(data.blocks.holdout),
            holdout_tokens=data.blocks.holdout.num_tokens,
            shared_blocks=data.shared_blocks,
            dropped=data.dropped,
            leaks=data.leaks,
            tasks=len(self._tasks) if self._tasks else 0,
            noise_multiplier=self._terms and self._terms.noise_multiplier,
        )

    def _agree(self, places: int) -> None:
        """Take the terms of a private run for so many units, or its owner's where those have more noise.

        Raises:
            PolicyError: the owner lets less be told.
        """
        recipe = self.recipe
        self._terms = terms = take_terms(recipe, self._account.policy.privacy, places)
        asked = set_client_terms(recipe, places)
        if terms != asked:
            least, noise = f"policy.privacy.min_noise_multiplier = {terms.noise_multiplier:g}", asked.noise_multiplier
            say("privacy", f"{least} is taken: the recipe's would be {noise:.3g}")
        self.bound = bound_of(recipe, terms)
        if self.bound:
            self._account.agree(self.bound)
        else:
            say("privacy", f"this run is {NOT_PRIVATE}")

    @property
    def is_private(self) -> bool:
        """True where the recipe has `[privacy]`, and so nothing but noised weights tells of documents."""
        return self.recipe.privacy is not None

    @property
    def unit(self) -> str:
        """Return what a private run protects: a document, or a column's value."""
        return self.recipe.privacy.unit if self.recipe.privacy else DOCUMENT

    def is_outdated(self) -> bool:
        """Return whether the files that are documents are other ones than were read."""
        return self._stamp() != self._read

    def has_counted(self, asked: Frame) -> bool:
        """Return whether its documents are those that the server counted when this client enrolled.

        They are not where this process is a later one, and read them after they were changed.
        """
        return bool(asked.manifest.get("documents", self.facts.documents) == self.facts.documents)

    def take_progress(self) -> list[Progress]:
        """Return the batches worked on since this was last called: the server counts them as its own run's."""
        taken, self._progress = self._progress, []
        return taken

    def count(self, progress: Progress) -> None:
        """Count a step or a batch that is done."""
        self._progress.append(progress)

    def _note(self, progress: Progress) -> None:
        """Count a batch that is done, and give up where nobody waits for the next.

        Raises:
            LateError
        """
        self.count(progress)
        check_time(self.until)

    def evaluate(self, asked: Frame) -> Frame:
        """Score an adapter on this client's own hold-out."""
        return pack_score(self._score(self._adapter_in(asked)))

    def _adapter_in(self, asked: Frame) -> Adapter:
        """Return the adapter in a question as this client has it: with its own part, where it has one.

        Raises:
            MessageError: it is not an adapter of this recipe.
            DeploymentError: the part that the server counts is not here.
        """
        return self._with_own(unpack_adapter(asked, self._adapted.layout, self.recipe.federation.lora_rule), asked)

    def _with_own(self, adapter: Adapter, asked: Frame) -> Adapter:
        return self._own.adapter_of(adapter, asked.manifest.get("own")) if self._own else adapter

    def read_task(self, asked: Frame) -> ClientTask:
        """Read the task in a question, with this client's own part of the adapter, where it has one.

        Raises:
            MessageError: it is not a task of this recipe.
            DeploymentError: the part that the server counts is not here.
        """
        task = unpack_task(asked, self._adapted.layout, self.recipe.federation)
        return replace(task, adapter=self._with_own(task.adapter, asked))

    def read_personal_task(self, asked: Frame) -> ClientTask | None:
        """Read the training that this client goes on with by itself; None where it has a part of the adapter already.

        Raises:
            MessageError: the recipe asks for no adapter of a client's own, or not after such a round.
        """
        recipe, round, client = self.recipe, asked.manifest["round"], asked.manifest["client"]
        if not 1 <= round <= recipe.federation.rounds + 1:
            raise MessageError("the question is of another round than the recipe has")
        if recipe.personalise is None:
            if self._own is None:
                raise MessageError("the recipe asks for no adapter of a client's own")
            return None
        if not 0 <= client < recipe.data.clients:
            raise MessageError("not a client of this recipe")
        return personal_task(recipe, self._adapter_in(asked), client, round)

    def describe(self, task: ClientTask) -> dict[str, Any]:
        """Describe a task for its owner's journal; epochs that training.max_steps cuts short are none."""
        training, blocks, terms = task.training, self._blocks.train, self._terms
        steps = terms.steps if terms else training.steps_of(len(blocks))
        uncut = training.model_copy(update={"max_steps": None}).steps_of(terms.units if terms else len(blocks))
        tokens = training.epochs * blocks.num_tokens
        if steps < uncut:  # which rows a private run draws is not known before
            tokens = round(tokens * steps / uncut) if terms else ClientJob(**vars(task), blocks=blocks).count_tokens()
        return {
            "model": self.recipe.model.source,
            "round": task.round,
            **({"epochs": training.epochs} if steps == uncut else {}),
            "steps": steps,
            "tokens": tokens,
            **({"outdated": True} if self.is_outdated() else {}),
        }

    def tell(self, do: str, found: Frame) -> Frame:
        """Return an answer as it leaves: with what was worked on, and in a private run without what tells of documents.

        All answers but refusals go through here.
        """
        # Of one's own questions, and of what stays here, nobody is told how long they are.
        found = found if do in ("tasks", "keep") else pack_progress(found, self.take_progress())
        return hide_documents(found, do) if self.is_private else found

    def _ration(self, asked: Frame, task: ClientTask, attempt: int) -> Ration | None:
        """Return the ration of a task, whose noise depends on all that its answer does; None where there is none."""
        terms, recipe = self._terms, self.recipe
        if terms is None:
            return None
        if self.bound is None:
            return derive_ration(seed_secret(recipe), terms, hash_tensors(self._blocks.train.tensors), task)
        facts = hash_task(asked), self.facts.documents, *map(str, asdict(terms).values()), str(attempt)
        return Ration(terms, derive_key(self._secret, *facts))

    def train(self, asked: Frame, task: ClientTask, attempt: int = 0) -> Training[tuple[Frame, str]]:
        """Train for a round; where it is to be judged, score the adapter before and after it. Say what was done, too.

        `attempt` is how many answers to the same task were given that have other noise.
        """
        before = self._score(task.adapter) if asked.manifest["judge"] else None
        result = yield from self._train(task, self._ration(asked, task, attempt))
        report = result.report
        started = time.perf_counter()
        # Both or neither: a loss before says nothing of this round without the one after it.
        if before and (after := self._score(result.adapter)):
            report = replace(report, holdout_loss_before=before.loss, holdout_loss_after=after.loss,
                             evaluate_seconds=time.perf_counter() - started)  # fmt: skip
        update = pack_update(replace(result, report=report), task.travels)
        if self._own:
            update = replace(update, manifest={**update.manifest, "own": self._own.keep(task.round, result.adapter)})
        return update, describe_work(report, result.own_losses)

    def _train(self, task: ClientTask, ration: Ration | None = None) -> Training[ClientUpdate]:
        job = ClientJob(**vars(task), blocks=self._blocks.train, ration=ration)
        result = yield Wanted(self._base, job, self)
        if isinstance(result, ClientFailure):
            raise result.error
        return result

    def keep(self, asked: Frame, task: ClientTask | None) -> Training[Frame]:
        """Keep an adapter that is this client's own, trained on by itself where there is a task; tell of losses alone.

        It is here whatever is told of it.
        """
        adapter, losses = self._adapter_in(asked), KeptAdapter()
        origin = "Its A is that of all clients after the last round, its B is this client's alone."
        digest, after = self._scored
        after = after if digest == adapter.sha256() else None
        if task is not None:
            before = self._score(adapter)
            adapter = (yield from self._train(task)).adapter
            epochs = count(task.training.epochs, "epoch")
            origin = (
                f"From the best adapter of all clients it went on by itself, {epochs} over this client's documents."
            )
            after = self._score(adapter) if before else None
            if before and after:
                losses = KeptAdapter(before.loss, after.loss)
        card = write_own_card(self.recipe, self._source.revision, origin, after.loss if after else None)
        keep_adapter(self._adapted, adapter, self._home, card)
        say("own", f"{self._home}: an adapter of this client's own, which stays here")
        return pack_kept(losses)

    def answer_tasks(self, asked: Frame) -> Frame:
        """Ask an adapter, and the base model where that is wanted, this client's own tasks; tell of counts alone."""
        adapter = self._adapter_in(asked)
        if self._tasks is None:
            say("kept", "the counts of its own tasks: it was asked for them, and tells of none")
            return pack_answers(None)
        if not self._account.may_tell_answers(adapter.sha256()):
            return pack_answers(None)
        found = self._tasks.ask(adapter)
        return pack_answers(OwnAnswers(found, self._tasks.ask_base() if asked.manifest["base"] else None))

    def _score(self, adapter: Adapter) -> Score | None:
        """Score an adapter, once where it is asked for again: the one door for whatever tells of the hold-out.

        None stands where nothing is held out, where this client's owner lets nothing be told of it, and in a private
        run.
        """
        if self.is_private:
            return None
        digest = adapter.sha256()
        if not len(self._blocks.holdout) or not self._account.may_tell_loss(digest):
            return None
        # The adapter that a round ends with is the one that the next begins with: the server asks twice.
        if self._scored[0] != digest:
            self._scored = digest, self._evaluate(adapter)
        return self._scored[1]

    def _evaluate(self, adapter: Adapter) -> Score:
        (score,) = score_adapters(
            self._adapted,
            [(adapter, self._blocks.holdout)],
            batched=self._base.takes_several,
            batch_size=self.recipe.evaluation.batch_size,
            watch=self._note,
            lower=lambda tokens: say("memory", f"not enough: evaluation takes {count(tokens, 'token')} at once"),
        )
        return score


def describe_work(report: ClientReport, own_losses: Sequence[float]) -> str:
    """Describe a round's training to its owner; `own_losses` are those of a private run, which nobody else sees."""
    work = f"{count(report.steps, 'step')} in {format_seconds(report.seconds)}"
    if own_losses:
        mean = f"{fmean(own_losses):.4f} on average; told to nobody"
        return f"{work}, loss {own_losses[0]:.4f} → {own_losses[-1]:.4f}, {mean}"
    if report.loss_first is not None:
        work += f", loss {report.loss_first:.4f} → {report.loss_last:.4f}"
    if report.holdout_loss_before is not None:
        work += f", on the hold-out {report.holdout_loss_before:.4f} → {report.holdout_loss_after:.4f}"
    return work


def measure(adapted: AdaptedModel) -> dict[str, Any]:
    """Return how large a share of a model's weights is trained, and whether some have a row for each token.

    So have the embedding and the head, and what an adapter puts on them: the rows that change are those of the words
    that occur.
    """
    trained = [value for value in adapted.model.parameters() if value.requires_grad]
    ends = [
        end for end in (adapted.base.get_input_embeddings(), adapted.base.get_output_embeddings()) if end is not None
    ]
    own = {id(value) for end in ends for value in end.parameters()}
    rows = {end.weight.shape[0] for end in ends if hasattr(end, "weight")}
    embedding = any(id(value) in own or not rows.isdisjoint(value.shape) for value in trained)
    return {"share": adapted.layout.size / adapted.num_parameters, "embedding": embedding}
