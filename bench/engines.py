"""Training and evaluation speed of both engines against what a user would otherwise run, side by side in one process.

    python bench/engines.py [--shape smollm2-135m] [--clients 3] [--steps 3] [--repeats 2]

Random weights and random tokens: speed does not depend on them; losses here mean nothing. Every contender does the
same number of steps of 2 × 128 tokens for every client, in turn, `--repeats` times; the table has the best of each,
because what else the machine does only ever takes time away. One JSON line a contender follows the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from fedloom.adapters.adapter import AdaptedModel, build_config
from fedloom.data.tokens import TokenBlocks
from fedloom.evaluation import evaluate
from fedloom.machine import describe_machine
from fedloom.model import load_model, open_model
from fedloom.recipe import Adapter as AdapterSection
from fedloom.recipe import Training
from fedloom.training.batched import build_batched_engine
from fedloom.training.jobs import ClientJob
from fedloom.training.reference import build_reference_engine

BATCH, LENGTH, VOCABULARY = 2, 128, 40_000
EVALUATED = 16
"""Sequences of an evaluation."""


class PeakMemory:
    """The most memory that this process held inside the block, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._done = 0, False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done:
            self.bytes = max(self.bytes, int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._thread.join()


def make_blocks(num_blocks: int, seed: int, length: int = LENGTH) -> TokenBlocks:
    tokens_NT = torch.randint(0, VOCABULARY, (num_blocks, length), generator=torch.Generator().manual_seed(seed))
    lengths_N = torch.full((num_blocks,), length)
    return TokenBlocks(tokens_NT, lengths_N, lengths_N)


def build_adapted(shape: str) -> AdaptedModel:
    base = load_model(open_model(f"random:{shape}"), dtype="float32", device=torch.device("cpu"), seed=1)
    section = AdapterSection(rank=16, alpha=32, targets=["q_proj", "v_proj"])
    return AdaptedModel(base, build_config(section, base), 1)


def make_contenders(shape: str, clients: int, steps: int) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Name -> how it trains all clients, and how it evaluates."""
    adapted = build_adapted(shape)
    start, data = adapted.read(), [make_blocks(BATCH * steps, client) for client in range(clients)]
    held_out = make_blocks(EVALUATED, 99)
    training = Training(batch_size=BATCH, learning_rate=1e-5)
    jobs = [ClientJob(1, client, blocks) for client, blocks in enumerate(data)]
    engines = {
        name: build(adapted, training, rounds=1, seed=1)
        for name, build in (("reference", build_reference_engine), ("batched", build_batched_engine))
    }

    def train(name: str) -> None:
        for update in engines[name](start, jobs):
            assert update.report.steps == steps

    def score() -> None:
        evaluate(adapted, start, held_out, batch_size=8)

    theirs = build_adapted(shape).model

    def trainer(blocks: TokenBlocks, folder: str) -> Trainer:
        rows = [{"input_ids": row, "labels": row.clone()} for row in blocks.tokens_NT]
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=4,
            num_train_epochs=1,
            learning_rate=1e-5,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        made = Trainer(model=theirs, args=arguments, train_dataset=rows, eval_dataset=rows)
        made.remove_callback(PrinterCallback)
        return made

    def train_theirs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for blocks in data:
                trainer(blocks, folder).train()

    def score_theirs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer(held_out, folder).evaluate()

    return {
        "HF Trainer + PEFT, clients in turn": (train_theirs, score_theirs),
        "reference": (lambda: train("reference"), score),
        "batched": (lambda: train("batched"), score),
    }


def measure_products(rows: int, features: int, seconds: float = 1.0) -> float:
    """FLOP/s that this machine reaches on products of [rows, features] with a square weight."""
    left, right = torch.randn(rows, features), torch.randn(features, features)
    left @ right
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        left @ right
        count += 1
    return count * 2 * rows * features**2 / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()

    contenders = make_contenders(options.shape, options.clients, options.steps)
    best: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for _ in range(options.repeats):
        for name, (train, score) in contenders.items():
            for phase, work in (("train", train), ("evaluate", score)):
                with PeakMemory() as memory:
                    started = time.perf_counter()
                    work()
                    seconds = time.perf_counter() - started
                samples = options.clients * options.steps * BATCH if phase == "train" else EVALUATED
                rate, peak = f"{phase}_samples_per_second", f"{phase}_peak_bytes"
                best[name][rate] = max(best[name].get(rate, 0.0), samples / seconds)
                best[name][peak] = max(best[name].get(peak, 0.0), memory.bytes)

    machine = describe_machine()
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    print(f"{machine['processor']}, {machine['threads']} threads, float32; Python {machine['python']}, {versions}")
    print(f"{options.shape}, K = {options.clients}, {BATCH} × {LENGTH} tokens, {options.steps} steps a client")
    print(f"products: {measure_products(options.clients * BATCH * LENGTH, 1024) / 1e9:.0f} GFLOP/s\n")
    print("| | train samples/s | tokens/s | against HF Trainer | evaluation samples/s | peak memory, training |")
    print("|---|---|---|---|---|---|")
    first = next(iter(best.values()))["train_samples_per_second"]
    for name, found in best.items():
        rate = found["train_samples_per_second"]
        print(
            f"| {name} | {rate:.2f} | {rate * LENGTH:.0f} | {rate / first:.2f} ×"
            f" | {found['evaluate_samples_per_second']:.2f} | {found['train_peak_bytes'] / 1e9:.1f} GB |"
        )
    for name, found in best.items():
        print(json.dumps({"contender": name, "shape": options.shape, "clients": options.clients, **found}))


if __name__ == "__main__":
    main()
