"""What every test runs under, and the fixtures that all rooms share."""

import os

# Two test workers on two cores: each keeps to one thread. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is asked of a hub, except where a test says so.
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.plain_plots import plain_plots
from support.tiny import ARCHITECTURES


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection: half a million objects, looked through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=ARCHITECTURES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def without_plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Empty plots, but for modules marked `draws`."""
    with nullcontext() if request.node.get_closest_marker("draws") else plain_plots():
        yield


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write texts, or whole rows, as a `.jsonl` file."""

    def write(rows: list[Any], name: str = "documents.jsonl") -> Path:
        path = tmp_path / name
        lines = [json.dumps(row if isinstance(row, dict) else {"text": row}) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
