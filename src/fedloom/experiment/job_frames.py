"""Jobs and their results as frames, between a run's process and those that train on further devices.

A manifest of words and numbers, and the tensors as safetensors: what comes out is what went in, to the bit. Both ends
are this program, on machines of one owner; what comes from a node is nevertheless checked, as a node may be broken.

Letters: P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any, NamedTuple

import safetensors.numpy
import safetensors.torch
import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.lora import Residual
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import ShortageError, TrainingError
from fedloom.federation.admission import (
    MAY_BE_UNKNOWN,
    OF_DOCUMENTS,
    ClientSize,
    change_norm,
    check_layout,
    check_report,
)
from fedloom.host.frames import Frame
from fedloom.privacy.ration import Ration, Terms
from fedloom.progress import Progress
from fedloom.recipe.training_section import Training
from fedloom.text import show_controls
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientFailure, ClientJob, ClientResult, ClientUpdate
from fedloom.training.optimizers import state_shapes

Named = dict[str, Tensor]
Fields = dict[str, Any]
NUMBERS = ("round", "client", "rounds", "seed", "trial")
"""Fields of a job that are whole numbers."""
MASKS = ("trains_P", "shares_P")
Key = tuple[int, int]
"""Trial and client of a job, by which its result is known."""
_REPORT, _PROGRESS = TypeAdapter(ClientReport), TypeAdapter(Progress)
_COUNT = TypeAdapter(Annotated[int, Field(ge=1, lt=2**31)] | None)
_FACTS = TypeAdapter(dict[str, Annotated[int, Field(ge=0, lt=2**63)] | str | None])
HEADER_BYTES = 2**10
"""More than safetensors' header has of a tensor, and of all of them."""
MOST_WORDS = 2000
"""Characters of a text that a process says; the rest is left out."""


class Line(NamedTuple):
    """Line that a process says to people."""

    what: str
    detail: str


class Done(NamedTuple):
    """End of all jobs that a process was asked for."""

    lowered_to: int | None
    """Clients that train at once from now on, where memory ran out."""


class Found(NamedTuple):
    """Result of a job that was read once and can be, as it came: what waits for its turn stays packed."""

    key: Key
    frame: Frame


class Common:
    """Things that jobs have in common: each is told once, and loaded once on the other side."""

    def __init__(self) -> None:
        self.things: list[Any] = []
        self._places: dict[int, int] = {}

    def place(self, thing: Any) -> int | None:
        """Return where a thing is told; None for None."""
        if thing is None:
            return None
        if id(thing) not in self._places:
            self._places[id(thing)] = len(self.things)
            self.things.append(thing)
        return self._places[id(thing)]


def pack_jobs(jobs: Sequence[ClientJob]) -> Frame:
    """Write jobs. What they have in common is told once: the adapter that they start from, with its residual."""
    adapters, masks, trainings = Common(), Common(), Common()
    tensors: Named = {}
    told = []
    for place, job in enumerate(jobs):
        held = vars_of(job.blocks)
        tensors |= _under(f"blocks {place}", {name: one for name, one in held.items() if isinstance(one, Tensor)})
        tensors |= _under(f"state {place}", job.optimizer_state or {})
        told.append(
            {name: getattr(job, name) for name in NUMBERS}
            | {name: masks.place(getattr(job, name)) for name in MASKS}
            | {
                "adapter": adapters.place(job.adapter),
                "training": trainings.place(job.training),
                "ration": job.ration and {"terms": asdict(job.ration.terms), "key": job.ration.key.hex()},
                "blocks": {name: one for name, one in held.items() if not isinstance(one, Tensor)},
            }
        )
    for place, adapter in enumerate(adapters.things):
        tensors |= _under(f"adapter {place}", _tensors_of(adapter))
    tensors |= _under("masks", {str(place): mask for place, mask in enumerate(masks.things)})
    settings = [training.model_dump(mode="json", exclude_unset=True) for training in trainings.things]
    return Frame({"do": "train", "jobs": told, "trainings": settings}, _to_bytes(tensors))


