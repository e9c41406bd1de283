"""The plan of a run: what it will need, told before it starts. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fedloom.data.splits import Audit
from fedloom.progress import Stage
from fedloom.text import count, format_trainable

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation
    from fedloom.recipe.training_section import Training


SHOWN = 8
"""Clients whose share is shown."""
UNKNOWN = "unknown"
"""Revision of documents that clients elsewhere hold."""
TOO_SHORT = "too short"
UNANSWERED = "without anything that counts within data.max_length"
"""Reasons of documents that give nothing to train on; their rows were good ones."""


CUT_SHARE = 0.05
"""Share of all tokens that is worth a word where documents were cut."""


@dataclass(frozen=True)
class ClientPlan:
    """One client's share: documents, the token blocks that they give, and the optimizer steps of a round."""

    train_documents: int
    holdout_documents: int
    blocks: int
    """Blocks to train on; in a private run, units."""
    tokens: int
    holdout_tokens: int
    steps: int

    @classmethod
    def of(
        cls,
        training: Training,
        *,
        train_documents: int,
        holdout_documents: int,
        blocks: int,
        tokens: int,
        holdout_tokens: int,
    ) -> ClientPlan:
        """Return the plan of a client that holds so much."""
        steps = training.steps_of(blocks)
        return cls(train_documents, holdout_documents, blocks, tokens, holdout_tokens, steps)


