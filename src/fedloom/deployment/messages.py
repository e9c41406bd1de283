"""Tasks and updates as frames: a manifest, and one array of float32. What is unpacked was checked first.

Both sides know the recipe, so neither names of tensors nor masks travel: the hash of names and shapes does, and where
a rule lets only a part of the adapter change, only that part comes back.

Letters: P adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, get_args

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
from fedloom.recipe.sections import Training
from fedloom.training.jobs import ClientReport, ClientTask, ClientUpdate

if TYPE_CHECKING:
    from fedloom.recipe.recipe import Recipe


def hash_layout(layout: Layout) -> str:
    """SHA-256 of names and shapes."""
    told = repr((layout.names, [tuple(shape) for shape in layout.shapes]))
    return hash_text(told)


def pack_adapter(adapter: Adapter) -> Frame:
    """The flat vector, and behind it what `lora_rule = "fedex"` has beside it."""
    pairs = adapter.residual.factors if adapter.residual else {}
    tensors = [adapter.weights_P, *(factor for pair in pairs.values() for factor in pair)]
    ranks = {layer: [b_OS.shape[0], a_SI.shape[0], a_SI.shape[1]] for layer, (b_OS, a_SI) in pairs.items()}
    return Frame({"layout": hash_layout(adapter.layout), "residual": ranks}, _to_bytes(tensors))


def unpack_adapter(frame: Frame, layout: Layout) -> Adapter:
    """The inverse of `pack_adapter`.

    Raises:
        MessageError: it is of another model, or not as long as it says.
    """
    told = frame.manifest
    if told.get("layout") != hash_layout(layout):
        raise MessageError("an adapter of another model")
    try:
        shapes = [
            (_count(rows), _count(columns))
            for features_out, rank, features_in in told["residual"].values()
            for rows, columns in ((features_out, rank), (rank, features_in))
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise MessageError("a residual of no shape") from error
    weights_P, *factors = _from_bytes(frame.payload, [(layout.size,), *shapes])
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return Adapter(layout, weights_P, Residual(dict(zip(told["residual"], pairs, strict=True))) if factors else None)


def pack_task(task: ClientTask, adapter: Frame) -> Frame:
    """All that a client is told, with the adapter that it starts from, packed."""
    told = {"round": task.round, "client": task.client, "rounds": task.rounds, "seed": task.seed}
    return Frame({**adapter.manifest, **told, "training": task.training.model_dump(mode="json")}, adapter.payload)


def unpack_task(frame: Frame, layout: Layout, recipe: Recipe) -> ClientTask:
    """The inverse of `pack_task`.

    Raises:
        MessageError: it is no task of this recipe.
    """
    told, section = frame.manifest, recipe.federation
    try:
        round, client, rounds, seed = (int(told[name]) for name in ("round", "client", "rounds", "seed"))
        training = Training.model_validate(told["training"])
        rank = section.client_ranks[client] if section.client_ranks else None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise MessageError("no task") from error
    trains_P = trained_part(layout, section.lora_rule, round, rank)
    return ClientTask(round, client, unpack_adapter(frame, layout), training, rounds, seed, trains_P)


def pack_update(update: ClientUpdate, trains_P: Tensor | None) -> Frame:
    """A client's report, and the weights that may have changed."""
    weights_P = update.adapter.weights_P
    told = {"layout": hash_layout(update.adapter.layout), "report": asdict(update.report)}
    return Frame(told, _to_bytes([weights_P if trains_P is None else weights_P[trains_P]]))


def unpack_update(frame: Frame, task: ClientTask) -> ClientUpdate:
    """What a client made of a task.

    Raises:
        MessageError: it is an answer to something else, or not as long as it must be.
    """
    told, layout = frame.manifest, task.adapter.layout
    if told.get("layout") != hash_layout(layout):
        raise MessageError("an update of another model")
    report = _read_report(told.get("report"))
    if (report.round, report.client) != (task.round, task.client):
        raise MessageError("an update of another round or client")
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
    """The inverse of `pack_score`, of a client with so many tokens held out.

    Raises:
        MessageError: it is none, or one that can't have been.
    """
    if told is None:
        return None
    try:
        loss_sum, correct, num_targets = told
        score = Score(float(loss_sum), int(correct), int(num_targets))
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError("no score") from error
    if not (1 <= score.num_targets <= most_targets and 0 <= score.correct <= score.num_targets):
        raise MessageError(f"a score of {score.num_targets} tokens, {score.correct} of them right")
    if not 0 <= score.loss_sum < math.inf:
        raise MessageError(f"a score whose loss is {score.loss_sum}")
    return score


def unpack_progress(told: Any) -> list[Progress]:
    """The batches that a client worked on.

    Raises:
        MessageError
    """
    found = []
    try:
        for phase, tokens, samples, *where in told:
            round, client = (None if number is None else _count(number) for number in where)
            found.append(Progress(phase, _count(tokens), _count(samples), round, client))
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError("no progress") from error
    if any(one.phase not in get_args(Phase) for one in found):
        raise MessageError("progress of no phase")
    return found


def _count(told: Any) -> int:
    """A number of things, as others tell it."""
    number = int(told)
    if not 0 <= number < MOST:
        raise ValueError("no count")
    return number


MOST = 2**63
"""Of anything that is counted."""


COUNTS = (
    *("train_documents", "holdout_documents", "blocks", "tokens", "holdout_blocks", "holdout_tokens"),
    *("shared_blocks", "dropped", "leaks"),
)
"""What a client tells of what it holds, as numbers."""
WORDS = ("name", "version", "base", "documents")
Facts = Mapping[str, Any]
"""What a client tells of itself when it is met: COUNTS and WORDS, and nothing else."""


def unpack_facts(told: Mapping[str, Any]) -> Facts:
    """What a client told of itself, each of its kind.

    Raises:
        MessageError
    """
    try:
        counts = {key: _count(told[key]) for key in COUNTS}
        words = {key: str(told[key])[:200] for key in WORDS}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MessageError("it does not say what it holds") from error
    return {**words, **counts}


def _read_report(told: Any) -> ClientReport:
    """A report of numbers, each of its kind."""
    try:
        kinds = {field.name: int if field.type == "int" else float for field in fields(ClientReport)}
        report = ClientReport(
            **{name: value if value is None else kinds[name](value) for name, value in told.items()}  # type: ignore[arg-type]
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise MessageError("no report") from error
    if not (report.examples > 0 and report.steps > 0 and report.tokens > 0 and math.isfinite(report.seconds)):
        raise MessageError("a report of no work")
    return report


def _to_bytes(tensors: list[Tensor]) -> bytes:
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    assert flat.dtype == torch.float32, "what travels is float32"
    data: bytes = flat.contiguous().numpy().astype("<f4", copy=False).tobytes()
    return data


def _from_bytes(data: bytes, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    counts = [math.prod(shape) for shape in shapes]
    if len(data) != 4 * sum(counts):
        raise MessageError(f"{len(data):,} bytes where {4 * sum(counts):,} were to be")
    flat = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return [part.view(shape) for part, shape in zip(flat.split(counts), shapes, strict=True)]