def unpack_jobs(frame: Frame, layout: Layout) -> list[ClientJob]:
    """Read what `pack_jobs` wrote, for a model whose adapter has this layout."""
    found = _in_groups(frame.payload)
    trainings = [Training.model_validate(told) for told in frame.manifest["trainings"]]
    adapters: dict[int, Adapter] = {}
    jobs = []
    for place, told in enumerate(frame.manifest["jobs"]):
        start, ration = told["adapter"], told["ration"]
        if start not in adapters:
            adapters[start] = _to_adapter(found[f"adapter {start}"], layout)
        blocks: Fields = {**told["blocks"], **found[f"blocks {place}"]}
        given: Fields = {name: told[name] for name in NUMBERS}
        given |= {name: found["masks"][str(told[name])] for name in MASKS if told[name] is not None}
        job = ClientJob(
            **given,
            adapter=adapters[start],
            training=trainings[told["training"]],
            blocks=TokenBlocks(**blocks),
            optimizer_state=found.get(f"state {place}"),
            ration=ration and Ration(Terms(**ration["terms"]), bytes.fromhex(ration["key"])),
        )
        jobs.append(job)
    return jobs


def pack_result(result: ClientResult) -> Frame:
    """Write what came of a job."""
    told = {"do": "result", "client": result.client, "trial": result.trial}
    if isinstance(result, ClientFailure):
        error = result.error
        facts = {name: getattr(error, name) for name in ("what", "round", "client", "step", "stage", "mend")}
        return Frame({**told, "error": facts, "short": isinstance(error, ShortageError)})
    tensors = _under("adapter", {"weights_P": result.adapter.weights_P}) | _under("state", result.optimizer_state)
    return Frame({**told, "report": asdict(result.report)}, _to_bytes(tensors))


def most_result_bytes(jobs: Sequence[ClientJob]) -> int:
    """Return how long the numbers of a result of one of these jobs are at most."""

    def of(job: ClientJob) -> int:
        shapes = [job.adapter.weights_P.shape, *state_shapes(job.training, job.adapter.layout).values()]
        numbers = sum(shape.numel() for shape in shapes)
        return numbers * job.adapter.weights_P.element_size() + HEADER_BYTES * (1 + len(shapes))

    # Ten thousand clients have few trainings, and an adapter in common.
    alike = {(id(job.training), id(job.adapter)): job for job in jobs}
    return max(map(of, alike.values()), default=0)


def unpack_result(frame: Frame, job: ClientJob) -> ClientResult:
    """Read what `pack_result` wrote of a job; whether it can have come of it, `check_result` says.

    Raises:
        Exception: of many kinds; it is no result.
    """
    told, start = frame.manifest, job.adapter
    if "error" in told:
        facts: Fields = {
            name: plain(one) if isinstance(one, str) else one
            for name, one in _FACTS.validate_python(told["error"]).items()
        }
        kind = ShortageError if told["short"] else TrainingError
        return ClientFailure(job.client, kind(**facts), job.trial)
    found = _in_groups(frame.payload)
    if {*found} - {"adapter", "state"}:
        raise ValueError("more than a result")
    weights_P, report = found["adapter"]["weights_P"], _REPORT.validate_python(told["report"])
    return ClientUpdate(report, Adapter(start.layout, weights_P, start.residual), found.get("state", {}), job.trial)