@dataclass(frozen=True)
class Plan:
    """A run before it starts: what is loaded, who holds what, and the cost in steps, tokens and bytes."""

    name: str
    model: str
    model_revision: str
    dtype: str
    device: str
    engine: Literal["batched", "reference"]
    parameters: int
    """Parameters of the base model with the adapter."""
    trainable_parameters: int
    data: str
    data_revision: str
    documents: int
    skipped: Mapping[str, int]
    judged_tokens: int
    """Tokens of the clients' hold-outs that are scored."""
    central_documents: int
    central_tokens: int
    clients: tuple[ClientPlan, ...]
    left_out: tuple[str, ...]
    """Clients that the partition made and that have nothing to train on, each with why; the others are numbered
    without them."""
    clients_per_round: int
    clients_at_once: int
    """Clients that train in one pass."""
    clients_that_fit: int | None
    """Clients that the free memory holds, by prediction; None where it was not predicted."""
    peak_bytes: int | None
    """Bytes of a training step with the base model, predicted; None where they were not."""
    audit: Audit
    shared_blocks: int
    """Training blocks whose tokens are also held out though the documents differ: files that begin alike, say."""
    duplicates: str
    """Handling of copies: drop or report."""
    rounds: int
    epochs: int
    proximal_mu: float
    payload_bytes: int
    """Bytes of one adapter, one way."""
    strategy: str | None = None
    """Name of the caller's own strategy, which takes the place of the recipe's."""
    cut: int = 0
    """Documents that were cut at `data.max_length`, of a part that counts."""
    cut_tokens: int = 0
    """Tokens that were cut off plain texts, reckoned."""
    ample_memory: bool = False
    """True where so much memory is free that what a step needs was not predicted."""
    lacks_memory: bool = False
    """True where a step of a single client needs more memory, by prediction, than is free."""
    model_weights: Mapping[str, str] = field(default_factory=dict)
    """Origin of weights that do not lie beside the model's configuration: the `commit` on the hub, or the SHA-256 of
    each pickle and of the safetensors that were made of them."""
    rows: int | None = None
    """Rows that the source has; None where not all were looked at, as in a stream."""
    files_left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of a folder's files that nobody meant as documents, by reason."""
    learns: str = ""
    """Account of what is learnt of the documents and of what is lost; an empty text where all of a plain text is."""
    ways: tuple[str, ...] = ()
    """Settings of speed and memory that leave no other trace in the plan, in a few words each."""
    processes: int = 0
    """Processes that each have the model, where there are several: memory and clients at once are those of one."""
    unused: tuple[str, ...] = ()
    """Settings that somebody wrote and that change nothing in this run, each with why."""
    slow_attention: bool = False
    """True where transformers has no fused attention for the model."""
    slow_dtype: bool = False
    """True where the device has the base model's dtype in software alone."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Each client's share of the weight in a round of all, by name; where sizes are told, or `federation.max_share` is
    set."""
    evaluated_rounds: int = 0
    """Rounds after which the adapter is evaluated, where that is not every one."""
    kept_adapters: int = 0
    """Adapters of rounds that are kept beside the best and the last."""
    whole_steps: tuple[int, ...] = ()
    """Steps that each client's epochs would take, where `training.max_steps` allows fewer."""
    privacy: Mapping[str, Any] = field(default_factory=dict)
    """Promise about one document, where there is one: unit, δ, and each client's documents, noise and ε of the run."""
    later: tuple[Stage, ...] = ()
    """Stages that follow the rounds, in their order."""
    arms: int = 0
    """Federations of some of the clients that train at the end, to find what each client brings."""
    arm_tokens: int = 0
    """Tokens that they train on, all of them together."""
    arms_at_once: int = 0
    """Clients of theirs that train in one pass."""
    tasks: tuple[str, ...] = ()
    """Account of each task that models are asked."""
    elsewhere: tuple[str, ...] = ()
    """Names of clients on other machines, by their numbers; none where all are in this process."""
    shared_alone: bool = False
    """True where the run's adapters are what clients share of theirs, and the rest stays with clients elsewhere."""
    capped: Mapping[str, float] = field(default_factory=dict)
    """Shares that the clients whose share is capped would have had, by name."""
    base_parameters: int = 0
    """Parameters of the base model alone; 0 in plans of earlier versions."""
    bytes_are: str = ""
    """Relation of `bytes_per_round` to what rounds take, `at most` or `at first`, where they don't all take as much."""

    @classmethod
    def of(
        cls,
        name: str,
        training: Training,
        federation: Federation,
        *,
        clients: Sequence[ClientPlan],
        scored_clients: Sequence[int],
        **facts: Any,
    ) -> Plan:
        """Return the plan of a run with these clients, wherever they are; `facts` are its other fields."""
        without_limit = training.model_copy(update={"max_steps": None})
        whole_steps = tuple(without_limit.steps_of(client.blocks) for client in clients)
        return cls(
            name=name,
            clients=tuple(clients),
            judged_tokens=sum(clients[client].holdout_tokens for client in scored_clients),
            rounds=federation.rounds,
            epochs=training.epochs,
            kept_adapters=federation.rounds // federation.keep_every if federation.keep_every else 0,
            whole_steps=whole_steps if training.max_steps else (),
            proximal_mu=training.proximal_mu,
            # A residual grows from round to round; half an adapter, or its first ranks, are less than a whole one.
            bytes_are="at first"
            if federation.lora_rule == "fedex"
            else "at most" * (federation.lora_rule == "rolora" or bool(federation.client_ranks)),
            **facts,
        )

    @property
    def converts(self) -> bool:
        """True where the weights are a conversion of pickles that was made here."""
        return bool(self.model_weights) and "commit" not in self.model_weights

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of all clients that take part, on average where only some do."""
        return round(sum(client.steps for client in self.clients) * self._share)

    @property
    def train_tokens_per_round(self) -> int:
        """Tokens of all clients that take part, on average where they take part of their rows."""
        return round(sum(self.tokens_of_each) * self._share)

    @property
    def tokens_of_each(self) -> list[float]:
        """Tokens that each client trains on in a round in which it takes part."""
        if not self.whole_steps:
            return [client.tokens * self.epochs for client in self.clients]
        parts = [client.steps / max(1, whole) for client, whole in zip(self.clients, self.whole_steps, strict=True)]
        return [client.tokens * part * self.epochs for client, part in zip(self.clients, parts, strict=True)]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages of the run: its rounds, and what follows them."""
        steps, tokens = self.rounds * self.steps_per_round, self.rounds * self.train_tokens_per_round
        return Stage("rounds", steps, tokens, self.evaluate_tokens), *self.later

    def stages_left(
        self, records: Sequence[Mapping[str, Any]], *, ended: bool, ahead: bool = False
    ) -> tuple[Stage, ...]:
        """Return what is left of the stages after the rounds on record.

        `ended` says that no other round follows, and `ahead` that the next one is trained, if not evaluated.
        """
        first, *later = self.stages
        if not ended:
            next_one = Stage("rounds", self.steps_per_round, self.train_tokens_per_round, 0)
            return first.without(self.done_of(records)).without(next_one.part(float(ahead))), *later
        rounds = sum(record["round"] > 0 for record in records)
        # They score the adapter that they begin with, too: those of contributions as often as the run does.
        planned = {"baselines": self.rounds, "contributions": self.evaluated_rounds or self.rounds}
        return first.part(0.0), *(
            one.part(rounds / self.rounds, (rounds + 1) / (planned[one.name] + 1)) if one.name in planned else one
            for one in later
        )

    @property
    def evaluate_tokens(self) -> int:
        """Tokens evaluated: round 0 and every round, and each trained client once more on its own hold-out."""
        rounds = self.evaluated_rounds or self.rounds
        return self._tokens_of_evaluations(rounds + 1, rounds)

    def done_of(self, records: Sequence[Mapping[str, Any]]) -> Stage:
        """Return what rounds on record took, as it was planned."""
        evaluated = ["central_loss" in record or bool(record.get("client_losses")) for record in records]
        trained = sum(record["round"] > 0 for record in records)
        scored = self._tokens_of_evaluations(sum(evaluated), sum(evaluated[:-1]))
        return Stage("rounds", self.steps_per_round * trained, self.train_tokens_per_round * trained, scored)

    def _tokens_of_evaluations(self, rounds: int, own: int) -> int:
        """Return the tokens of scoring the global adapter after so many rounds, and clients' own in `own` rounds."""
        # A client's own adapter is scored where the one that it began with was, round 0's among them.
        return round(rounds * (self.central_tokens + self.judged_tokens) + own * self.judged_tokens * self._share)

    @property
    def bytes_per_round(self) -> int:
        """Bytes of payload, down and up, of a round in which each client is sent an adapter and sends one."""
        return 2 * self.clients_per_round * self.payload_bytes

    @property
    def trainable_share(self) -> str:
        """Share of the parameters that is trained, as `1,572,864 / 332,769,280 (0.47 %)`."""
        return format_trainable(self.trainable_parameters, self.parameters)

    @property
    def _share(self) -> float:
        return self.clients_per_round / sum(client.steps > 0 for client in self.clients)

    @property
    def warnings(self) -> list[str]:
        """Settings that the recipe allows and its author may not have meant."""
        found = []
        if self.slow_attention:
            found.append("attention is eager, which is slower: transformers has no fused one for this model")
        if self.slow_dtype:
            found.append(
                f"{self.dtype} is not in this device's hardware: an evaluation of OPT-350M took 6 times as long as in"
                ' float32, which model.dtype = "auto" takes here'
            )
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
        return [*found, *self.unused]

    def to_json(self) -> dict[str, Any]:
        """Return the plan, and what follows from it, as `plan.json` holds it."""
        derived = ("steps_per_round", "train_tokens_per_round", "evaluate_tokens", "bytes_per_round")
        told = {**asdict(self), **{name: getattr(self, name) for name in derived}}
        # Absent where there is nothing to say, as in the plans of runs before these keys were there.
        later = (
            *("strategy", "ample_memory", "model_weights", "rows", "files_left_out", "ways", "processes", "unused"),
            *("slow_attention", "slow_dtype", "shares", "capped", "whole_steps"),
            *("evaluated_rounds", "kept_adapters", "later", "arms", "arm_tokens", "arms_at_once"),
            *("privacy", "tasks", "elsewhere", "shared_alone", "lacks_memory", "cut", "cut_tokens"),
            *("base_parameters", "bytes_are"),
        )
        return {key: value for key, value in told.items() if value or key not in later}


