"""Tasks and updates as frames: a manifest, and one array of float32. Whatever comes in is checked as it is unpacked.

Both sides know the recipe, so neither names of tensors nor masks travel: the hash of names and shapes does, and where
a rule lets only a part of the adapter change, only that part comes back.

Letters: P adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.lora import Residual
from fedloom.deployment.frames import Frame
from fedloom.errors import MessageError
from fedloom.evaluation.held_out import Score
from fedloom.federation.lora_rules import trained_part
from fedloom.host.files import hash_text
from fedloom.progress import Phase, Progress
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import Federation, Training
from fedloom.training.jobs import ClientReport, ClientTask, ClientUpdate

MOST = 2**63
"""Limit of all numbers of things that others tell: more would not fit in a record."""


def hash_layout(layout: Layout) -> str:
    """Return the SHA-256 of an adapter's names and shapes."""
    return hash_text(layout.describe())


def pack_adapter(adapter: Adapter) -> Frame:
    """Write an adapter: the flat vector, and behind it the residual that `lora_rule = "fedex"` has beside it."""
    pairs = adapter.residual.factors if adapter.residual else {}
    tensors = [adapter.weights_P, *(factor for pair in pairs.values() for factor in pair)]
    ranks = {layer: [b_OS.shape[0], a_SI.shape[0], a_SI.shape[1]] for layer, (b_OS, a_SI) in pairs.items()}
    return Frame({"layout": hash_layout(adapter.layout), "residual": ranks}, _to_bytes(tensors))


