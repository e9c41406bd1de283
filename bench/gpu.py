"""What a GPU reaches, and what the batched engine makes of it. Each part can be had alone, and takes seconds.

    python bench/gpu.py SHAPE PART... [--clients 1 3 8 32] [--lengths 128 512 2048]

| part | what it tells |
|---|---|
| machine | copies and matrix products of the card, from graphs, so that no launch is timed |
| works | updates of recorded steps against launched ones and against the reference's |
| steps | a step's time, with the host's, the recording's and the replay's; share of the products' rate; memory |
| profile | the kernels of a launched step: how many, how long, which |
| twice | the same training twice: whether to the bit |
| evaluate | samples a second at several batch sizes |

One JSON line a fact; a part that fails says so and the next goes on. `tiny-opt` on a processor is a dry run.
Random weights and tokens. Nothing here reads the engine's own state: a recording is seen where torch makes it, so that
another way of stepping is measured alike.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from options import add_parts, add_shape, open_parser
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler
from workload import (
    BATCH,
    DEVICE,
    DTYPE,
    GPU,
    LENGTH,
    build_adapted,
    count_flops,
    make_blocks,
    make_jobs,
    measure_products,
    predict_memory,
    wait,
)

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.evaluation.held_out import score_adapters
from fedloom.host.machine import describe_machine
from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientUpdate
from fedloom.training.memory import free_bytes
from fedloom.training.reference import ReferenceEngine

STEPS = 200 if GPU else 8
"""Steps that are timed."""
SETTINGS = ((0.0, False), (0.5, True))
"""Dropout of the adapter, and whether the base model's own is on: none at all, and the published experiment's."""
ATTENTION = ("flash", "fmha", "sdpa", "cudnn", "attention")
"""Words in the names of kernels of attention."""


def say(part: str, **facts: object) -> None:
    rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in facts.items()}
    print(json.dumps({"part": part, **rounded}), flush=True)


def seconds_of(work: Callable[..., object], *arguments: object, **named: object) -> float:
    wait()
    started = time.perf_counter()
    work(*arguments, **named)
    wait()
    return time.perf_counter() - started


def train(
    adapted: AdaptedModel,
    clients: int,
    steps: int,
    *,
    engine: Callable[[AdaptedModel], Any] = BatchedEngine,
    length: int = LENGTH,
    **changes: object,
) -> torch.Tensor:
    """Train so many clients for so many steps, and return their weights, [K, P]."""
    data = [make_blocks(BATCH * steps, client, length) for client in range(clients)]
    jobs = make_jobs(adapted.read(), data, proximal_mu=0.1, **changes)
    results = list(engine(adapted).train(jobs))
    for result in results:
        assert isinstance(result, ClientUpdate), result
    return torch.stack([result.adapter.weights_P for result in sorted(results, key=lambda one: one.client)])


@dataclass
class Recordings:
    """Recordings and replays of CUDA graphs, as they happened: moments in seconds, and events before and after."""

    record_seconds: list[float] = field(default_factory=list)
    called: list[float] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)
    began: list[torch.cuda.Event] = field(default_factory=list)
    ended: list[torch.cuda.Event] = field(default_factory=list)
    used_bytes: int = 0

    def facts(self, started: float) -> dict[str, float]:
        """Return milliseconds: medians of the last replays, the mean of the steps from one replay to the next."""
        found: dict[str, float] = {"recordings": len(self.record_seconds), "replays": len(self.called)}
        if self.record_seconds:
            found["record_ms"] = 1e3 * sum(self.record_seconds)
        if len(self.called) < 40:
            return found
        found["until_first_replay_ms"] = 1e3 * (self.called[0] - started)
        # The first few run before the queue of the GPU is full.
        called, returned, began, ended = (
            moments[20:] for moments in (self.called, self.returned, self.began, self.ended)
        )
        steps = len(called) - 1
        found["step_ms"] = began[0].elapsed_time(began[-1]) / steps
        found["replay_ms"] = statistics.median(a.elapsed_time(b) for a, b in zip(began, ended, strict=True))
        found["between_replays_ms"] = found["step_ms"] - found["replay_ms"]
        found["launch_host_ms"] = 1e3 * statistics.median(b - a for a, b in zip(called, returned, strict=True))
        # From the return of a launch to the next call: everything that the host does for a step but the launch.
        rests = [later - earlier for earlier, later in zip(returned, called[1:], strict=False)]
        found["host_ms_median"] = 1e3 * statistics.median(rests)
        found["host_ms_mean"] = 1e3 * statistics.mean(rests)
        found["used_on_card_bytes"] = self.used_bytes
        return found


@contextmanager
def watch_recordings() -> Iterator[Recordings]:
    """Write down every recording and replay of a CUDA graph in this process."""
    kind, seen = torch.cuda.CUDAGraph, Recordings()
    begin, end, replay = kind.capture_begin, kind.capture_end, kind.replay

    def watched_begin(graph: torch.cuda.CUDAGraph, *arguments: Any, **named: Any) -> None:
        seen.record_seconds.append(-time.perf_counter())
        begin(graph, *arguments, **named)

    def watched_end(graph: torch.cuda.CUDAGraph) -> None:
        try:
            end(graph)
        finally:
            seen.record_seconds[-1] += time.perf_counter()

    def watched_replay(graph: torch.cuda.CUDAGraph) -> None:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        seen.called.append(time.perf_counter())
        replay(graph)
        seen.returned.append(time.perf_counter())
        ended.record()
        seen.began.append(began)
        seen.ended.append(ended)
        if len(seen.called) == 10:
            free, whole = torch.cuda.mem_get_info()
            seen.used_bytes = whole - free

    kind.capture_begin, kind.capture_end, kind.replay = watched_begin, watched_end, watched_replay  # type: ignore
    try:
        yield seen
    finally:
        kind.capture_begin, kind.capture_end, kind.replay = begin, end, replay  # type: ignore


def machine(shape: str, counts: list[int], lengths: list[int]) -> None:
    found = describe_machine()
    facts: dict[str, object] = {name: found[name] for name in ("gpus", "python", "processor", "cores", "versions")}
    if not GPU:
        say("machine", **facts)
        return
    facts["cudnn"] = torch.backends.cudnn.version()
    say("machine", **facts, memory_bytes=torch.cuda.get_device_properties(0).total_memory)
    gigabyte = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    seconds = _seconds_replayed(partial(torch.empty_like(gigabyte).copy_, gigabyte))
    say("copy", terabytes_per_second=2 * gigabyte.numel() / seconds / 1e12)
    for rows in (256, 768, 2048, 8192):
        for inner, outer in ((1024, 1024), (1024, 4096), (4096, 1024), (8192, 8192)):
            say("product", rows=rows, inner=inner, outer=outer, tflops=_products_of(rows, inner, outer) / 1e12)


def _products_of(rows: int, inner: int, outer: int) -> float:
    """Return the FLOP/s of products of this size in bfloat16."""
    x, w = (torch.randn(size, inner, dtype=torch.bfloat16, device=DEVICE) for size in (rows, outer))
    return 2 * rows * inner * outer / _seconds_replayed(partial(torch.matmul, x, w.mT))


def _seconds_replayed(work: Callable[[], object], times: int = 20, replays: int = 5) -> float:
    """Return the seconds of one piece of work among many in a graph: no launch is in them."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    wait()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            work()
    graph.replay()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(replays):
        graph.replay()
    ended.record()
    wait()
    return began.elapsed_time(ended) / 1e3 / (times * replays)


