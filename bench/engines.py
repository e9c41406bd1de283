"""Training and evaluation speed of both engines against what a user would otherwise run, side by side in one process.

    python bench/engines.py [--shape smollm2-135m] [--clients 3] [--more-clients 1 8 32] [--steps 3] [--repeats 2]
                            [--cases full short long] [--length 128] [--dropout 0.5] [--dtype float32]

Random weights and random tokens: speed does not depend on them; losses here mean nothing. Every contender takes
steps of 2 × 128 tokens for every client, in turn, `--repeats` times; the table has the best of each, because what else
the machine does only ever takes time away. One JSON line a contender follows the table. On a machine that others use,
run it on one thread (`OMP_NUM_THREADS=1`) and read the processor's seconds: threads that wait for each other spin.

TRL's SFTTrainer, with batches without padding, is a contender where TRL is installed. Trainers take one client after
another, so their rates hold for any number of clients.

On a GPU the batched engine takes at least 500 steps, because its first ones are not recorded yet, and the others 60;
a trainer's rate there is that of its last 50, so that its start, which a long training hardly sees, is left out. Those
who take one client after another have one there.

On a GPU `--gigabytes 8` limits what may be allocated, as a smaller card would. `--cases` names the documents to train
on: `full` ones of 128 tokens, or as many as `--length` says, or `short` or `long` ones of several lengths.
`--dropout` is the adapters'; the model's own is on in any case.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from options import add_shape, open_parser
from trainers import HAS_TRL, SKIPPED_STEPS, contend, padded_trainer, padding_free_trainer, shows_documents_each_other
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
    wait,
)

from fedloom.data.tokens import TokenBlocks
from fedloom.evaluation.held_out import score_adapters
from fedloom.host.machine import describe_machine, peak_memory, reset_peak_memory
from fedloom.model.source import open_model
from fedloom.recipe.loading import load_recipe
from fedloom.training.batched import BatchedEngine
from fedloom.training.reference import ReferenceEngine

EVALUATED = 512 if GPU else 16
"""Sequences of an evaluation."""
BATCHED_STEPS, OTHER_STEPS = 500, 6 * SKIPPED_STEPS
"""Steps on a GPU: of the batched engine, at least; of the others, at most."""

CASES: dict[str, tuple[str, tuple[int, int] | None]] = {
    "full": ("Without padding", None),
    "short": ("Documents of 2 to 128 tokens", (2, 128)),
    "long": ("Documents of 50 to 512 tokens, as instructions and their answers have", (50, 512)),
}
"""Documents that are trained on, by the lengths that they are evenly spread over."""

Work = Callable[[], float | None]
"""Work that is measured; it may say itself how many seconds count."""
Found = dict[str, float]


@dataclass(frozen=True)
class Contender:
    """A way to train and to evaluate, with a model of its own."""

    train: Work
    score: Work
    train_samples: int
    model_bytes: int
    """Memory of a GPU that was taken before the work: each contender's model lies there while the others work."""


def make_contender(
    make: Callable[..., tuple[Work, Work]], shape: str, data: list[TokenBlocks], *rest: Any
) -> Contender:
    before = torch.cuda.memory_allocated() if GPU else 0
    train, score = make(shape, data, *rest)
    taken = torch.cuda.memory_allocated() - before if GPU else 0
    return Contender(train, score, sum(len(blocks) for blocks in data), taken)


def our_contender(
    build: Callable[..., Any], dtype: str, dropout: float, shape: str, data: list[TokenBlocks], held_out: TokenBlocks
) -> tuple[Work, Work]:
    adapted = build_adapted(shape, dtype, dropout)
    start = adapted.read()
    jobs = make_jobs(start, data)
    engine = build(adapted)

    def train() -> None:
        for _ in engine.train(jobs):
            pass

    def score() -> None:
        score_adapters(adapted, [(start, held_out)], batched=build is BatchedEngine, batch_size=8)

    return train, score


def measure(work: Work, model_bytes: int) -> tuple[float, float, int]:
    """Seconds, those of the processor, and the peak of memory.

    The peak is of the GPU without other contenders' models, or of this process.
    """
    reset_peak_memory()
    wait()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - model_bytes if GPU else 0
    started, began = time.perf_counter(), time.process_time()
    counted = work()
    wait()
    seconds, processor = time.perf_counter() - started, time.process_time() - began
    return counted or seconds, processor, torch.cuda.max_memory_allocated() - others if GPU else peak_memory()


