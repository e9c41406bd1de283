"""Tasks and updates as frames: a manifest, and one array of float32. Whatever comes in is checked as it is unpacked.

`message_fields` says of every field what it may be. Both sides know the recipe, so neither names of tensors nor masks
travel: the hash of names and shapes does, and where a rule lets only a part of the adapter change, only that part comes
back.

Letters: P adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.lora import Residual, lora_pairs
from fedloom.deployment.message_fields import ANSWERS, PRIVATE_ANSWERS, QUESTIONS, REFUSAL, REFUSALS, SECONDS
from fedloom.deployment.message_kinds import Count, hide
from fedloom.deployment.message_recipe import RECIPE, TRAINING
from fedloom.errors import MessageError
from fedloom.evaluation.held_out import Score
from fedloom.federation.lora_rules import shared_part, trained_part
from fedloom.host.files import hash_text
from fedloom.host.frames import Frame
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import Federation
from fedloom.recipe.training_section import Training
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientTask, ClientUpdate


def ask_within(question: Frame, seconds: float) -> Frame:
    """Add to a question how many seconds there are for its answer."""
    return replace(question, manifest={**question.manifest, "seconds": min(seconds, SECONDS)})


def read_question(asked: Frame) -> tuple[Frame, float]:
    """Read a question, from a server that may have sent anything; return it without its time, and that in seconds.

    Raises:
        MessageError: a field is missing, is beyond its bounds or is unknown.
    """
    do = asked.manifest.get("do")
    if not isinstance(do, str) or do not in QUESTIONS:
        raise MessageError("this version of fedloom does not know the question")
    told = QUESTIONS[do].read(asked.manifest)
    if do == "meet" and asked.payload:
        raise MessageError("numbers came with a question that has none")
    return Frame({name: value for name, value in told.items() if name != "seconds"}, asked.payload), told["seconds"]


def read_answer(answer: Frame, do: str, *, private: bool = False) -> dict[str, Any]:
    """Read the manifest of an answer, from a client that may have sent anything.

    In a private run, what it may not tell is refused too: then nobody has it.

    Raises:
        MessageError: it refuses, or a field is missing, is beyond its bounds or is unknown.
    """
    if "refused" in answer.manifest:
        word = REFUSAL.read(answer.manifest)["refused"]
        raise MessageError(f"{REFUSALS[word]} ({word})")
    if do != "train" and answer.payload:
        raise MessageError("numbers came with an answer that has none")
    told: dict[str, Any] = (PRIVATE_ANSWERS if private else ANSWERS)[do].read(answer.manifest, "")
    return told


def hide_documents(answer: Frame, do: str) -> Frame:
    """Return an answer as it leaves in a private run: what would tell of documents is the same, whatever they say."""
    return replace(answer, manifest=hide(PRIVATE_ANSWERS[do], answer.manifest))


def pack_refusal(name: str, word: str) -> Frame:
    """Write why a client does not do what was asked, in one of the words of `REFUSALS`."""
    return Frame(REFUSAL.read({"name": name, "refused": word}))


def hash_layout(layout: Layout) -> str:
    """Return the SHA-256 of an adapter's names and shapes."""
    return hash_text(layout.describe())


def pack_adapter(adapter: Adapter, shares_P: Tensor | None = None) -> Frame:
    """Write an adapter: the flat vector, and behind it the residual that `lora_rule = "fedex"` has beside it.

    Of one that clients have parts of their own of, what they share is written: where `shares_P` is true.
    """
    pairs = adapter.residual.factors if adapter.residual else {}
    weights_P = adapter.weights_P if shares_P is None else adapter.weights_P[shares_P]
    tensors = [weights_P, *(factor for pair in pairs.values() for factor in pair)]
    ranks = {layer: [b_OS.shape[0], a_SI.shape[0], a_SI.shape[1]] for layer, (b_OS, a_SI) in pairs.items()}
    return Frame({"layout": hash_layout(adapter.layout), "residual": ranks}, _to_bytes(tensors))