def check_result(frame: Frame, job: ClientJob) -> None:
    """Refuse a result that can't have come of a job: each field of it is held to what the job says.

    Raises:
        Exception: of many kinds.
    """
    result = unpack_result(frame, job)
    if isinstance(result, ClientFailure):
        error = result.error
        if (error.round, error.client) not in ((job.round, job.client), (None, None)):
            raise ValueError("a failure of another job")
        return
    report, blocks = result.report, job.blocks
    examples, steps = len(blocks), job.training.steps_of(len(blocks))
    if job.ration:
        examples, steps = job.ration.terms.units, job.ration.terms.steps
    expected: Fields = {"round": job.round, "client": job.client, "examples": examples, "steps": steps}
    expected |= {"proximal_mu": job.training.proximal_mu, "evaluate_seconds": 0.0}
    expected |= dict.fromkeys(MAY_BE_UNKNOWN, None)  # whoever asked for the training scores it
    if job.ration:
        expected |= {"tokens": 0, **dict.fromkeys(OF_DOCUMENTS, None)}
    if (wrong := [name for name, value in expected.items() if getattr(report, name) != value]) or report.seconds < 0:
        raise ValueError(f"a report of another job: {wrong}")
    check_report(report, job, ClientSize(examples, blocks.num_tokens))
    if (report.loss_mean is None) != (job.ration is not None):
        raise ValueError("losses, or none, where the job has it otherwise")
    check_layout(result.adapter, job.adapter)
    change_norm(result.adapter, job.adapter, job.trains_P)
    dtype, shapes = job.adapter.weights_P.dtype, state_shapes(job.training, job.adapter.layout)
    kept = {name: (shape, torch.float32 if name == "step" else dtype) for name, shape in shapes.items()}
    if {name: (value.shape, value.dtype) for name, value in result.optimizer_state.items()} != kept:
        raise ValueError("an optimizer's state of another shape")


def read_word(frame: Frame, jobs: dict[Key, ClientJob]) -> Progress | Line | Done | Found:
    """Read what a process says while it trains; the job whose result it is, is taken out of `jobs`, which it was asked.

    Raises:
        ConnectionError: it is nothing that this program says there.
    """
    told = frame.manifest
    try:
        match told["do"]:
            case "progress":
                names = [one.name for one in fields(Progress)]
                progress = _PROGRESS.validate_python(dict(zip(names, told["row"], strict=True)))
                counts = progress.tokens, progress.samples, progress.round, progress.client
                if not all(one is None or 0 <= one < 2**48 for one in counts):
                    raise ValueError("no count of anything")
                return progress
            case "say":
                return Line(plain(told["what"]), plain(told["detail"]))
            case "result":
                key = told["trial"], told["client"]
                check_result(frame, jobs[key])
                del jobs[key]
                return Found(key, frame)
            case "done" if not jobs:
                return Done(_COUNT.validate_python(told["lowered_to"]))
    # Of many kinds, from words that may be anything.
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError, TrainingError) as error:
        raise ConnectionError("not a word of fedloom's") from error
    raise ConnectionError("not a word of fedloom's")


def plain(text: object) -> str:
    """Return what a process says as a text that may stand in a terminal and in records."""
    return show_controls(str(text)[:MOST_WORDS])


def vars_of(blocks: TokenBlocks) -> dict[str, Any]:
    """Return what blocks consist of; what was worked out of them since is not."""
    found = {one.name: getattr(blocks, one.name) for one in fields(blocks)}
    return {name: value for name, value in found.items() if value is not None}


def _tensors_of(adapter: Adapter) -> Named:
    pairs = adapter.residual.factors if adapter.residual else {}
    factors = {
        f"{side} {layer}": factor for layer, pair in pairs.items() for side, factor in zip("ba", pair, strict=True)
    }
    return {"weights_P": adapter.weights_P, **factors}


def _to_adapter(tensors: Named, layout: Layout) -> Adapter:
    layers = [name.removeprefix("b ") for name in tensors if name.startswith("b ")]
    factors = {layer: (tensors[f"b {layer}"], tensors[f"a {layer}"]) for layer in layers}
    return Adapter(layout, tensors["weights_P"], Residual(factors) if factors else None)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Named:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _in_groups(data: bytes) -> dict[str, Named]:
    """Read tensors, by what each was put under: all in one pass, as there may be ten thousand clients' of them."""
    found: dict[str, Named] = {}
    for name, value in safetensors.torch.load(data).items():
        prefix, _, own = name.partition("/")
        found.setdefault(prefix, {})[own] = value
    return found


def _to_bytes(tensors: Named) -> bytes:
    # Torch's own function refuses tensors that share memory, and views of one vector do.
    data: bytes = safetensors.numpy.save(
        {name: value.detach().cpu().contiguous().numpy() for name, value in tensors.items()}
    )
    return data