def compare(contenders: dict[str, Contender], repeats: int) -> dict[str, Found]:
    """Each contender in turn, `repeats` times; the best of each."""
    best: dict[str, Found] = {name: {} for name in contenders}
    for _ in range(repeats):
        for name, one in contenders.items():
            phases = (("train", one.train, one.train_samples), ("evaluate", one.score, EVALUATED))
            for phase, work, samples in phases:
                seconds, processor, peak = measure(work, one.model_bytes)
                found = best[name]
                least = f"{phase}_processor_seconds"
                found[least] = min(found.get(least, math.inf), processor / samples)
                rate = f"{phase}_samples_per_second"
                found[rate] = max(found.get(rate, 0.0), samples / seconds)
                found[f"{phase}_peak_bytes"] = max(found.get(f"{phase}_peak_bytes", 0), peak)
    return best


def predict_experiment(found: Found) -> float:
    """Seconds of the recipe `opt350m-lora-fedprox-6k` at these rates: every step, every evaluation."""
    recipe = load_recipe("opt350m-lora-fedprox-6k")
    data, rounds = recipe.data, recipe.federation.rounds
    holdout = data.clients * round(data.client_holdout * data.documents_per_client)
    trained = rounds * recipe.training.epochs * (data.clients * data.documents_per_client - holdout)
    evaluated = (rounds + 1) * (data.central_holdout + holdout) + rounds * holdout
    return trained / found["train_samples_per_second"] + evaluated / found["evaluate_samples_per_second"]


