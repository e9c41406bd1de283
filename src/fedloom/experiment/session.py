"""What runs over one base model share: the model, an engine, and what measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.experiment.preparation import Prepared
from fedloom.federation.fleet import LocalFleet
from fedloom.federation.rounds import FederatedRun, RoundResult, run_together
from fedloom.host.files import hash_text
from fedloom.monitoring.telemetry import Telemetry
from fedloom.records.state import hash_tensors
from fedloom.training.engines import ENGINES
from fedloom.training.jobs import ClientJob, ClientResult


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


def identify(prepared: Prepared, adapted: AdaptedModel) -> dict[str, str]:
    """Hashes of all that a run's result comes from beside its recipe: the model as it was loaded, and the data."""
    blocks = [prepared.central, *(part for client in prepared.clients for part in (client.train, client.holdout))]
    documents = hash_tensors(tensors_of(blocks))
    if prepared.told:
        documents = hash_text("".join([documents, *prepared.told]))
    return {"base model": hash_base(adapted), "documents": documents}


def hash_base(adapted: AdaptedModel) -> str:
    """Of the model as it was loaded, the adapter that it begins with included: before anything is trained."""
    return hash_tensors(adapted.model.state_dict().values())


def tensors_of(parts: Iterable[TokenBlocks]) -> list[Tensor]:
    """All that blocks consist of."""
    return [tensor for part in parts for tensor in (part.tokens_NT, part.lengths_N, part.counted_N)]
