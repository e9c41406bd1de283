"""What a processor does beside arithmetic in a step, and what was tried against it; each part alone, in minutes.

    python bench/processor.py [masks] [step] [pages] [prepacked]

| part | what it tells |
|---|---|
| masks | a call of dropout and its gradient: masks drawn by generators, client by client, and masks by counter |
| step | a step of some of OPT-350M's layers without dropout, with masks by counter, and with drawn ones |
| pages | the same steps as glibc frees memory and with pages kept, a process each in turn |
| prepacked | a layer's products there and back: of torch's own kind, and by oneDNN with weights packed beforehand |

Each contender takes its turns between the others' in one process, or in processes that alternate, and has its best. One
JSON line a fact. Random weights and tokens. Where others work on the machine too, run it on one thread
(`OMP_NUM_THREADS=1`) and read the processor's times: threads that wait for each other spin.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from options import add_parts, open_parser
from torch import Tensor
from torch.nn import functional
from workload import BATCH, adapt, make_blocks, make_jobs

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.host.machine import peak_memory
from fedloom.model.loading import load_model
from fedloom.model.source import open_model
from fedloom.training import client_dropout
from fedloom.training.batched import BatchedEngine
from fedloom.training.client_dropout import ClientDropout
from fedloom.training.dropout_masks import Mask, sequence_keys

CLIENTS, LAYERS = 3, 2
SHAPE = (CLIENTS * BATCH, 128, 1024)
"""Values that OPT-350M's layers drop."""
KEPT_PAGES = {-4: 0, -1: -1}
"""Settings of `mallopt` by which glibc maps nothing (M_MMAP_MAX) and gives nothing back (M_TRIM_THRESHOLD)."""


def say(part: str, **facts: object) -> None:
    rounded = {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in facts.items()}
    print(json.dumps({"part": part, "threads": torch.get_num_threads(), **rounded}), flush=True)


def best_of(contenders: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the least milliseconds of each contender, which take turns: on the clock, and of the processor."""
    clocks = {"ms": time.perf_counter, "processor ms": time.process_time}
    found: dict[str, list[float]] = {}
    for _ in range(turns + 1):
        for name, work in contenders.items():
            began = [clock() for clock in clocks.values()]
            work()
            for (unit, clock), since in zip(clocks.items(), began, strict=True):
                found.setdefault(f"{name}, {unit}", []).append(1e3 * (clock() - since))
    # The first turn is a warm-up.
    return {name: min(times[1:]) for name, times in found.items()}


class Drawn:
    """Dropout by generators, a client's mask after another's, as torch can; each mask is kept for the gradient."""

    _generators = tuple(torch.Generator().manual_seed(client) for client in range(CLIENTS))

    @classmethod
    def apply(cls, values: Tensor, mask: Mask) -> Tensor:
        drawn = torch.empty_like(values)
        for own, generator in zip(drawn.view(CLIENTS, -1), cls._generators, strict=True):
            own.bernoulli_(1 / mask.scale, generator=generator)
        return values * drawn.mul_(mask.scale)


class Kept(torch.autograd.Function):
    """Dropout by counter that keeps what stays, a byte a value, in place of making it once more."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Mask) -> Tensor:
        found = mask.compute(values)
        ctx.save_for_backward(found == 0)
        ctx.scale = mask.scale
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gone,) = ctx.saved_tensors
        return (gradient * ctx.scale).masked_fill_(gone, 0), None


@contextmanager
def dropped_by(way: Any) -> Iterator[None]:
    before, client_dropout.Dropped = client_dropout.Dropped, way
    try:
        yield
    finally:
        client_dropout.Dropped = before


