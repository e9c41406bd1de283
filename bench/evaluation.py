"""Seconds of scoring K clients' own adapters on their own hold-outs: in one pass, and one after another.

    python bench/evaluation.py [--shape smollm2-135m] [--clients 1 3 8 32] [--blocks 1 4 16] [--turns 3]

Random weights and tokens, LoRA of rank 16 on queries and values, documents of 16 to 128 tokens. Each K with each number
of documents a client is measured both ways, in turn; a time is the least of its turns, on the clock and of the
processor, which counts none of what other programs of a busy machine take. One JSON line a row follows the table.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from options import add_shape, open_parser
from workload import DEVICE, DTYPE, build_adapted, make_blocks

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.evaluation.held_out import Asked, Score, adapters_at_once, evaluate, evaluate_together
from fedloom.host.machine import describe_machine
from fedloom.progress import Progress

LENGTHS = (16, 128)
Watch = Callable[[Progress], None]


def make_asked(adapted: AdaptedModel, clients: int, blocks: int) -> list[Asked]:
    """Return adapters that differ, each with as many documents of its own."""
    start, generator = adapted.read(), torch.Generator().manual_seed(1)
    return [
        (
            replace(start, weights_P=start.weights_P + 0.01 * torch.randn(start.layout.size, generator=generator)),
            make_blocks(blocks, 100 + client, lengths=LENGTHS),
        )
        for client in range(clients)
    ]


def score(adapted: AdaptedModel, asked: Sequence[Asked], size: int, watch: Watch, *, together: bool) -> list[Score]:
    if together:
        at_once = adapters_at_once(adapted.layout.size)
        return evaluate_together(adapted, asked, batch_size=size, at_once=at_once, watch=watch)
    return [evaluate(adapted, *one, batch_size=size, watch=watch) for one in asked]


def measure(
    adapted: AdaptedModel, asked: Sequence[Asked], size: int, *, together: bool
) -> tuple[float, float, int, list[Score]]:
    """Return the seconds on the clock, those of the processor, the number of batches, and the scores."""
    batches: list[Progress] = []
    started, worked = time.perf_counter(), time.process_time()
    # The scores are read at the end, so a GPU has done all of it.
    found = score(adapted, asked, size, batches.append, together=together)
    return time.perf_counter() - started, time.process_time() - worked, len(batches), found


def main() -> None:
    parser = open_parser(__doc__)
    add_shape(parser, "--shape", default="smollm2-135m")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 3, 8, 32], help="(default: 1 3 8 32)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 16], help="of a client (default: 1 4 16)")
    parser.add_argument("--turns", type=int, default=3, help="of which the best counts (default: 3)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: 8)")
    wanted = parser.parse_args()
    adapted, machine = build_adapted(wanted.shape, DTYPE), describe_machine()
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "peft"))
    where = ", ".join(machine["gpus"]) or f"{machine['processor']}, {torch.get_num_threads()} threads"
    print(f"{where}, {DTYPE}; Python {machine['python']}, {versions}")
    print(f"{wanted.shape}, batches of {wanted.batch_size} × {LENGTHS[1]} tokens, on {DEVICE}\n")
    print("| K | documents each | batches | one after another, s | one pass, s | × | processor s | processor s | × |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    lines = []
    for blocks in wanted.blocks:
        for clients in wanted.clients:
            asked = make_asked(adapted, clients, blocks)
            turns = [
                [measure(adapted, asked, wanted.batch_size, together=together) for together in (False, True)]
                for _ in range(wanted.turns)
            ]
            apart, one = ([turn[way] for turn in turns] for way in (0, 1))
            furthest = max(
                abs(ours.loss - theirs.loss) / theirs.loss for ours, theirs in zip(one[0][3], apart[0][3], strict=True)
            )
            row = {
                "shape": wanted.shape, "clients": clients, "documents": blocks,
                "batches_apart": apart[0][2], "batches_together": one[0][2],
                "apart_seconds": min(turn[0] for turn in apart), "together_seconds": min(turn[0] for turn in one),
                "apart_processor_seconds": min(turn[1] for turn in apart),
                "together_processor_seconds": min(turn[1] for turn in one),
                "furthest_loss": furthest,
            }  # fmt: skip
            print(
                f"| {clients} | {blocks} | {row['batches_apart']}, {row['batches_together']}"
                f" | {row['apart_seconds']:.3f} | {row['together_seconds']:.3f}"
                f" | {row['apart_seconds'] / row['together_seconds']:.2f}"
                f" | {row['apart_processor_seconds']:.3f} | {row['together_processor_seconds']:.3f}"
                f" | {row['apart_processor_seconds'] / row['together_processor_seconds']:.2f} |",
                flush=True,
            )
            print(f"losses differ by {furthest:.1e} at most", file=sys.stderr, flush=True)
            lines.append(json.dumps(row))
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
