"""The command that serves an export with vLLM: its adapters by rank, or a merged model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.handover.finished_run import adapter_folder, recipe_of
from fedloom.handover.proof import TEMPLATE_FILE
from fedloom.records.card import RANKS

OPTIONS = {
    "use_dora": "DoRA",
    "modules_to_save": "layers that were trained as a whole",
    "rank_pattern": "ranks that differ from layer to layer",
    "alpha_pattern": "scales that differ from layer to layer",
    "lora_bias": "a bias in LoRA's factors",
}
"""PEFT's options -> what they make of an adapter, which vLLM refuses or gets wrong."""
MEND = "export the merged model with --merged, which vLLM serves as it is"


def read_rank(config: dict[str, Any]) -> int:
    """Return the rank that vLLM has to make room for, by an adapter's configuration.

    Raises:
        RunError: vLLM can't serve such an adapter.
    """
    told = [what for option, what in OPTIONS.items() if config.get(option)]
    if config["peft_type"] != "LORA":
        told = [f"the method {config['peft_type'].lower()}"]
    if config.get("bias", "none") != "none":
        told.append("trained biases")
    rank = next((rank for rank in RANKS if rank >= config.get("r", 0)), None)
    if rank is None:
        told.append(f"a rank of {config['r']}, above {RANKS[-1]}")
    if told or rank is None:
        raise RunError(f"vLLM can't serve an adapter with {told[0]}", where="--vllm", mend=MEND)
    return rank


def serve_command(run: Path, to: Path, *, merged: bool = False, which: str | int = "best") -> str:
    """Return what to type to serve an export of a run: the adapter over its base model, or a whole model.

    Raises:
        RunError: there is no such run or adapter, or vLLM can't serve it.
    """
    recipe, config = recipe_of(run), adapter_folder(run, which) / "adapter_config.json"
    if to.suffix.lower() == ".gguf":
        raise RunError("vLLM serves folders", where="--to", mend="leave .gguf out")
    if merged or not config.is_file():
        return shlex.join(["vllm", "serve", str(to)])
    rank = read_rank(json.loads(config.read_text(encoding="utf-8")))
    folder = Path(recipe.model.source).expanduser()
    if recipe.model.revision is None and not folder.is_dir():
        raise RunError(f"vLLM can't load {recipe.model.source}", where="--vllm", mend=MEND)
    base = [str(folder.resolve())]
    if recipe.model.revision is not None:
        base = [recipe.model.source, "--revision", recipe.model.revision]
    adapter = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{recipe.name}={to}"]
    template = ["--chat-template", str(to / TEMPLATE_FILE)] if recipe.data.is_chat else []
    return shlex.join(["vllm", "serve", *base, *adapter, *template])
