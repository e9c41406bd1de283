"""llama.cpp as others use it: the program that npm has ready-made, asked through a script of node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / ".tools/llama-cpp/node_modules/node-llama-cpp/dist/index.js"
SCRIPT = Path(__file__).with_suffix(".mjs")
MISSING = "" if PACKAGE.is_file() and shutil.which("node") else "no llama.cpp: bash .ci/tools installs it where npm is"


@dataclass(frozen=True)
class Answer:
    """Tokens of texts, log-probabilities of what comes next behind each token, [T, V], and the likeliest words."""

    texts: list[list[int]]
    told_TV: torch.Tensor
    written: list[int]


def ask(
    model: Path,
    folder: Path,
    tokens: Sequence[int],
    adapter: Path | None = None,
    texts: Sequence[str] = (),
    room: int = 24,
) -> Answer:
    """Ask llama.cpp for a GGUF file, with an adapter or without."""
    asked = {
        "package": str(PACKAGE), "answer": str(folder / "answer.json"), "model": str(model), "texts": list(texts),
        "adapter": adapter and str(adapter), "tokens": list(tokens), "room": room,
    }  # fmt: skip
    done = subprocess.run(
        ["node", str(SCRIPT)], input=json.dumps(asked), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((folder / "answer.json").read_text())
    return Answer(told["texts"], torch.tensor(told["probabilities"]).clamp(min=1e-30).log(), told["written"])
