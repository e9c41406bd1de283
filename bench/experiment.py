"""The published experiment's whole job on made-up documents and random weights: its hours, not its losses.

    python bench/experiment.py documents FILE.jsonl [NUMBER]
    fedloom run opt350m-lora-fedprox-6k model.source=random:opt-350m data.source=FILE.jsonl data.text=text --out RUN
    python bench/experiment.py judge RUN

`judge` reads the records of a run, finished or not. One that was cut off is judged by its rounds so far, the first
left out where there are others, because things are set up in it. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any

NUMBER = 9000
"""Documents that the experiment takes: 3 × 2,000 of its clients, and 3,000 to evaluate on."""
WORDS = [f"{a}{b}{c}" for a in "abcdefgh" for b in "aeiou" for c in "klmnprst"]


def write_documents(file: Path, number: int) -> None:
    """Write documents like Python of 150 to 400 bytes, no two alike."""
    generator = random.Random(1)
    with file.open("w", encoding="utf-8") as out:
        for index in range(number):
            lines = [f"def {generator.choice(WORDS)}_{index}({', '.join(generator.sample(WORDS, 2))}):"]
            length = generator.randint(150, 400)
            while sum(map(len, lines)) < length:
                a, b, c = generator.sample(WORDS, 3)
                lines.append(f"    {a} = {b} {generator.choice('+-*/%')} {c}  # {generator.randint(0, 10**6)}")
            out.write(json.dumps({"text": "\n".join(lines)}) + "\n")


def judge(run: Path) -> dict[str, Any]:
    """Return seconds of a run's rounds, and of all of its rounds, as measured or as they would be."""
    if not (run / "status.json").exists():
        return {"run": run.name, "state": "still prepares"}
    records = run / "rounds.jsonl"
    lines = records.read_text().splitlines() if records.exists() else []
    rounds = [json.loads(line) for line in lines if line.endswith("}")]
    status, recipe = (json.loads((run / name).read_text()) for name in ("status.json", "resolved.json"))
    wanted = recipe["federation"]["rounds"]
    # Round 0 is the evaluation before training.
    zero, trained = rounds[:1], rounds[1:]
    settled = trained[1:] or trained
    phases = ("train_seconds", "evaluate_seconds", "aggregate_seconds")
    found: dict[str, Any] = {"run": run.name, "state": status["state"], "rounds": len(trained), "of": wanted}
    found |= {f"sum_{phase}": sum(record[phase] for record in rounds) for phase in phases}
    found["round_0_evaluate_seconds"] = zero[0]["evaluate_seconds"] if zero else None
    if settled:
        per_round = {phase: mean(record[phase] for record in settled) for phase in phases}
        found |= {f"{phase}_a_round": seconds for phase, seconds in per_round.items()}
        found["first_round_train_seconds"] = trained[0]["train_seconds"]
        # Records and what lies between them too: by the clock, from one round's end to the last's.
        ends = [datetime.fromisoformat(record["finished"]) for record in trained]
        between = (ends[-1] - ends[0]).total_seconds() / (len(ends) - 1) if len(ends) > 1 else sum(per_round.values())
        found["clock_seconds_a_round"] = between
        begun = (ends[-1] - datetime.fromisoformat(status["started"])).total_seconds()
        missing = wanted - len(trained)
        found |= {"clock_seconds": begun, "extrapolated": missing > 0}
        found["seconds_of_all_rounds"] = begun + missing * between
        last = trained[-1]
        found |= {name: last[name] for name in ("gpu_peak_bytes", "ram_peak_bytes", "clients_at_once") if name in last}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    documents = commands.add_parser("documents")
    documents.add_argument("file", type=Path)
    documents.add_argument("number", type=int, nargs="?", default=NUMBER)
    commands.add_parser("judge").add_argument("run", type=Path)
    options = parser.parse_args()
    if options.command == "documents":
        if options.file.suffix != ".jsonl" or not options.file.parent.is_dir():
            parser.error(f"{options.file}: name a file that ends in .jsonl, in a folder that is there")
        write_documents(options.file, options.number)
    elif options.run.is_dir():
        print(json.dumps(judge(options.run)))
    else:
        parser.error(f"{options.run}: no such run directory; name what --out of fedloom run named")


if __name__ == "__main__":
    main()
