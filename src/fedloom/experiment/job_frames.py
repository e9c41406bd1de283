"""Jobs and their results as frames, between a run's process and those that train on further devices.

A manifest of words and numbers, and the tensors as safetensors: what comes out is what went in, to the bit. Both ends
are this program, on machines of one owner; what comes from a node is nevertheless checked, as a node may be broken.

Letters: P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import safetensors.numpy
import safetensors.torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.lora import Residual
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import ShortageError, TrainingError
from fedloom.host.frames import Frame
from fedloom.privacy.ration import Ration, Terms
from fedloom.progress import Progress
from fedloom.recipe.training_section import Training
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientFailure, ClientJob, ClientResult, ClientUpdate

Named = dict[str, Tensor]
Fields = dict[str, Any]
NUMBERS = ("round", "client", "rounds", "seed", "trial")
"""Fields of a job that are whole numbers."""
MASKS = ("trains_P", "shares_P")
Key = tuple[int, int]
"""Trial and client of a job, by which its result is known."""
_REPORT, _PROGRESS = TypeAdapter(ClientReport), TypeAdapter(Progress)
_COUNT, _FACTS = TypeAdapter(int | None), TypeAdapter(dict[str, int | str | None])


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


def unpack_result(frame: Frame, job: ClientJob) -> ClientResult:
    """Read what `pack_result` wrote of a job.

    Raises:
        Exception: of many kinds; it is nothing of that job.
    """
    told, start = frame.manifest, job.adapter
    if "error" in told:
        facts: Fields = _FACTS.validate_python(told["error"])
        kind = ShortageError if told["short"] else TrainingError
        return ClientFailure(job.client, kind(**facts), job.trial)
    found = _in_groups(frame.payload)
    weights_P, report = found["adapter"]["weights_P"], _REPORT.validate_python(told["report"])
    if (weights_P.shape, weights_P.dtype) != (start.weights_P.shape, start.weights_P.dtype):
        raise ValueError("weights of another adapter")
    if report.client != job.client:
        raise ValueError("a report of another client")
    return ClientUpdate(report, Adapter(start.layout, weights_P, start.residual), found.get("state", {}), job.trial)


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
                return _PROGRESS.validate_python(dict(zip(names, told["row"], strict=True)))
            case "say":
                return Line(str(told["what"]), str(told["detail"]))
            case "result":
                key = told["trial"], told["client"]
                unpack_result(frame, jobs[key])
                del jobs[key]
                return Found(key, frame)
            case "done" if not jobs:
                return Done(_COUNT.validate_python(told["lowered_to"]))
    # Of many kinds, from words that may be anything.
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ConnectionError("not a word of fedloom's") from error
    raise ConnectionError("not a word of fedloom's")


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
