"""A session: the model, an engine and what measures them, which runs over one base model share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.splits import HOLDS_OUT
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Asked, Score, adapters_at_once, score_adapters
from fedloom.experiment.preparation import Prepared
from fedloom.federation.fleet import LocalFleet, Scorer
from fedloom.federation.rounds import FederatedRun, RoundResult, run_together
from fedloom.host.files import hash_text
from fedloom.model.spreading import at_hand
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.telemetry import Telemetry
from fedloom.records.state import hash_tensors
from fedloom.text import count
from fedloom.training.engines import Engine
from fedloom.training.jobs import ClientJob, ClientResult


class Session:
    """A loaded model, an engine and what measures them: all that runs share which train on the same base model.

    Whatever is neither training nor evaluation here is aggregation and its records. `batched` says whether the engine
    takes all clients of several runs at once.
    """

    def __init__(
        self, adapted: AdaptedModel, engine: Engine, telemetry: Telemetry, observer: Observer, *, batched: bool
    ) -> None:
        self.adapted = adapted
        self.telemetry = telemetry
        self.watch = observer.watch
        self.batched = batched
        self._engine = engine
        self._lowered_to: int | None = None
        self.say, self.begin_stage = observer.show_step, observer.show_stage
        self._most_tokens: int | None = None

    def take_lowered(self) -> dict[str, int]:
        """Return how many clients train at once since memory ran out, where it did since the last look."""
        before, self._lowered_to = self._lowered_to, self._engine.lowered_to
        return {"clients_at_once": self._lowered_to} if self._lowered_to and self._lowered_to != before else {}

    def train_clients(self, jobs: Sequence[ClientJob]) -> Iterator[ClientResult]:
        """Train with the session's engine; the time and memory until each result are training's."""
        return self.telemetry.iterate("training", self._engine.train(jobs))

    def run_all(
        self, runs: Sequence[tuple[FederatedRun, LocalFleet]]
    ) -> Iterator[tuple[int, RoundResult | TrainingError]]:
        """Yield the rounds of several runs, by trial: in one pass where the engine takes all their clients at once."""
        for group in [runs] if self.batched else [[run] for run in runs]:
            yield from run_together(group, self.train_clients)

    def score(self, asked: Sequence[Asked], *, batch_size: int, at_once: int = 1) -> list[Score]:
        """Score adapters, each on held-out blocks of its own; the time and memory are evaluation's."""
        with self.telemetry.phase("evaluation"):
            return score_adapters(
                self.adapted,
                asked,
                batched=self.batched,
                batch_size=batch_size,
                at_once=at_once,
                most_tokens=self._most_tokens,
                watch=self.watch,
                lower=self._score_fewer,
            )

    def _score_fewer(self, tokens: int) -> None:
        self._most_tokens = tokens
        self.say("memory", f"not enough: evaluation takes {count(tokens, 'token')} at once from now on")

    def scorer(self, batch_size: int) -> Scorer:
        """Return `score` for batches of a size: of many adapters in one pass where the engine trains clients so."""
        at_once = adapters_at_once(self.adapted.layout.size) if self.batched else 1
        return Scorer(partial(self.score, batch_size=batch_size, at_once=at_once), at_once)


def identify(prepared: Prepared, adapted: AdaptedModel) -> dict[str, str]:
    """Hash all that a run's result comes from beside its recipe: the model as it was loaded, and the data."""
    blocks = [prepared.central, *(part for client in prepared.clients for part in (client.train, client.holdout))]
    documents = hash_tensors(tensors_of(blocks))
    if prepared.told:
        documents = hash_text("".join([documents, *prepared.told]))
    found = {"base model": hash_base(adapted), "documents": documents, "hold-outs": HOLDS_OUT}
    return {**found, "tasks": prepared.tasks.digest} if prepared.tasks else found


def hash_base(adapted: AdaptedModel) -> str:
    """Hash the model as it was loaded, the adapter that it begins with included: before anything is trained."""
    return hash_tensors(at_hand(adapted.model, *item) for item in adapted.model.state_dict().items())


def tensors_of(parts: Iterable[TokenBlocks]) -> list[Tensor]:
    """Return all tensors that blocks consist of."""
    return [tensor for part in parts for tensor in part.tensors]