def unpack_adapter(frame: Frame, layout: Layout, lora_rule: str) -> Adapter:
    """Read what `pack_adapter` wrote, out of a question that was read; what is each client's own of it is zero.

    Raises:
        MessageError: it is for another model, has a residual that its rule does not make, or is not as long as it says.
    """
    told = frame.manifest
    if told["layout"] != hash_layout(layout):
        raise MessageError("the adapter is for another model")
    residual: dict[str, list[int]] = told["residual"]
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    layers = {layer: (shapes[b][0], shapes[a][1]) for layer, (a, b) in lora_pairs(layout.names).items()}
    if residual and (lora_rule != "fedex" or {name: (o, i) for name, (o, _, i) in residual.items()} != layers):
        raise MessageError("the residual is for another model")
    pairs = [shape for o, rank, i in residual.values() for shape in ((o, rank), (rank, i))]  # of B and A
    shares_P = shared_part(layout, lora_rule)
    count = layout.size if shares_P is None else int(shares_P.sum())
    weights_P, *factors = _from_bytes(frame.payload, [(count,), *pairs])
    if shares_P is not None:
        weights_P = torch.zeros(layout.size).masked_scatter(shares_P, weights_P)
    found = zip(factors[::2], factors[1::2], strict=True)
    return Adapter(layout, weights_P, Residual(dict(zip(residual, found, strict=True))) if factors else None)


def pack_task(task: ClientTask, adapter: Frame) -> Frame:
    """Write a client's task; `adapter` is the packed one that it starts from."""
    told = {"round": task.round, "client": task.client, "rounds": task.rounds, "seed": task.seed}
    training = TRAINING.pick(task.training.model_dump(mode="json", exclude_none=True))
    return Frame({**adapter.manifest, **told, "training": training}, adapter.payload)


def unpack_task(frame: Frame, layout: Layout, federation: Federation) -> ClientTask:
    """Read what `pack_task` wrote, out of a question that was read.

    Raises:
        MessageError: it is not a task of a recipe with this section.
    """
    round, client, rounds, seed = (frame.manifest[name] for name in ("round", "client", "rounds", "seed"))
    try:
        training = Training.model_validate(frame.manifest["training"])
        rank = federation.client_ranks[client] if federation.client_ranks else None
    except (ValueError, IndexError) as error:
        raise MessageError("not a task of this recipe") from error
    rule = federation.lora_rule
    return ClientTask(
        round,
        client,
        unpack_adapter(frame, layout, rule),
        training,
        rounds,
        seed,
        trained_part(layout, rule, round, rank),
        shares_P=shared_part(layout, rule),
    )


def pack_update(update: ClientUpdate, travels_P: Tensor | None) -> Frame:
    """Write a client's report, and the weights that may have changed and are not its own."""
    weights_P = update.adapter.weights_P
    told = {"layout": hash_layout(update.adapter.layout), "report": asdict(update.report)}
    return Frame(told, _to_bytes([weights_P if travels_P is None else weights_P[travels_P]]))


def unpack_update(frame: Frame, task: ClientTask, *, private: bool = False) -> ClientUpdate:
    """Read what `pack_update` wrote, from a client that may have written anything.

    Raises:
        MessageError: it refuses, answers another task, is not as long as it must be, or does not say which part of
            the adapter it keeps, where the rule has it keep one.
    """
    told, layout = read_answer(frame, "train", private=private), task.adapter.layout
    if told["layout"] != hash_layout(layout):
        raise MessageError("the update is for another model")
    if (task.shares_P is not None) != ("own" in told):
        raise MessageError("the update says nothing of a part that stays with its client, or too much")
    report = ClientReport(**told["report"])
    if (report.round, report.client) != (task.round, task.client):
        raise MessageError("the update is of another round or client")
    count = layout.size if task.travels is None else int(task.travels.sum())
    (changed,) = _from_bytes(frame.payload, [(count,)])
    weights_P = changed
    if task.travels is not None:
        weights_P = task.adapter.weights_P.clone()
        weights_P[task.travels] = changed
    return ClientUpdate(report, replace(task.adapter, weights_P=weights_P), {})


def pack_score(score: Score | None) -> Frame:
    """Write a score, or that there is none."""
    return Frame({"score": None if score is None else [score.loss_sum, score.correct, score.num_targets]})


