"""Memory that runs out while clients train: fewer at once, and what comes of it is what would have come."""

import json
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.little_memory import assert_same, keep_limits, train_in_little
from support.marks import CI, first
from support.tiny import make_adapted, make_blocks, make_job, make_recipe, updates_of

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import TrainingError
from fedloom.experiment.run import run
from fedloom.host import failpoints
from fedloom.model.shortage import is_shortage
from fedloom.monitoring.observer import Observer
from fedloom.records.run import RoundRecord
from fedloom.training.batched import BatchedEngine, ClientBatch
from fedloom.training.jobs import ClientFailure, ClientJob
from fedloom.training.reference import ReferenceEngine
from fedloom.training.stacked_step import StackedStep

PROCESSORS = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
)
SHORTAGES: dict[str, Callable[[], Exception]] = {
    "a GPU's": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "a processor's": lambda: RuntimeError(PROCESSORS),
    "Python's": MemoryError,
}


def make_jobs(adapted: AdaptedModel, count: int = 7) -> list[ClientJob]:
    """Clients of several sizes, so that they finish apart and others take their place."""
    start = adapted.read()
    blocks = [make_blocks(3 + 2 * (client % 3), seed=client) for client in range(count)]
    kept = {"optimizer_state": "keep", "batch_size": 2, "clients_at_once": 5, "proximal_mu": 0.1}
    return [make_job(blocks[client], start, client=client, **kept) for client in range(count)]


