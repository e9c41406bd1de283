"""Tiny real things that tests share: no mocks."""

import os

# Two test workers on two cores: each keeps to one thread. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is asked of a hub, except where a test says so.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.adapters.adapter import AdaptedModel
from fedloom.adapters.configuration import build_config
from fedloom.data.tokens import TokenBlocks
from fedloom.model import load_model, open_model
from fedloom.recipe import Recipe

ARCHITECTURES = {
    "tiny-opt": ("q_proj", "v_proj"),
    "tiny-llama": ("q_proj", "v_proj"),
    "tiny-gpt2": ("c_attn",),
}
"""Shapes that every architecture test covers, with the layers that their adapters sit on."""


@pytest.fixture(params=ARCHITECTURES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_recipe(**sections: Any) -> Recipe:
    """The recipe of most tests: seconds long; sections given replace its keys; an adapter's None leaves one out."""
    values: dict[str, Any] = {
        "name": "test",
        "seed": 7,
        "model": {"source": "random:tiny-llama"},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {
            "source": "python:stdlib",
            "max_length": 32,
            "clients": 3,
            "documents_per_client": 8,
            "client_holdout": 0.25,
            "central_holdout": 6,
        },
        "training": {"batch_size": 2, "learning_rate": 1e-2, "proximal_mu": 0.1},
        "federation": {"rounds": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    values["adapter"] = {key: value for key, value in values["adapter"].items() if value is not None}
    return Recipe.model_validate(values)


def make_adapted(
    shape: str = "tiny-llama",
    dtype: str = "float32",
    seed: int = 7,
    *,
    freeze_a: bool = False,
    device: str = "cpu",
    **adapter: Any,
) -> AdaptedModel:
    """A random two-layer model with a LoRA adapter."""
    base = load_model(open_model(f"random:{shape}"), dtype=dtype, device=torch.device(device), seed=seed)
    section = make_recipe(adapter={"rank": 2, "targets": ARCHITECTURES[shape], **adapter}).adapter
    return AdaptedModel(base, build_config(section, base), seed, freeze_a=freeze_a)


def make_blocks(num_blocks: int = 8, max_length: int = 16, seed: int = 0) -> TokenBlocks:
    """Learnable blocks of several lengths: each counts upwards from a random byte."""
    generator = torch.Generator().manual_seed(seed)
    start_N1 = torch.randint(0, 200, (num_blocks, 1), generator=generator)
    tokens_NT = start_N1 + torch.arange(max_length)
    lengths_N = torch.randint(max_length // 2, max_length + 1, (num_blocks,), generator=generator)
    tokens_NT = tokens_NT.masked_fill(torch.arange(max_length) >= lengths_N[:, None], 0)
    return TokenBlocks(tokens_NT, lengths_N, counted_N=lengths_N)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write texts, or whole rows, as a `.jsonl` file."""
    import json

    def write(rows: list[Any], name: str = "documents.jsonl") -> Path:
        path = tmp_path / name
        lines = [json.dumps(row if isinstance(row, dict) else {"text": row}) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