def unpack_score(answer: Frame, most_targets: int, *, private: bool = False) -> Score | None:
    """Read what `pack_score` wrote, from a client that has `most_targets` counted tokens held out.

    Raises:
        MessageError: it is not a score, or an impossible one.
    """
    told = read_answer(answer, "evaluate", private=private)["score"]
    if told is None:
        return None
    score = Score(*told)
    if not (1 <= score.num_targets <= most_targets and 0 <= score.correct <= score.num_targets):
        raise MessageError(f"an impossible score: {score.num_targets} tokens, {score.correct} of them right")
    return score


def pack_progress(answer: Frame, done: Collection[Progress]) -> Frame:
    """Add to an answer how many steps and batches were worked on, and the sums of their tokens and samples.

    The sums are spread evenly over the steps: the tokens of one step alone could be the length of one document.
    """
    kinds: dict[tuple[Any, ...], list[Progress]] = {}
    for one in done:
        kinds.setdefault((one.phase, one.round, one.client), []).append(one)
    told = []
    for alike in kinds.values():
        tokens, samples = (
            _spread(sum(getattr(one, what) for one in alike), len(alike)) for what in ("tokens", "samples")
        )
        pairs = zip(alike, tokens, samples, strict=True)
        told += [[*asdict(replace(one, tokens=t, samples=s)).values()] for one, t, s in pairs]
    return replace(answer, manifest={**answer.manifest, "progress": told})


def _spread(total: int, count: int) -> list[int]:
    """Return so many numbers that differ by one at most and sum to the total."""
    return [total // count + (place < total % count) for place in range(count)]


def unpack_progress(answer: Frame, do: str, *, private: bool = False) -> list[Progress]:
    """Read what `pack_progress` wrote.

    Raises:
        MessageError: it is not an answer to what was asked.
    """
    return [Progress(*row) for row in read_answer(answer, do, private=private).get("progress", ())]


@dataclass(frozen=True)
class ClientFacts:
    """Account of a client, by itself, when it enrols. Nothing else of its documents is told."""

    name: str
    version: str
    """Version of fedloom that the client runs."""
    base: str
    """SHA-256 of the client's base model, which must be the server's."""
    documents: str
    """HMAC of the client's blocks by a secret of its own: one that comes back with others is another client."""
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
    tasks: int
    """Tasks of its own that it may be asked, and tells counts of."""
    noise_multiplier: float | None = None
    """Noise that it takes in a private run, in units of `privacy.max_norm`."""
    weighs: str | None = None
    """Measure by which a branch weighs clients of its own; None of who has none."""


COUNTS = tuple(one.name for one in ANSWERS["meet"].fields if isinstance(one.kind, Count))
"""Fields of `ClientFacts` that are numbers of things."""


def pack_facts(facts: ClientFacts) -> Frame:
    """Write what a client tells of itself."""
    told = asdict(facts)
    return Frame({name: told[name] for name in told if name != "weighs" or facts.weighs})


def unpack_facts(answer: Frame, *, private: bool = False) -> ClientFacts:
    """Read what `pack_facts` wrote, from a client that may have written anything.

    Raises:
        MessageError: it refuses, or a fact is missing or is not of its kind.
    """
    told = read_answer(answer, "meet", private=private)
    return ClientFacts(**{name: value for name, value in told.items() if name != "progress"})


def pack_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return what clients are told of a recipe.

    Raises:
        MessageError: they would refuse it, a number beyond its bounds for example.
    """
    return RECIPE.read(RECIPE.pick(recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)), "")


def unpack_recipe(told: Mapping[str, Any]) -> Recipe:
    """Read what `pack_recipe` wrote. Whether its base model may be asked for is the policy's to say, by its name alone.

    Raises:
        MessageError: it is not a recipe that this version knows.
        RecipeError: it has settings that can't be combined.
    """
    told = RECIPE.read(told, "recipe")
    try:
        return Recipe.model_validate({**told, "data": {"source": "the client's own", **told.get("data", {})}})
    except ValueError as error:
        raise MessageError("this version of fedloom can't read the server's recipe") from error


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
