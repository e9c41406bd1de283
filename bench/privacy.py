"""What a bound on a document costs: time of a step, its memory, and what is learnt under noise.

    python bench/privacy.py [steps] [memory] [utility]

`steps` are private and plain ones in turn, each client with all its documents, and `memory` is predicted and measured
in a process of its own for each case. `utility` runs a federation of the tiny random Llama with and without a bound,
over seeds and several μ: what noise costs there says little of a large model, only which way each setting pulls.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from options import add_parts, open_parser, read_case

STEPS, TURNS = 3, 5
SHAPES = [("smollm2-135m", 1, 4, 64), ("smollm2-135m", 3, 4, 64), ("tiny-llama", 3, 16, 64), ("tiny-llama", 3, 32, 64)]
"""Shape, clients, documents of a step, tokens of a document."""
SEEDS = (1, 2, 3)
EPSILONS = (None, 8.0, 3.0, 1.0)
MUS = (0.0, 0.1, 1.0)


def make_private(shape: str, clients: int, documents: int, tokens: int, *, private: bool) -> tuple[Any, list[Any]]:
    """Return an adapted model and jobs of `STEPS` steps, each of all a client's documents."""
    from workload import build_adapted, make_blocks, make_jobs

    from fedloom.privacy.noise import derive_key
    from fedloom.privacy.ration import Ration, Terms

    adapted = build_adapted(shape)
    data = [make_blocks(documents, client, tokens) for client in range(clients)]
    jobs = make_jobs(adapted.read(), data, batch_size=documents, epochs=STEPS, max_gradient_norm=None)
    if private:
        terms = Terms(1.0, 1.0, documents, documents, STEPS, 1e-5)
        jobs = [replace(job, ration=Ration(terms, derive_key(b"bench", str(job.client)))) for job in jobs]
    return adapted, jobs


def show_steps() -> None:
    from fedloom.training.batched import BatchedEngine

    print("| shape | K × documents × tokens | plain | private | private / plain |\n|---|---|---|---|---|")
    for shape, clients, documents, tokens in SHAPES:
        best = {}
        made = {private: make_private(shape, clients, documents, tokens, private=private) for private in (False, True)}
        engines = {private: BatchedEngine(adapted) for private, (adapted, _) in made.items()}
        for _ in range(TURNS):
            for private, (_, jobs) in made.items():
                began = time.perf_counter()
                for _ in engines[private].train(jobs):
                    pass
                taken = (time.perf_counter() - began) / STEPS
                best[private] = min(best.get(private, taken), taken)
        print(
            f"| {shape} | {clients} × {documents} × {tokens} | {1e3 * best[False]:.0f} ms | {1e3 * best[True]:.0f} ms"
            f" | {best[True] / best[False]:.2f} |",
            flush=True,
        )


def measure_memory(shape: str, clients: int, documents: int, tokens: int) -> dict[str, float]:
    """Return the predicted and the measured bytes of one private case, in this process."""
    from workload import DEVICE, build_adapted

    from fedloom.host.machine import peak_memory, reset_peak_memory
    from fedloom.model.source import open_model
    from fedloom.recipe.training_section import Training
    from fedloom.training.batched import BatchedEngine
    from fedloom.training.memory import predict_step

    predicted = predict_step(
        lambda layers: build_adapted(shape, layers=layers),
        open_model(f"random:{shape}").num_layers,
        Training(batch_size=documents, learning_rate=1e-5),
        clients=clients,
        length=tokens,
        device=DEVICE,
        private=True,
    )
    reset_peak_memory()
    before = peak_memory()
    adapted, jobs = make_private(shape, clients, documents, tokens, private=True)
    engine = BatchedEngine(adapted)
    reset_peak_memory()
    for _ in engine.train(jobs):
        pass
    return {"predicted": predicted.peak_bytes(clients), "measured": peak_memory() - before}


def show_memory() -> None:
    print("| shape | K × documents × tokens | predicted | measured | predicted / measured |\n|---|---|---|---|---|")
    for case in [("smollm2-135m", 1, 4, 64), ("smollm2-135m", 3, 4, 128), ("smollm2-135m", 3, 16, 64)]:
        command = [sys.executable, str(Path(__file__)), "--case", *map(str, case)]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found = json.loads(line)
        print(
            f"| {case[0]} | {case[1]} × {case[2]} × {case[3]} | {found['predicted'] / 1e9:.2f} GB"
            f" | {found['measured'] / 1e9:.2f} GB | {found['predicted'] / found['measured']:.2f} |",
            flush=True,
        )


def run_once(folder: Path, epsilon: float | None, mu: float, seed: int) -> float:
    """Return by how much the central loss falls in a run."""
    from fedloom import load_recipe, run
    from fedloom.monitoring.observer import Observer

    settings = [f"seed={seed}", f"training.proximal_mu={mu}", "data.documents_per_client=230", "training.batch_size=46"]
    recipe = load_recipe("tiny-private", [*settings, "federation.rounds=4"])
    assert recipe.privacy is not None
    bound = None if epsilon is None else recipe.privacy.model_copy(update={"epsilon": epsilon, "noise": "seed"})
    finished = run(recipe.model_copy(update={"privacy": bound}), folder / f"{epsilon}-{mu}-{seed}", Observer())
    return finished.rounds[0]["central_loss"] - finished.rounds[-1]["central_loss"]


def show_utility() -> None:
    print(f"| ε (δ 1e-3) | {' | '.join(f'μ = {mu:g}' for mu in MUS)} |\n|---|{'---|' * len(MUS)}")
    with tempfile.TemporaryDirectory() as name:
        for epsilon in EPSILONS:
            cells = []
            for mu in MUS:
                fallen = [*map(partial(run_once, Path(name), epsilon, mu), SEEDS)]
                cells.append(f"{statistics.mean(fallen):.3f} ± {statistics.stdev(fallen):.3f}")
            print(f"| {epsilon or 'none'} | {' | '.join(cells)} |", flush=True)


PARTS = {"steps": show_steps, "memory": show_memory, "utility": show_utility}


def main() -> None:
    parser = open_parser(__doc__)
    add_parts(parser, PARTS)
    words = ("SHAPE", "CLIENTS", "DOCUMENTS", "TOKENS")
    parser.add_argument("--case", nargs=4, metavar=words, help="one of memory, as a JSON line")
    options = parser.parse_args()
    if options.case:
        shape, sizes = read_case(parser, options.case)
        print(json.dumps(measure_memory(shape, *sizes)))
        return
    for part in options.parts or PARTS:
        print(f"\n{part}\n")
        PARTS[part]()


if __name__ == "__main__":
    main()
