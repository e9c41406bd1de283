"""Memory by phase, and work counted."""

import subprocess
import sys
import time

import pytest
import torch

from fedloom.monitoring.telemetry import SAMPLE_SECONDS, Telemetry, find_children, ram_bytes
from fedloom.progress import Progress


def test_memory_belongs_to_the_phase_that_held_it() -> None:
    size = 300 * 2**20
    with Telemetry() as telemetry:
        telemetry.take()
        with telemetry.phase("training"):
            held = torch.ones(size // 4)
            time.sleep(3 * SAMPLE_SECONDS)
            del held
        with telemetry.phase("evaluation"):
            time.sleep(2 * SAMPLE_SECONDS)
        peaks = telemetry.take()["ram_peak_bytes"]
    assert peaks["training"] - peaks["evaluation"] > 0.9 * size
    assert set(peaks) == {"loading", "training", "evaluation"}


def test_phases_lie_inside_each_other() -> None:
    with Telemetry() as telemetry:
        telemetry.take()
        for _ in telemetry.iterate("training", iter([1, 2])):
            with telemetry.phase("evaluation"):
                pass
        assert set(telemetry.take()["ram_peak_bytes"]) == {"loading", "training", "evaluation"}


def test_children_count() -> None:
    code = "x = bytearray(200 * 2**20); print(1, flush=True); input()"
    before = ram_bytes(find_children())
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in {process.pid for process in find_children()}
        assert ram_bytes(find_children()) - before > 190 * 2**20
    finally:
        child.communicate(b"\n")


def test_evaluated_batches_are_counted() -> None:
    telemetry = Telemetry()
    given = [Progress("evaluate", 100, 8), Progress("train", 50, 2, 1, 0), Progress("evaluate", 60, 4)]
    for progress in given:
        telemetry.watch(progress)
    taken = telemetry.take()
    assert (taken["evaluate_tokens"], taken["evaluate_samples"], taken["evaluate_steps"]) == (160, 12, 2)
    assert "evaluate_tokens" not in telemetry.take()
    assert "gpu_peak_bytes" not in taken


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_belongs_to_the_phase_that_held_it() -> None:
    with Telemetry(gpu=True) as telemetry:
        telemetry.take()
        with telemetry.phase("training"):
            torch.ones(2**26, device="cuda")
        taken = telemetry.take()
    peaks, reserved = taken["gpu_peak_bytes"], taken["gpu_reserved_bytes"]
    assert reserved["training"] >= peaks["training"]
    assert peaks["training"] >= 2**28
    assert peaks["loading"] < 2**28