def works(shape: str, counts: list[int], lengths: list[int]) -> None:
    adapted = build_adapted(shape, DTYPE, *SETTINGS[0])
    start_P = adapted.read().weights_P
    # On random tokens, Adam would turn rounding into signs.
    how: dict[str, Any] = {"clients": 3, "steps": 24 if GPU else 3, "optimizer": "sgd", "learning_rate": 0.1}
    with watch_recordings() as seen:
        recorded_KP = train(adapted, **how)
    launched_KP = train(adapted, **how, cuda_graph=False)
    reference_KP = train(adapted, **how, engine=ReferenceEngine)
    moved = (reference_KP - start_P).norm()
    say(
        "works",
        shape=shape,
        recordings=len(seen.record_seconds),
        replays=len(seen.called),
        recorded_from_launched=float((recorded_KP - launched_KP).norm() / moved),
        batched_from_reference=float((launched_KP - reference_KP).norm() / moved),
    )
    # With dropout, the masks of a recording are those of the steps that are launched.
    adapted = build_adapted(shape, DTYPE, *SETTINGS[1])
    recorded_KP = train(adapted, **how)
    launched_KP = train(adapted, **how, cuda_graph=False)
    distance = (recorded_KP - launched_KP).norm() / (launched_KP - start_P).norm()
    say("works with dropout", shape=shape, recorded_from_launched=float(distance))


