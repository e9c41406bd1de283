"""What a run would need, told before it starts. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fedloom.progress import Phase
from fedloom.text import count, format_trainable

if TYPE_CHECKING:
    from fedloom.data.splits import Audit


@dataclass(frozen=True)
class ClientPlan:
    """One client's share: documents, the token blocks that they give, and the optimizer steps of a round."""

    train_documents: int
    holdout_documents: int
    blocks: int
    tokens: int
    holdout_tokens: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """What is loaded, who holds what, and what a run costs in steps, tokens and bytes."""

    name: str
    model: str
    model_revision: str
    dtype: str
    device: str
    engine: str
    parameters: int
    """Of the base model with the adapter."""
    trainable_parameters: int
    data: str
    data_revision: str
    documents: int
    skipped: Mapping[str, int]
    judged_tokens: int
    """Of the clients' hold-outs that are scored."""
    central_documents: int
    central_tokens: int
    clients: tuple[ClientPlan, ...]
    left_out: tuple[str, ...]
    """Clients that the partition made and that have nothing to train on, each with why; the others are numbered
    without them."""
    clients_per_round: int
    clients_at_once: int
    """That train in one pass."""
    clients_that_fit: int | None
    """In the memory that was free when the plan was made; None for an engine that takes one after another."""
    peak_bytes: int | None
    """Predicted, of a training step with the base model; for the engine `batched`."""
    audit: Audit
    shared_blocks: int
    """Training blocks whose tokens are also held out though the documents differ: files that begin alike, say."""
    duplicates: str
    """What was done with copies: drop or report."""
    rounds: int
    epochs: int
    proximal_mu: float
    payload_bytes: int
    """Of one adapter, one way."""

    @property
    def steps_per_round(self) -> int:
        """Of all clients that take part, on average where only some do."""
        return round(sum(client.steps for client in self.clients) * self._share)

    @property
    def train_tokens_per_round(self) -> int:
        return round(sum(client.tokens for client in self.clients) * self.epochs * self._share)

    @property
    def tokens(self) -> dict[Phase, int]:
        """Of the whole run."""
        return {"train": self.rounds * self.train_tokens_per_round, "evaluate": self.evaluate_tokens}

    @property
    def evaluate_tokens(self) -> int:
        """Of the whole run: round 0 and every round, and each trained client once more on its own hold-out."""
        every_round = (self.rounds + 1) * (self.central_tokens + self.judged_tokens)
        return round(every_round + self.rounds * self.judged_tokens * self._share)

    @property
    def bytes_per_round(self) -> int:
        """Payload, down and up."""
        return 2 * self.clients_per_round * self.payload_bytes

    @property
    def trainable_share(self) -> str:
        """As `1,572,864 / 332,769,280 (0.47 %)`."""
        return format_trainable(self.trainable_parameters, self.parameters)

    @property
    def _share(self) -> float:
        return self.clients_per_round / sum(client.steps > 0 for client in self.clients)

    @property
    def warnings(self) -> list[str]:
        """What the recipe allows and its author may not have meant."""
        found = []
        if self.left_out:
            found.append(
                f"{count(len(self.left_out), 'client')} with nothing to train on left out"
                f" ({'; '.join(self.left_out[:3])}{'; ...' if len(self.left_out) > 3 else ''})"
            )
        if self.proximal_mu > 0 and (idle := sum(client.steps == 1 for client in self.clients)):
            found.append(
                f"{idle} of {len(self.clients)} clients take one step a round, in which the proximal term is zero:"
                " lower training.batch_size or raise training.epochs"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        derived = ("steps_per_round", "train_tokens_per_round", "evaluate_tokens", "bytes_per_round")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}