def fail_with_more_than(at_most: int, kind: str, monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
    """Steps of more clients fail, at their very end, once so many have not."""
    right, steps = StackedStep.__call__, [0]

    def step(self: StackedStep, *args: Any, **named: Any) -> Any:
        facts = right(self, *args, **named)
        steps[0] += 1
        if steps[0] > after and self._count > at_most:
            raise SHORTAGES[kind]()
        return facts

    monkeypatch.setattr(StackedStep, "__call__", step)


@pytest.mark.parametrize("after", first([1, 0, 4]))
@pytest.mark.parametrize(("at_most", "told"), first([(1, [2, 1]), (2, [2]), (4, [2])]))
@pytest.mark.parametrize("kind", first(SHORTAGES, rest=CI))
def test_fewer_at_once_come_to_the_same(
    kind: str, at_most: int, told: list[int], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make_adapted(dtype="float64")
    jobs = make_jobs(adapted)
    expected = list(updates_of(ReferenceEngine(adapted).train(jobs)))
    lowered: list[int] = []
    engine = BatchedEngine(adapted, say=keep_limits(lowered))
    fail_with_more_than(at_most, kind, monkeypatch, after=after)
    assert_same(list(updates_of(engine.train(jobs))), expected)
    assert lowered == told
    assert_same(list(updates_of(engine.train(jobs))), expected)
    assert lowered == told, "the next round begins with as many as there was memory for"


def test_each_clients_dropout_is_what_it_would_have_been(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted(dtype="float64", dropout=0.2)
    jobs = make_jobs(adapted)
    expected = list(updates_of(BatchedEngine(adapted).train(jobs)))
    fail_with_more_than(2, "Python's", monkeypatch, after=3)
    assert_same(list(updates_of(BatchedEngine(adapted).train(jobs))), expected)


@pytest.mark.parametrize("build", [BatchedEngine, ReferenceEngine])
def test_too_little_for_one_client_says_what_to_lower(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    fail_with_more_than(0, "a processor's", monkeypatch)
    monkeypatch.setattr(AdaptedModel, "logits", lambda self, tokens, mask: torch.empty(2**50))
    says = (
        r"round 1, client 0, training: .*single client.*training\.batch_size \(2\) or data\.max_length \(16\), or set"
    )
    first, *others = list(build(adapted).train(make_jobs(adapted)))
    assert isinstance(first, ClientFailure)
    assert re.search(says, str(first.error))
    assert all(isinstance(other, ClientFailure) for other in others)


def test_other_errors_are_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    monkeypatch.setitem(SHORTAGES, "other", lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    fail_with_more_than(0, "other", monkeypatch)
    with pytest.raises(RuntimeError, match="mat1"):
        list(BatchedEngine(adapted).train(make_jobs(adapted)))
    assert not is_shortage(ValueError("can't allocate memory"))


@pytest.mark.long
def test_a_process_that_may_not_have_more_memory_trains_fewer_at_once() -> None:
    """No fault made up: the kernel refuses."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        lowered = process.submit(train_in_little, 48).result()
    print(f"16 clients at once, then {lowered}")
    assert lowered
    assert lowered == [16 // 2 ** (number + 1) for number in range(len(lowered))]


class Said(Observer):
    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []

    def show_step(self, what: str, detail: str) -> None:
        self.steps.append((what, detail))


@pytest.mark.long
def test_a_run_says_it_and_puts_it_on_record(tmp_path: Path) -> None:
    recipe = make_recipe(data={"clients": 4}, training={"engine": "batched"})
    whole = run(recipe, tmp_path / "whole", Observer())
    display = Said()
    failpoints.arm("training.stepped=memory@2")
    try:
        found = run(recipe, tmp_path / "run", display)
    finally:
        failpoints.arm("")
    assert found.status["state"] == "done"
    assert found.status["clients_at_once"] == 2
    assert [record.get("clients_at_once") for record in found.rounds] == [None, 2, None]
    assert any(what == "memory" and "2 at once from now on" in detail for what, detail in display.steps)
    assert "Memory was not enough in round 1: 2 clients at once from then on." in (
        (tmp_path / "run" / "report.md").read_text()
    )
    for mine, its in zip(found.rounds, whole.rounds, strict=True):
        assert mine["central_loss"] == pytest.approx(its["central_loss"], rel=1e-5)
        assert mine["train_tokens"] == its["train_tokens"]
    assert len(found.clients) == len(whole.clients)


class StopsAfter(Said):
    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def show_round(self, record: RoundRecord) -> None:
        if record["round"] == self.last:
            raise KeyboardInterrupt


@pytest.mark.long
def test_a_run_that_goes_on_says_that_it_trains_fewer_than_its_plan(tmp_path: Path) -> None:
    recipe = make_recipe(data={"clients": 4}, training={"engine": "batched"})
    failpoints.arm("training.stepped=memory@2")
    try:
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "run", StopsAfter(2))
    finally:
        failpoints.arm("")
    display = Said()
    found = run(recipe, tmp_path / "run", display, resume=True)
    assert found.plan["clients_at_once"] == 4
    assert ("memory", "2 clients at once, as before it was stopped") in display.steps
    quiet = Said()
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "as planned", StopsAfter(1))
    run(recipe, tmp_path / "as planned", quiet, resume=True)
    assert not [detail for what, detail in quiet.steps if what == "memory"]


def test_a_run_with_too_little_for_one_client_fails_and_keeps_what_was_complete(tmp_path: Path) -> None:
    recipe = make_recipe(training={"engine": "reference"})
    failpoints.arm("training.stepped=memory@12")
    try:
        with pytest.raises(TrainingError, match=r"round 2, client \d, training: there is not enough memory"):
            run(recipe, tmp_path / "run", Observer())
    finally:
        failpoints.arm("")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "training.batch_size" in status["error"]
    assert run(recipe, tmp_path / "run", Observer(), resume=True).status["state"] == "done"


def test_an_engine_that_takes_the_step_again_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: as if nothing of a step were done before it fails."""
    adapted = make_adapted(dtype="float64", dropout=0.2)
    jobs = make_jobs(adapted)
    expected = list(updates_of(BatchedEngine(adapted).train(jobs)))
    fail_with_more_than(2, "Python's", monkeypatch, after=3)
    right, failed = ClientBatch.step, [0]

    def step(self: ClientBatch) -> Any:
        try:
            return right(self)
        except MemoryError:
            failed[0] += 1
            with monkeypatch.context() as patch:
                patch.setattr(StackedStep, "__call__", ORIGINAL)
                return right(self)

    monkeypatch.setattr(ClientBatch, "step", step)
    found = list(updates_of(BatchedEngine(adapted).train(jobs)))
    assert failed[0]
    with pytest.raises(AssertionError):
        assert_same(found, expected)


ORIGINAL = StackedStep.__call__
