"""Try every family of models that transformers has, tiny and random, and write what was found into docs/models.md.

Each is federated in both engines and judged by plain transformers, PEFT and torch.optim (`tests/support/by_hand.py`).
`make check-models` runs it; with `FAMILIES="llama mistral"` it tries those and only shows what it finds. Exits with 1
where a number is wrong.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
from support.families import FAMILIES, NOT_TRIED
from support.family_check import Outcome, try_family
from support.plain_plots import plain_plots
from write_pages import ROOT, fill

PAGE = "docs/models.md"
HEAD = ["family", "class in transformers", "adapter on", "attention", "engine", "works", "what to know, or why refused"]


def describe_versions() -> str:
    """Say by which versions the page was written."""
    torch_version = torch.__version__.partition("+")[0]
    return f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch_version}."


def describe_families(outcomes: list[Outcome]) -> str:
    """Return what was found, as a table."""
    return "\n".join([f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), *(found.row() for found in outcomes)])


def describe_not_tried() -> str:
    """Return the families that are not tried, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in NOT_TRIED.items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    return "\n".join(
        ["| not tried | why |", "|---|---|", *(f"| {', '.join(n)} | {why} |" for why, n in reasons.items())]
    )


def main() -> int:
    """Try the families that are named, or all and write the page."""
    wanted, wrong, outcomes = sys.argv[1:] or list(FAMILIES), 0, []
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    began = time.monotonic()
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder, plain_plots():
            try:
                outcomes.append(try_family(name, Path(folder)))
                print(outcomes[-1].row(), flush=True)
            # A family that fails is named, and the others are tried.
            except Exception as error:
                wrong += 1
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    print(f"{len(outcomes)} families in {time.monotonic() - began:.0f} s, {wrong} wrong")
    if not wrong and wanted == list(FAMILIES):
        parts = {
            "versions": describe_versions(),
            "families": describe_families(outcomes),
            "not tried": describe_not_tried(),
        }
        (ROOT / PAGE).write_text(fill(PAGE, parts), encoding="utf-8")
        print(f"{PAGE} is written")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