def steps(shape: str, counts: list[int], lengths: list[int]) -> None:
    for length in lengths or [LENGTH]:
        _steps_of(shape, counts, length)


def _steps_of(shape: str, counts: list[int], length: int) -> None:
    free, flops = free_bytes(DEVICE), BATCH * count_flops(shape, length)
    for dropout, own in SETTINGS:
        adapted = build_adapted(shape, DTYPE, dropout, own)
        for clients in counts:
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
            facts: dict[str, object] = {"shape": shape, "tokens": length, "dropout": dropout, "clients": clients}
            train(adapted, clients, 2, length=length, cuda_graph=False)
            # The difference of two lengths: what a round costs once is in both.
            plain = partial(train, adapted, clients, length=length, cuda_graph=False)
            short, long = (seconds_of(plain, steps=number) for number in (4, 12))
            facts["launched_step_ms"] = 1e3 * (long - short) / 8
            if GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with watch_recordings() as seen:
                wait()
                started = time.perf_counter()
                whole = seconds_of(train, adapted, clients, STEPS, length=length)
            facts |= seen.facts(started)
            facts["whole_ms_per_step"] = 1e3 * whole / STEPS
            # The products of a step in its own time, against as many rows with a square weight.
            rows = clients * BATCH * length
            products = _products_of(rows, 1024, 1024) if GPU else measure_products(DTYPE, rows, 1024)
            seconds = float(facts.get("step_ms", facts["whole_ms_per_step"])) / 1e3  # type: ignore[arg-type]
            facts |= {"products_tflops": products / 1e12, "share_of_products": clients * flops / seconds / products}
            if GPU:
                facts["allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
                facts["reserved_peak_bytes"] = torch.cuda.max_memory_reserved()
            try:
                started = time.perf_counter()
                predicted = predict_memory(shape, clients, length, dtype=DTYPE, dropout=dropout, own_dropout=own)
                facts["predict_seconds"] = time.perf_counter() - started
                facts["predicted_bytes"] = predicted.peak_bytes(clients)
                facts["predicted_client_bytes"] = predicted.client_bytes
                facts["clients_that_fit"] = predicted.clients_that_fit(free)
            except Exception as error:  # of any kind: the step's own facts are worth having without it
                facts["predict_error"] = f"{type(error).__name__}: {error}"[:300]
            say("steps", **facts)


def profile(shape: str, counts: list[int], lengths: list[int]) -> None:
    for length in lengths or [LENGTH]:
        _profile_of(shape, counts, length)


def _profile_of(shape: str, counts: list[int], length: int) -> None:
    # Not the processor's too: to sort its events of a step takes minutes.
    activities = [ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]

    def count(adapted: AdaptedModel, clients: int, steps: int) -> tuple[Counter[str], Counter[str]]:
        with profiler(activities=activities) as seen:
            train(adapted, clients, steps, length=length, cuda_graph=False)
            wait()
        times, microseconds = Counter[str](), Counter[str]()
        for event in seen.events() or ():
            if str(event.device_type).endswith("CUDA" if GPU else "CPU"):
                times[event.name[:90]] += 1
                microseconds[event.name[:90]] += event.device_time if GPU else event.self_cpu_time_total
        return times, microseconds

    for dropout, own in SETTINGS:
        adapted = build_adapted(shape, DTYPE, dropout, own)
        for clients in counts:
            train(adapted, clients, 2, length=length, cuda_graph=False)
            few, many = count(adapted, clients, 2), count(adapted, clients, 4)
            # What two more steps add: a round's own work is in both.
            times, microseconds = (
                {name: (more[name] - less[name]) / 2 for name in more} for less, more in zip(few, many, strict=True)
            )
            names = sorted(microseconds, key=lambda name: -microseconds[name])
            say(
                "profile",
                shape=shape,
                tokens=length,
                dropout=dropout,
                clients=clients,
                kernels=sum(times.values()),
                device_ms=sum(microseconds.values()) / 1e3,
                attention=[name for name in names if any(word in name.lower() for word in ATTENTION)][:4],
            )
            for name in names[:12]:
                say("kernel", clients=clients, dropout=dropout, name=name, us=microseconds[name], times=times[name])


def twice(shape: str, counts: list[int], lengths: list[int]) -> None:
    lengths = lengths or ([64, 200] if shape.startswith("tiny") else [128, 512])
    for dropout, own in SETTINGS:
        adapted = build_adapted(shape, DTYPE, dropout, own)
        start_P = adapted.read().weights_P
        for length in lengths:
            number = 40 if GPU else 4
            one, other = (train(adapted, 3, number, length=length, learning_rate=1e-4) for _ in range(2))
            relative = float((one - other).norm() / (one - start_P).norm())
            same = bool(torch.equal(one, other))
            say("twice", shape=shape, dropout=dropout, tokens=length, same_to_the_bit=same, relative=relative)


def score(shape: str, counts: list[int], lengths: list[int]) -> None:
    adapted = build_adapted(shape, DTYPE, *SETTINGS[1])
    start = adapted.read()
    for mixed in (False, True):
        held_out = make_blocks(1024 if GPU else 16, 99, lengths=(2, LENGTH) if mixed else None)
        for size in (4, 8, 32, 128, 256) if GPU else (4, 8):
            work = partial(score_adapters, adapted, [(start, held_out)], batched=True, batch_size=size)
            seconds = min(seconds_of(work) for _ in range(3))  # the first one prepares its kernels
            rate = len(held_out) / seconds
            say(
                "evaluate",
                shape=shape,
                mixed=mixed,
                batch=size,
                samples_per_second=rate,
                ms_per_batch=1e3 * size / rate,
            )


PARTS = {"machine": machine, "works": works, "steps": steps, "profile": profile, "twice": twice, "evaluate": score}


def run_parts(parts: Mapping[str, Callable[..., None]], chosen: Sequence[str], shape: str, *how: object) -> None:
    """Run the chosen parts, or all; one that fails says so, and each says what it took. Exit 1 if one failed."""
    failed = False
    for part in chosen or parts:
        started = time.perf_counter()
        try:
            parts[part](shape, *how)
        except Exception as error:  # of any kind: time on a GPU is short, and the other parts are worth having
            failed = True
            traceback.print_exc()
            say("failed", shape=shape, failed=part, error=f"{type(error).__name__}: {error}"[:400])
        say("took", shape=shape, took=part, seconds=time.perf_counter() - started)
    if failed:
        raise SystemExit(1)


def main() -> None:
    parser = open_parser(__doc__)
    add_shape(parser, "shape")
    add_parts(parser, PARTS)
    counts = [1, 3, 8, 32] if GPU else [1, 2]
    parser.add_argument("--clients", type=int, nargs="+", default=counts, help="at once, of works, steps and profile")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[], help="tokens of a block, of all but works, evaluate"
    )
    options = parser.parse_args()
    run_parts(PARTS, options.parts, options.shape, options.clients, options.lengths)


if __name__ == "__main__":
    main()
