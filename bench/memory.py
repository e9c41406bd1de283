"""Predicted against measured peak memory of training, over models, lengths and clients at once; LoRA and whole models.

    python bench/memory.py

Each case is a process of its own, so that none finds what another left behind. Measured is the most that the process
held in a round of two steps, beyond what it held before the base model was loaded; on a GPU, what torch had allocated.
One JSON line a case follows the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from options import open_parser, read_case

CASES: list[tuple[str, int, int | None]] = [
    ("smollm2-135m", 64, 1),
    ("smollm2-135m", 128, 1),
    ("smollm2-135m", 128, 3),
    ("smollm2-135m", 128, 8),
    ("smollm2-135m", 512, 1),
    ("smollm2-135m", 512, 3),
    ("opt-350m", 64, 1),
    ("opt-350m", 128, 1),
    ("opt-350m", 128, 3),
    ("opt-350m", 128, 8),
    ("opt-350m", 512, 1),
    ("opt-350m", 512, 3),
    ("smollm2-135m", 64, None),
    ("smollm2-135m", 128, None),
    ("smollm2-135m", 512, None),
    ("smollm2-135m", 2048, None),
    ("opt-350m", 128, None),
    ("opt-350m", 512, None),
]
"""Shape, tokens of a block, clients at once; None where one after another trains the whole model."""

WHOLE = "whole model"


def measure(shape: str, length: int, at_once: int | None) -> dict[str, object]:
    """One case, in this process."""
    import torch
    from workload import BATCH, DEVICE, GPU, build_adapted, make_blocks, make_jobs, predict_memory, predict_whole

    from fedloom.host.machine import peak_memory, reset_peak_memory
    from fedloom.training.batched import BatchedEngine
    from fedloom.training.reference import ReferenceEngine

    clients = at_once or 1
    predicted = predict_memory(shape, clients, length) if at_once else predict_whole(shape, length)

    steps = 2 if DEVICE.type == "cpu" else 8  # the first few on a GPU are not recorded yet
    data = [make_blocks(BATCH * steps, client, length) for client in range(clients)]
    reset_peak_memory()
    before = peak_memory()
    adapted = build_adapted(shape, whole=at_once is None)
    engine = BatchedEngine(adapted) if at_once else ReferenceEngine(adapted)
    jobs = make_jobs(adapted.read(), data)
    reset_peak_memory()
    for _ in engine.train(jobs):
        pass
    measured = torch.cuda.max_memory_allocated() if GPU else peak_memory() - before
    return {
        "shape": shape,
        "tokens": length,
        "clients": at_once,
        "device": str(DEVICE),
        "predicted_bytes": predicted.peak_bytes(clients),
        "measured_bytes": measured,
    }


def main() -> None:
    parser = open_parser(__doc__)
    told = f'one, as a JSON line; for CLIENTS, "{WHOLE}" trains one'
    parser.add_argument("--case", nargs=3, metavar=("SHAPE", "TOKENS", "CLIENTS"), help=told)
    options = parser.parse_args()
    if options.case:
        whole = options.case[-1] == WHOLE
        shape, (length, *clients) = read_case(parser, options.case[:2] if whole else options.case)
        print(json.dumps(measure(shape, length, None if whole else clients[0])))
        return
    print("| shape | tokens | K | predicted | measured | predicted / measured |")
    print("|---|---|---|---|---|---|")
    lines = []
    for shape, length, clients in CASES:
        case = shape, length, clients or WHOLE
        command = [sys.executable, str(Path(__file__)), "--case", *map(str, case)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found = json.loads(line)
        predicted, measured = found["predicted_bytes"], found["measured_bytes"]
        print(
            f"| {case[0]} | {case[1]} | {case[2]} | {predicted / 1e9:.2f} GB | {measured / 1e9:.2f} GB"
            f" | {predicted / measured:.2f} |",
            flush=True,
        )
        lines.append(line)
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
