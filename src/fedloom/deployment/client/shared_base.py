"""Base model with an adapter on it, held once for all clients of a worker, and the trainings that they share.

What is a client's own, its documents, its secret and its adapter, comes with each job and stays nowhere here.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.deployment.client.display import say
from fedloom.errors import LateError
from fedloom.experiment.building import adapt, load_base
from fedloom.experiment.session import hash_base
from fedloom.model.source import ModelSource
from fedloom.progress import Progress, Watch, ignore
from fedloom.recipe.recipe import Recipe
from fedloom.records.state import hash_tensors
from fedloom.training.engines import Engine, choose_engine, open_engine
from fedloom.training.jobs import ClientJob, ClientResult, can_share_a_step

OWNERS_KEYS = {"text", "chat_template"}
"""Keys of a recipe's section `data` that are each owner's own, and change nothing about a model."""


class SharedBase:
    """Base model of a recipe with an adapter on it, and the engine that trains clients on it."""

    def __init__(self, recipe: Recipe, source: ModelSource, *, keeps_start: bool) -> None:
        """Load it.

        Raises:
            FedloomError: it can't be had.
        """
        base = load_base(recipe, source)
        # Before the adapter is put on it: what its owner can pin is the hash of the weights alone.
        self.weights = hash_tensors(base.state_dict().values())
        self.adapted: AdaptedModel = adapt(base, recipe, source)
        self.sha256 = hash_base(self.adapted)
        """Hash of all that every client begins with."""
        self.start: Adapter | None = self.adapted.read() if keeps_start else None
        """Adapter that every client begins with, where somebody may ask for it."""
        self._recipe, self._counter = recipe, _Counter()
        self._engine: Engine | None = None
        self.takes_several = False
        """True where several clients can train in one pass."""

    def open_engine(self) -> None:
        """Open what trains, once: it runs the model, which the clients' policies must have allowed before.

        Raises:
            FedloomError: the model can't be trained so.
        """
        if self._engine is None:
            recipe = self._recipe
            name = choose_engine(recipe.adapter, recipe.training, recipe.model, self.adapted)
            self._engine = open_engine(name, self.adapted, recipe.data, self._counter, say)
            self.takes_several = name == "batched"

    def train(self, jobs: Sequence[ClientJob], count: Watch) -> Iterator[ClientResult]:
        """Carry out jobs in one pass, and tell `count` of each step; it may raise, which ends the pass."""
        assert self._engine is not None, "opened first"
        self._counter.count = count
        return self._engine.train(jobs)


class _Counter:
    """Listener of an engine, which has one for all its life, that passes on what it hears.

    Were it the base's method, base and engine would hold each other, and the memory would not be free at once.
    """

    def __init__(self) -> None:
        self.count: Watch = ignore

    def __call__(self, progress: Progress) -> None:
        self.count(progress)


class Bases:
    """Holder of the base model that all clients of a worker have together: one at a time."""

    def __init__(self) -> None:
        self.users: list[Callable[[], object]] = []
        """Functions that have a client let go of the base model."""
        self._held: weakref.ref[SharedBase] | None = None
        self._told: tuple[str, ...] = ()

    def open(self, recipe: Recipe, source: ModelSource, *, asks: bool) -> SharedBase:
        """Return the base model of a recipe: the one that is held, or another, for which all let go of that one.

        `asks` is whether the client has tasks of its own, which are asked of the adapter that everybody begins with.

        Raises:
            FedloomError: it can't be had.
        """
        # Of a whole model, what it begins with is as large as the model.
        keeps_start = asks or recipe.adapter.method != "full"
        told = recipe.model_dump_json(exclude={"data": OWNERS_KEYS}), source.name, source.revision, str(keeps_start)
        held = self._held() if self._held and told == self._told else None
        if held is None:
            self.let_go()
            held = SharedBase(recipe, source, keeps_start=keeps_start)
            self._held, self._told = weakref.ref(held), told
        return held

    def let_go(self) -> None:
        """Have all clients let go of the base model, which each opens again when it is asked."""
        for let_go in self.users:
            let_go()
        self._held = None
        gc.collect()  # two models may not fit in memory, and parts of one hold each other


class Waiting(Protocol):
    """Client that waits for a training."""

    until: float
    """Time, on the monotonic clock, after which nobody waits for its answer."""

    def count(self, progress: Progress) -> None:
        """Count a step that is done."""
        ...


class Wanted(NamedTuple):
    """Training that a client's answer needs."""

    base: SharedBase
    job: ClientJob
    client: Waiting

    @property
    def may_share(self) -> bool:
        """Return whether it can be in one pass with another.

        In a private run it can't: beside another's documents the rounding of an answer would be theirs too, which no
        noise of theirs covers.
        """
        return self.base.takes_several and self.job.ration is None


def train_together(wanted: Sequence[Wanted]) -> Iterator[tuple[int, ClientResult | Exception]]:
    """Yield what comes of each training, by its place, when it is there: a result, or the error that ended its pass.

    As many are in one pass as can be. Each result is what it would be alone, but for the rounding of the engine.
    """
    for places in share_out(wanted):
        yield from _train_pass({wanted[place].job.client: (place, wanted[place]) for place in places})


def _train_pass(asked: Mapping[int, tuple[int, Wanted]]) -> Iterator[tuple[int, ClientResult | Exception]]:
    """Carry out the trainings of one pass, which stand with their places by their clients' numbers."""
    left = dict(asked)
    base, jobs = next(one.base for _, one in asked.values()), [one.job for _, one in asked.values()]

    def count(progress: Progress) -> None:
        assert progress.client is not None, "a step of training is a client's"
        asked[progress.client][1].client.count(progress)
        # For one that is late the others don't stop: its answer is given up when it is there.
        check_time(max(one.client.until for _, one in left.values()))

    try:
        for result in base.train(jobs, count):
            place, _ = left.pop(result.client)
            yield place, result
    # Of any kind: what a server is told of it is each client's to say.
    except Exception as error:
        yield from ((place, error) for place, _ in left.values())


def share_out(wanted: Sequence[Wanted]) -> list[list[int]]:
    """Return the places of the trainings of each pass, in the order of their clients' numbers, whoever came first."""
    passes: list[list[int]] = []
    for place, one in sorted(enumerate(wanted), key=lambda pair: pair[1].job.client):
        fits = (others for others in passes if all(_fit(one, wanted[other]) for other in others))
        if others := next(fits, None):
            others.append(place)
        else:
            passes.append([place])
    return passes


def _fit(one: Wanted, other: Wanted) -> bool:
    """Return whether two clients can train in one pass; by their numbers, results are told apart."""
    if one.base is not other.base or not one.may_share or not other.may_share:
        return False
    return one.job.client != other.job.client and can_share_a_step(one.job, other.job)


def check_time(until: float) -> None:
    """Refuse to go on with what nobody waits for any more.

    Raises:
        LateError
    """
    if time.monotonic() > until:
        raise LateError("the time for an answer is over: the work is given up")