def show(title: str, best: dict[str, Found], *, tokens: float = LENGTH, **facts: object) -> None:
    """Print a table; `tokens` are the real ones of a sample."""
    first = next(iter(best.values()))
    print(f"\n{title}\n")
    print(
        "| | train samples/s | tokens/s | × the first | processor s a sample | × the first"
        " | evaluation samples/s | × the first | peak memory, training |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, found in best.items():
        train, score = found["train_samples_per_second"], found.get("evaluate_samples_per_second")
        least = found.get("train_processor_seconds")
        processor = f"{least:.3g} | {first['train_processor_seconds'] / least:.2f}" if least else " | "
        scored = f"{score:.2f} | {score / first['evaluate_samples_per_second']:.2f}" if score else " | "
        memory = f"{found['train_peak_bytes'] / 1e9:.1f} GB" if "train_peak_bytes" in found else ""
        print(
            f"| {name} | {train:.2f} | {train * tokens:.0f} | {train / first['train_samples_per_second']:.2f}"
            f" | {processor} | {scored} | {memory} |"
        )
    for name, found in best.items():
        print(json.dumps({"contender": name, **facts, **found}), flush=True)


def find_too_long(shape: str, cases: list[str], length: int) -> dict[str, str]:
    """Return the cases whose documents are longer than the model takes, each with why."""
    most = open_model(f"random:{shape}").max_length
    longest = {case: lengths[1] if (lengths := CASES[case][1]) else length for case in cases}
    return {
        case: f"{number} tokens are more than {shape}'s {most}"
        for case, number in longest.items()
        if most is not None and number > most
    }


def main() -> None:
    parser = open_parser(__doc__)
    add_shape(parser, "--shape", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=3, help="K, trained at once (default: 3)")
    parser.add_argument(
        "--more-clients", type=int, nargs="*", default=[], metavar="K", help="of the batched engine alone"
    )
    parser.add_argument("--steps", type=int, default=3, help="of a client in a turn (default: 3)")
    parser.add_argument("--repeats", type=int, default=2, help="turns, of which the best counts (default: 2)")
    parser.add_argument("--gigabytes", type=float, help="of a GPU that may be allocated (default: all)")
    parser.add_argument("--no-flower", action="store_true", help="leave Flower's simulation out")
    parser.add_argument(
        "--cases", nargs="*", choices=CASES, help="documents to train on (default: all that the shape takes)"
    )
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a full document (default: {LENGTH})")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters (default: 0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=DTYPE, help=f"(default here: {DTYPE})")
    options = parser.parse_args()
    cases = list(CASES) if options.cases is None else options.cases
    for case, why in find_too_long(options.shape, cases, options.length).items():
        if case == "full" or options.cases is not None:
            option, mend = ("--length", "give a shorter one") if case == "full" else ("--cases", f"leave {case} out")
            parser.error(f"{option}: {case}: {why}; {mend}")
        print(f"{case} is left out: {why}")
        cases.remove(case)
    if options.gigabytes and not GPU:
        parser.error("--gigabytes: torch sees no GPU; leave it out")
    if options.gigabytes:
        share = options.gigabytes * 1e9 / torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(share)

    machine, shape, clients = describe_machine(), options.shape, options.clients
    dtype, dropout = options.dtype, options.dropout
    batched_steps = max(options.steps, BATCHED_STEPS) if GPU else options.steps
    steps = min(batched_steps, OTHER_STEPS) if GPU else options.steps
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    where = ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['threads']} threads"
    print(f"{where}, {dtype}; Python {machine['python']}, {versions}")
    taken = f"{steps} steps a client" + (f", batched {batched_steps}" if GPU else "")
    length = options.length
    print(f"{shape}, {BATCH} × {length} tokens a client and step, {taken}, K = {clients}, dropout {dropout}")

    trainers = {"HF Trainer + PEFT": padded_trainer}
    if HAS_TRL:
        trainers["TRL's SFTTrainer, padding-free"] = padding_free_trainer
        if shows_documents_each_other(shape):
            print("TRL's padding-free documents of a batch see one another in this model: its losses are others")
    else:
        print("TRL's SFTTrainer is left out: trl is not installed")
    theirs = {
        f"{name}, {kind}": partial(contend, make, kind, dropout)
        for name, make in trainers.items()
        for kind in dict.fromkeys(("float32", dtype))
    }
    ours = {
        f"{name}, {dtype}": partial(our_contender, build, dtype, dropout)
        for name, build in (("reference", ReferenceEngine), ("batched", BatchedEngine))
    }
    samples = clients * steps * BATCH
    for title, lengths in (CASES[case] for case in cases):
        held_out = make_blocks(EVALUATED, 99, length, lengths=lengths)
        contenders = {}
        for name, make in (theirs | ours).items():
            is_batched = name.startswith("batched")
            count = batched_steps if is_batched else steps
            taken_in_turn = 1 if GPU and not is_batched else clients
            data = [make_blocks(BATCH * count, client, length, lengths=lengths) for client in range(taken_in_turn)]
            contenders[name] = make_contender(make, shape, data, held_out)
        best = compare(contenders, options.repeats)
        if not (lengths or options.no_flower):
            from flower import simulate_round

            whole, alone = simulate_round(shape, clients, steps, BATCH, length, torch.get_num_threads())
            best["Flower's simulation, its round alone"] = {"train_samples_per_second": samples / alone}
            best["Flower's simulation, with its start"] = {"train_samples_per_second": samples / whole}
        tokens = sum(lengths) / 2 if lengths else length
        show(title, best, tokens=tokens, shape=shape, dropout=dropout, clients=clients, lengths=lengths)
        if not lengths:
            whole_run = {name: predict_experiment(found) for name, found in best.items() if len(found) > 1}
            reached = measure_products(dtype, clients * BATCH * length, 1024)
            flops = count_flops(shape, length) * best[f"batched, {dtype}"]["train_samples_per_second"]
            print(f"\nproducts of [{clients * BATCH * length}, 1024] with a square: {reached / 1e9:.0f} GFLOP/s")
            print(f"the products of a step of batched: {flops / 1e9:.0f} GFLOP/s, {100 * flops / reached:.0f} % of it")
            for name, seconds in whole_run.items() if (shape, length) == ("opt-350m", LENGTH) else ():
                print(f"the whole experiment at these rates: {seconds / 3600:.1f} h with {name}")

    if options.more_clients:
        contenders.clear()
        best = {}
        for count in options.more_clients:
            data = [make_blocks(BATCH * batched_steps, client, length) for client in range(count)]
            held_out = make_blocks(EVALUATED, 99, length)
            made = make_contender(partial(our_contender, BatchedEngine, dtype, dropout), shape, data, held_out)
            best |= compare({f"batched, K = {count}": made}, options.repeats)
        show("More clients at once", best, tokens=length, shape=shape, length=length)


if __name__ == "__main__":
    main()
