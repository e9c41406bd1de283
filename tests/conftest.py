"""What every test runs under, and the fixtures that all rooms share."""

import os

# Two test workers on two cores: each keeps to one thread. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is asked of a hub, except where a test says so.
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.marks import CI, LONGEST, first, is_installed
from support.plain_plots import plain_plots
from support.shapes import ARCHITECTURES


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is imported out of garbage collection: half a million objects, looked through again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Leave to `make soak` what repeats in two ways at once: in CI, values change one at a time, save those of `CI`."""
    values = getattr(item, "callspec", None)
    if values and sum(mark.name == "long" and mark != CI.mark for mark in values.marks) > 1:
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)  # once what is not asked for is out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that may take longest, those that are known to take long, and those of many tests.

    A worker that comes to one of them last leaves the other without work.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(_group_of(item), []).append(item)

    def weigh(group: list[pytest.Item]) -> tuple[float, bool, int]:
        limits = [mark.args[0] for item in group for mark in item.iter_markers("timeout")]
        return max(limits, default=0.0), any(_file_of(item) in LONGEST for item in group), len(group)

    items[:] = [item for group in sorted(groups.values(), key=weigh, reverse=True) for item in group]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose oracle is missing."""
    for mark in item.iter_markers("oracles"):
        if missing := [name for name in mark.args if not is_installed(name)]:
            pytest.skip(f"{missing[0]} is not installed: make test-all, which has it in .tools/oracles")


def _group_of(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0]) if mark else _file_of(item)


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Give all tests of a file to one worker, so that what they share is made once; a group goes over several files."""
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return super()._split_scope(nodeid).partition("::")[0]

    if config.getoption("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
    return ByFile(config, log)


@pytest.fixture(params=[*first([*ARCHITECTURES][:2], rest=CI), *first([*ARCHITECTURES][2:], keep=0)])
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def left_to_itself() -> Iterator[None]:
    """Leave what a file's tests leave behind out of garbage collection too, once what of it is garbage is gone.

    After some thousands of tests each collection would look through 850,000 objects in half a second, and letting a
    model go is one.
    """
    yield
    gc.collect()
    gc.freeze()


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