def explain_audit(plan: Plan) -> str:
    """Say how many documents stand on two sides of the split, and what was done about it."""
    found = "; ".join(
        f"{o.side}/{o.other} {o.exact} exact, {o.near} near"
        + (f", {o.prompt} with the same prompt" if o.prompt else "")
        for o in plan.audit.overlaps
    )
    copies = sum(plan.audit.dropped) + plan.audit.leaks
    done = "dropped from training" if plan.duplicates == "drop" else "LEFT in training"
    blocks = f" and {count(plan.shared_blocks, 'equal block')}" if plan.shared_blocks else ""
    given_up = f", {sum(plan.audit.given_up):,} taken out of hold-outs" if sum(plan.audit.given_up) else ""
    return f"{found or 'each client within its own documents'}: {count(copies, 'document')}{blocks} {done}{given_up}"


def explain_shares(shares: Mapping[str, float], capped: Mapping[str, float]) -> str:
    """Say what share each client has, the largest first: `alice 50 % (capped from 91 %), bob 50 %`."""
    found = sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))
    told = [f"{name} {100 * share:.3g} %" + _was(capped.get(name)) for name, share in found[:SHOWN]]
    return ", ".join(told) + (f" and {count(len(found) - SHOWN, 'other')}" if len(found) > SHOWN else "")


def _was(share: float | None) -> str:
    return "" if share is None else f" (capped from {100 * share:.3g} %)"


def explain_data(data: str, revision: str) -> str:
    """Name the documents with their revision, where there is one: clients elsewhere tell none."""
    return data if revision == UNKNOWN else f"{data} ({revision})"


def explain_weights(weights: Mapping[str, str]) -> str:
    """Say where a model's weights come from that do not lie beside its configuration; an empty text for none."""
    if "commit" in weights:
        return f"those at commit {weights['commit']}"
    made = ", ".join(f"{name} (sha256 {digest[:16]})" for name, digest in weights.items())
    return f"converted here: {made}" if made else ""


def explain_cut(plan: Mapping[str, Any]) -> str:
    """Say how many documents of a plan were cut, and where that leaves out much, how much."""
    kept = sum(client["tokens"] + client["holdout_tokens"] for client in plan["clients"]) + plan["central_tokens"]
    lost = plan.get("cut_tokens", 0)
    share = lost / max(1, lost + kept)
    told = f', which leaves out some {min(99, round(100 * share))} % of all tokens; data.window = "blocks" takes them'
    return f"{count(plan['cut'], 'document')} at data.max_length{told if share >= CUT_SHARE else ''}"


def explain_rows(rows: int, documents: int, skipped: Mapping[str, int]) -> str:
    """Account for every row of a source: `302 rows = 298 documents + 2 skipped + 2 not needed`."""
    lost = sum(number for reason, number in skipped.items() if reason not in (TOO_SHORT, UNANSWERED))
    parts = {"skipped": lost, "not needed": rows - documents - lost}
    told = "".join(f" + {number:,} {what}" for what, number in parts.items() if number)
    return f"{count(rows, 'row')} = {count(documents, 'document')}{told}"