def unpack_adapter(frame: Frame, layout: Layout) -> Adapter:
    """Read what `pack_adapter` wrote.

    Raises:
        MessageError: it is for another model, or not as long as it says.
    """
    told = frame.manifest
    if told.get("layout") != hash_layout(layout):
        raise MessageError("the adapter is for another model")
    try:
        shapes = [
            (_count(rows), _count(columns))
            for features_out, rank, features_in in told["residual"].values()
            for rows, columns in ((features_out, rank), (rank, features_in))  # of B and A
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise MessageError("the shapes of the residual can't be read") from error
    weights_P, *factors = _from_bytes(frame.payload, [(layout.size,), *shapes])
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return Adapter(layout, weights_P, Residual(dict(zip(told["residual"], pairs, strict=True))) if factors else None)


def pack_task(task: ClientTask, adapter: Frame) -> Frame:
    """Write a client's task; `adapter` is the packed one that it starts from."""
    told = {"round": task.round, "client": task.client, "rounds": task.rounds, "seed": task.seed}
    return Frame({**adapter.manifest, **told, "training": task.training.model_dump(mode="json")}, adapter.payload)


def unpack_task(frame: Frame, layout: Layout, federation: Federation) -> ClientTask:
    """Read what `pack_task` wrote.

    Raises:
        MessageError: it is not a task of a recipe with this section.
    """
    told = frame.manifest
    try:
        round, client, rounds, seed = (int(told[name]) for name in ("round", "client", "rounds", "seed"))
        training = Training.model_validate(told["training"])
        rank = federation.client_ranks[client] if federation.client_ranks else None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise MessageError("not a task of this recipe") from error
    trains_P = trained_part(layout, federation.lora_rule, round, rank)
    return ClientTask(round, client, unpack_adapter(frame, layout), training, rounds, seed, trains_P)


def pack_update(update: ClientUpdate, trains_P: Tensor | None) -> Frame:
    """Write a client's report, and the weights that may have changed."""
    weights_P = update.adapter.weights_P
    told = {"layout": hash_layout(update.adapter.layout), "report": asdict(update.report)}
    return Frame(told, _to_bytes([weights_P if trains_P is None else weights_P[trains_P]]))


def unpack_update(frame: Frame, task: ClientTask) -> ClientUpdate:
    """Read what `pack_update` wrote, from a client that may have written anything.

    Raises:
        MessageError: it answers another task, or is not as long as it must be.
    """
    told, layout = frame.manifest, task.adapter.layout
    if told.get("layout") != hash_layout(layout):
        raise MessageError("the update is for another model")
    report = _read_report(told.get("report"))
    if (report.round, report.client) != (task.round, task.client):
        raise MessageError("the update is of another round or client")
    count = layout.size if task.trains_P is None else int(task.trains_P.sum())
    (changed,) = _from_bytes(frame.payload, [(count,)])
    weights_P = changed
    if task.trains_P is not None:
        weights_P = task.adapter.weights_P.clone()
        weights_P[task.trains_P] = changed
    return ClientUpdate(report, replace(task.adapter, weights_P=weights_P), {})


def pack_score(score: Score | None) -> list[float] | None:
    return None if score is None else [score.loss_sum, score.correct, score.num_targets]


def unpack_score(told: Any, most_targets: int) -> Score | None:
    """Read what `pack_score` wrote, from a client that has `most_targets` counted tokens held out.

    Raises:
        MessageError: it is not a score, or an impossible one.
    """
    if told is None:
        return None
    try:
        loss_sum, correct, num_targets = told
        score = Score(float(loss_sum), int(correct), int(num_targets))
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError("not a score") from error
    if not (1 <= score.num_targets <= most_targets and 0 <= score.correct <= score.num_targets):
        raise MessageError(f"an impossible score: {score.num_targets} tokens, {score.correct} of them right")
    if not 0 <= score.loss_sum < math.inf:
        raise MessageError(f"an impossible score: its loss is {score.loss_sum}")
    return score


def unpack_progress(told: Any) -> list[Progress]:
    """Read the list of batches that a client worked on.

    Raises:
        MessageError: it is not such a list.
    """
    found = []
    try:
        for phase, tokens, samples, *where in told:
            round, client = (None if number is None else _count(number) for number in where)
            found.append(Progress(phase, _count(tokens), _count(samples), round, client))
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError("its progress can't be read") from error
    if any(one.phase not in get_args(Phase) for one in found):
        raise MessageError("its progress is in an unknown phase")
    return found


def _count(told: Any) -> int:
    """Read a number of things, as others tell it."""
    number = int(told)
    if not 0 <= number < MOST:
        raise ValueError("not a number of things")
    return number


@dataclass(frozen=True)
class ClientFacts:
    """Account of a client, by itself, when it enrols. Nothing else of its documents is told."""

    name: str
    version: str
    """Version of fedloom that the client runs."""
    base: str
    """SHA-256 of the client's base model, which must be the server's."""
    documents: str
    """SHA-256 of the client's blocks: one that comes back with others is another client."""
    train_documents: int
    holdout_documents: int
    blocks: int
    """Blocks to train on."""
    tokens: int
    """Tokens in the blocks to train on."""
    holdout_blocks: int
    holdout_tokens: int
    shared_blocks: int
    """Blocks to train on that the client's hold-out also has."""
    dropped: int
    """Documents left out because the client's hold-out has nearly the same."""
    leaks: int
    """Documents kept although the client's hold-out has nearly the same."""


COUNTS = tuple(field.name for field in fields(ClientFacts) if field.type == "int")
"""Fields of `ClientFacts` that are numbers of things; the others are words."""
MOST_LETTERS = 200
"""Letters kept of each word that a client tells."""


def pack_facts(facts: ClientFacts) -> dict[str, Any]:
    """Return facts as a manifest."""
    return asdict(facts)


def unpack_facts(told: Mapping[str, Any]) -> ClientFacts:
    """Read what `pack_facts` wrote, from a client that may have written anything.

    Raises:
        MessageError: a fact is missing, or is not of its kind.
    """
    try:
        return ClientFacts(
            **{  # type: ignore[arg-type]
                field.name: _count(told[field.name]) if field.name in COUNTS else str(told[field.name])[:MOST_LETTERS]
                for field in fields(ClientFacts)
            }
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MessageError("it does not say what it holds") from error


SERVERS_OWN = {"source", "revision", "subset", "split", "files", "partition", "central_holdout"}
"""Keys of a recipe's section `data` that are about the server's documents: a client has its own."""


def pack_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return what clients are told of a recipe: all but the server's own documents, its baselines, and its leave to
    open pickles."""
    told: dict[str, Any] = recipe.model_dump(
        mode="json",
        exclude_unset=True,
        exclude_none=True,
        exclude={"data": SERVERS_OWN, "baselines": True, "model": {"convert"}},
    )
    return told


def unpack_recipe(told: Any) -> Recipe:
    """Read what `pack_recipe` wrote.

    Raises:
        MessageError: it is not a recipe that this version knows.
    """
    try:
        return Recipe.model_validate({**told, "data": {"source": "the client's own", **told["data"]}})
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError("this version of fedloom can't read the server's recipe") from error


def _read_report(told: Any) -> ClientReport:
    """Read a client's report: numbers, each of its kind."""
    try:
        kinds = {field.name: int if field.type == "int" else float for field in fields(ClientReport)}
        report = ClientReport(
            **{name: value if value is None else kinds[name](value) for name, value in told.items()}  # type: ignore[arg-type]
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise MessageError("its report can't be read") from error
    if not (report.examples > 0 and report.steps > 0 and report.tokens > 0 and math.isfinite(report.seconds)):
        raise MessageError("its report says that no work was done")
    return report


def _to_bytes(tensors: list[Tensor]) -> bytes:
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    assert flat.dtype == torch.float32, "what travels is float32"
    data: bytes = flat.contiguous().numpy().astype("<f4", copy=False).tobytes()
    return data


def _from_bytes(data: bytes, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    counts = [math.prod(shape) for shape in shapes]
    if len(data) != 4 * sum(counts):
        raise MessageError(f"{len(data):,} bytes instead of {4 * sum(counts):,}")
    flat = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return [part.view(shape) for part, shape in zip(flat.split(counts), shapes, strict=True)]