def masks() -> None:
    values, gradient = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    keys_N = sequence_keys([*range(CLIENTS)], [0] * CLIENTS, [0] * CLIENTS, BATCH).flatten()

    def call(way: Any, p: float) -> None:
        with dropped_by(way), ClientDropout(keys_N):
            found = functional.dropout(values, p)
        found.backward(gradient)
        values.grad = None

    ways = {"drawn": Drawn, "by counter": client_dropout.Dropped, "by counter, kept": Kept}
    for p in (0.1, 0.5):
        found = best_of({name: lambda way=way, p=p: call(way, p) for name, way in ways.items()}, turns=15)
        say("masks", p=p, shape=SHAPE, **found)


def build_part(dropout: float, own_dropout: bool) -> AdaptedModel:
    """Return the first layers of a random OPT-350M, with its head."""
    source = open_model("random:opt-350m")
    source.config.num_hidden_layers = LAYERS
    return adapt(load_model(source, dtype="float32", device=torch.device("cpu")), dropout, own_dropout)


def train(adapted: AdaptedModel, steps: int) -> None:
    blocks = [make_blocks(BATCH * steps, client) for client in range(CLIENTS)]
    for _ in BatchedEngine(adapted).train(make_jobs(adapted.read(), blocks)):
        pass


def step() -> None:
    without, both = build_part(0.0, False), build_part(0.5, True)

    def drawn() -> None:
        with dropped_by(Drawn):
            train(both, 1)

    contenders = {"without": lambda: train(without, 1), "drawn": drawn, "by counter": lambda: train(both, 1)}
    found = best_of(contenders, turns=3)
    say("step", layers=LAYERS, clients=CLIENTS, **found)


def pages() -> None:
    for turn in range(3):
        for kept in (False, True):
            command = [sys.executable, str(Path(__file__)), "--process", "kept" if kept else "glibc's"]
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            say("pages", turn=turn, kept=kept, **json.loads(line))


def measure_pages(kept: bool, steps: int = 3) -> dict[str, float]:
    """Return what steps cost in this process: the best one's seconds, and all steps' faults and system seconds."""
    if kept:
        libc = ctypes.CDLL(None)
        assert all(libc.mallopt(what, value) for what, value in KEPT_PAGES.items())
    adapted = build_part(0.5, True)
    train(adapted, 1)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF), []
    for _ in range(steps):
        began = time.perf_counter()
        train(adapted, 1)
        seconds.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "step, s": min(seconds),
        "processor s a step": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / steps,
        "system s a step": (after.ru_stime - before.ru_stime) / steps,
        "faults a step": (after.ru_minflt - before.ru_minflt) / steps,
        "peak GB": peak_memory() / 1e9,
    }


def prepacked() -> None:
    rows = SHAPE[0] * SHAPE[1]
    for wide, narrow in ((1024, 1024), (4096, 1024), (1024, 4096)):
        weight_OI, x_NI, grad_NO = torch.randn(wide, narrow), torch.randn(rows, narrow), torch.randn(rows, wide)
        there, back = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows) for weight in (weight_OI, weight_OI.T)
        )

        def multiply(values: Tensor, packed: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(values, packed, None, "none", [], "")

        torch.testing.assert_close(multiply(grad_NO, back), grad_NO @ weight_OI, rtol=1e-4, atol=1e-2)
        ways = {
            "own": lambda: (functional.linear(x_NI, weight_OI), grad_NO @ weight_OI),  # noqa: B023
            "prepacked": lambda: (multiply(x_NI, there), multiply(grad_NO, back)),  # noqa: B023
        }
        say("prepacked", weight=(wide, narrow), rows=rows, **best_of(ways, turns=25))


PARTS = {"masks": masks, "step": step, "pages": pages, "prepacked": prepacked}


def main() -> None:
    parser = open_parser(__doc__)
    add_parts(parser, PARTS)
    parser.add_argument("--process", choices=["glibc's", "kept"], help="one turn of pages, as a JSON line")
    options = parser.parse_args()
    if options.process:
        print(json.dumps(measure_pages(options.process == "kept")))
        return
    for part in options.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
