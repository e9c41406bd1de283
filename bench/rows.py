"""Recorded steps of a GPU where texts have several lengths, or clients several numbers of steps.

    python bench/rows.py SHAPE [rows mixed rounds] [--dropout 0.5] [--sizes 3x2 8x4]

| part | what it tells |
|---|---|
| rows | a step with padding, and as a row of so many eighths of it; one long document says how many |
| mixed | a round of documents of 50 to 512 tokens: padded, and as the engine itself has them |
| rounds | three rounds of one engine, of clients that have 110 to 120 steps: recordings of each, and its seconds |

One JSON line a fact; a part that fails says so and the next goes on. `tiny-opt` on a processor is a dry run, where
steps are as they are there.
"""

from __future__ import annotations

import gc
import math
import time
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gpu import run_parts, say, seconds_of, watch_recordings
from options import add_parts, add_shape, open_parser
from workload import BATCH, DTYPE, GPU, build_adapted, make_blocks, make_jobs

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import TokenBlocks
from fedloom.training import client_slots
from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientResult, ClientUpdate

STEPS, MIXED_STEPS = (80, 400) if GPU else (2, 2)
"""Steps of a round; rounds of mixed lengths have rows of several sizes where they are long."""
WIDTH = 512 if GPU else 64
SIZES = ["1x2", "3x2", "3x4", "8x4", "32x2"] if GPU else ["1x2", "2x2"]
"""Clients, and documents of each in a step."""
Sizes = list[tuple[int, int]]


@contextmanager
def rows(wanted: bool | None) -> Iterator[None]:
    """Have every step with padding computed as a row, or none, or where the engine thinks that it pays."""
    before = client_slots.ROW_LAUNCHES, client_slots.ROW_TRAFFIC
    if wanted is not None:
        client_slots.ROW_LAUNCHES, client_slots.ROW_TRAFFIC = (1, 0.0) if wanted else (math.inf, 0.0)  # type: ignore
    try:
        yield
    finally:
        client_slots.ROW_LAUNCHES, client_slots.ROW_TRAFFIC = before


def measure(adapted: AdaptedModel, data: list[TokenBlocks], batch: int, wanted: bool | None) -> dict[str, float]:
    """Return milliseconds of a step of these clients."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    jobs = make_jobs(adapted.read(), data, proximal_mu=0.1, batch_size=batch)
    with rows(wanted), watch_recordings() as seen:
        started = time.perf_counter()
        whole = seconds_of(lambda: [*BatchedEngine(adapted).train(jobs)])
    facts = seen.facts(started)
    return {"whole_ms_per_step": 1e3 * whole / max(len(blocks) // batch for blocks in data)} | {
        name: facts[name] for name in ("step_ms", "replay_ms", "recordings") if name in facts
    }


def compare_rows(shape: str, dropout: float, sizes: Sizes) -> None:
    adapted = build_adapted(shape, DTYPE, dropout, dropout > 0)
    for clients, batch in sizes:
        for short in (2, WIDTH // 4, WIDTH // 2):
            data = []
            for client in range(clients):
                blocks = make_blocks(batch * STEPS, client, WIDTH)
                blocks.lengths_N[1:] = short
                real_NT = torch.arange(WIDTH) < blocks.lengths_N[:, None]
                data.append(TokenBlocks(blocks.tokens_NT, blocks.lengths_N, real_NT))
            facts = {"shape": shape, "clients": clients, "documents": batch, "width": WIDTH, "dropout": dropout}
            facts["real"] = WIDTH + (batch - 1) * short
            padded = {} if short > 2 else measure(adapted, data, batch, False)
            if padded:
                say("padded", **facts, **padded)
            say("row", **facts, **measure(adapted, data, batch, True))


def compare_mixed(shape: str, dropout: float, sizes: Sizes) -> None:
    adapted = build_adapted(shape, DTYPE, dropout, dropout > 0)
    lengths = (50, 512) if GPU else (2, 32)
    for clients, batch in sizes:
        data = [make_blocks(batch * MIXED_STEPS, client, lengths=lengths) for client in range(clients)]
        facts = {"shape": shape, "clients": clients, "documents": batch, "lengths": lengths, "dropout": dropout}
        for name, wanted in (("padding", False), ("as it is", None)):
            say("mixed", way=name, **facts, **measure(adapted, data, batch, wanted))


def rounds(shape: str, dropout: float, sizes: Sizes) -> None:
    adapted = build_adapted(shape, DTYPE, dropout, dropout > 0)
    for clients in (3, 18) if GPU else (2,):
        lengths = [120 - 10 * client // clients if GPU else 3 - client for client in range(clients)]
        data = [make_blocks(BATCH * steps, client, 128 if GPU else 16) for client, steps in enumerate(lengths)]
        engine, start = BatchedEngine(adapted), adapted.read()
        for number in range(3):
            jobs = make_jobs(start, data, proximal_mu=0.1)
            results: list[ClientResult] = []
            with watch_recordings() as seen:
                seconds = seconds_of(results.extend, engine.train(jobs))
            assert all(isinstance(result, ClientUpdate) for result in results)
            facts = {"shape": shape, "clients": clients, "steps": lengths[0], "dropout": dropout, "round": number}
            say(
                "round",
                **facts,
                seconds=seconds,
                ms_per_step=1e3 * seconds / lengths[0],
                recordings=len(seen.record_seconds),
                record_seconds=sum(seen.record_seconds),
            )


PARTS = {"rows": compare_rows, "mixed": compare_mixed, "rounds": rounds}


def read_size(word: str) -> tuple[int, int]:
    """Return clients, and documents of each in a step, of a word such as 3x2."""
    try:
        clients, documents = map(int, word.split("x"))
    except ValueError:
        raise ArgumentTypeError(f"{word!r} is none, as 3x2 is") from None
    return clients, documents


def main() -> None:
    parser = open_parser(__doc__)
    add_shape(parser, "shape")
    add_parts(parser, PARTS)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters; none switches the model's own off")
    sizes = [read_size(size) for size in SIZES]
    told = f"clients x documents of each in a step (default: {' '.join(SIZES)})"
    parser.add_argument("--sizes", nargs="+", type=read_size, default=sizes, metavar="KxB", help=told)
    options = parser.parse_args()
    run_parts(PARTS, options.parts, options.shape, options.dropout, options.sizes)


if __name__ == "__main__":
    main()
