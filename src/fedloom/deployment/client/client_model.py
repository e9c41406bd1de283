"""Base model of one recipe on a client, and the client's blocks: what answers are made from."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.deployment.client.account import Account
from fedloom.deployment.client.display import say
from fedloom.deployment.client.documents import gather_client, stamp_documents
from fedloom.deployment.client.journal import hash_task
from fedloom.deployment.client.ledger import Bound
from fedloom.deployment.client.refusals import as_owner_wrote, check_model
from fedloom.deployment.client.secret import sign_documents
from fedloom.deployment.client.terms import bound_of, take_terms
from fedloom.deployment.frames import Frame
from fedloom.deployment.messages import (
    ClientFacts,
    hide_documents,
    pack_progress,
    pack_score,
    pack_update,
    unpack_adapter,
    unpack_task,
)
from fedloom.errors import LateError
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.experiment.building import adapt, load_base
from fedloom.experiment.private import derive_ration, seed_secret, set_client_terms
from fedloom.experiment.session import hash_base, tensors_of
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.records.privacy import NOT_PRIVATE
from fedloom.records.state import hash_tensors
from fedloom.training.engines import choose_engine, open_engine
from fedloom.training.jobs import ClientFailure, ClientJob, ClientTask
from fedloom.training.optimizers import check_optimizer


class ClientModel:
    """Base model of one recipe with an adapter on it, and this client's blocks: answers are made from these."""

    def __init__(self, recipe: Recipe, name: str, path: Path, account: Account, secret: bytes) -> None:
        policy = account.policy
        recipe = as_owner_wrote(policy, recipe)
        self._stamp = partial(stamp_documents, path, policy)
        self._read = self._stamp()  # before they are read: what is changed meanwhile was changed
        self.recipe, self._account, self._secret = recipe, account, secret
        self._terms: Terms | None = None
        """Terms of a private run."""
        self.bound: Bound | None = None
        """Bound on what its rounds tell; None also where everybody can take its noise off."""
        data = gather_client(recipe, path, policy, self._agree)
        self._blocks = data.blocks
        self.until = float("inf")
        """Time, on the monotonic clock, after which nobody waits for what is worked on."""
        base = load_base(recipe, data.source)
        # Before the adapter is put on it: what its owner can pin is the hash of the weights alone.
        weights = hash_tensors(base.state_dict().values())
        say("model", f"{data.source.name}@sha256:{weights}")
        self._adapted = adapt(base, recipe, data.source)
        check_model(policy, recipe, weights=weights, **measure(self._adapted))
        check_optimizer(recipe.training, self._adapted.device)
        engine = choose_engine(recipe.adapter, recipe.training, recipe.model, self._adapted)
        self._engine = open_engine(engine, self._adapted, recipe.data, self._note, say)
        self._progress: list[Progress] = []
        self._scored: tuple[str, Score | None] = "", None
        # Of the keys that were told: a later version may have others, and the documents are the same.
        hashed, read = hash_base(self._adapted), recipe.data.model_dump_json(exclude_unset=True)
        blocks = hash_tensors(tensors_of([data.blocks.train, data.blocks.holdout]))
        places = data.places if self.is_private else None
        self.facts = ClientFacts(
            name=name,
            version=__version__,
            base=hashed,
            documents=sign_documents(secret, hashed, str(recipe.seed), read, blocks),
            train_documents=places or len(data.documents.train),
            holdout_documents=len(data.documents.holdout),
            blocks=places or len(data.blocks.train),
            tokens=data.blocks.train.num_tokens,
            holdout_blocks=len(data.blocks.holdout),
            holdout_tokens=data.blocks.holdout.num_tokens,
            shared_blocks=data.shared_blocks,
            dropped=data.dropped,
            leaks=data.leaks,
            noise_multiplier=self._terms and self._terms.noise_multiplier,
        )

    def _agree(self, places: int) -> None:
        """Take the terms of a private run for so many documents, or its owner's where those have more noise.

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

    def _note(self, progress: Progress) -> None:
        """Count a step or a batch that is done, and give up where nobody waits for the next.

        Raises:
            LateError
        """
        self._progress.append(progress)
        check_time(self.until)

    def evaluate(self, asked: Frame) -> Frame:
        """Score an adapter on this client's own hold-out."""
        return pack_score(self._score(unpack_adapter(asked, self._adapted.layout, self.recipe.federation.lora_rule)))

    def read_task(self, asked: Frame) -> ClientTask:
        """Read the task in a question.

        Raises:
            MessageError: it is not a task of this recipe.
        """
        return unpack_task(asked, self._adapted.layout, self.recipe.federation)

    def describe(self, task: ClientTask) -> dict[str, Any]:
        """Describe a task for its owner's journal."""
        epochs, blocks = task.training.epochs, self._blocks.train
        steps = self._terms.steps if self._terms else task.training.steps_of(len(blocks))
        return {
            "model": self.recipe.model.source,
            "round": task.round,
            "epochs": epochs,
            "steps": steps,
            "tokens": epochs * blocks.num_tokens,
            **({"outdated": True} if self.is_outdated() else {}),
        }

    def tell(self, do: str, found: Frame) -> Frame:
        """Return an answer as it leaves: with what was worked on, and in a private run without what tells of documents.

        All answers but refusals go through here.
        """
        found = pack_progress(found, self.take_progress())
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

    def train(self, asked: Frame, task: ClientTask, attempt: int = 0) -> Frame:
        """Train for a round; where it is to be judged, score the adapter before and after it.

        `attempt` is how many answers to the same task were given that have other noise.
        """
        before = self._score(task.adapter) if asked.manifest["judge"] else None
        say(f"round {task.round}", "training")
        job = ClientJob(**vars(task), blocks=self._blocks.train, ration=self._ration(asked, task, attempt))
        (result,) = self._engine.train([job])
        if isinstance(result, ClientFailure):
            raise result.error
        report = result.report
        started = time.perf_counter()
        # Both or neither: a loss before says nothing of this round without the one after it.
        if before and (after := self._score(result.adapter)):
            report = replace(report, holdout_loss_before=before.loss, holdout_loss_after=after.loss,
                             evaluate_seconds=time.perf_counter() - started)  # fmt: skip
        losses = "" if report.loss_first is None else f", loss {report.loss_first:.4f} → {report.loss_last:.4f}"
        say(f"round {task.round}", f"{report.steps} steps{losses}")
        return pack_update(replace(result, report=report), task.trains_P)

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
        return evaluate(
            self._adapted,
            adapter,
            self._blocks.holdout,
            batch_size=self.recipe.evaluation.batch_size,
            watch=self._note,
            lower=lambda size: say("memory", f"not enough: evaluation takes {size} blocks at once"),
        )


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


def check_time(until: float) -> None:
    """Refuse to go on with what nobody waits for any more.

    Raises:
        LateError
    """
    if time.monotonic() > until:
        raise LateError("the time for an answer is over: the work is given up")
