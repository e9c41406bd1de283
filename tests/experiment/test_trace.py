"""A newcomer's trace: from the command to the step that trains, few calls, and each one worth reading."""

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedloom.cli import app
from fedloom.training.stacked_step import StackedStep

TRACE = [
    "cli.run",
    "experiment.run.run",
    "federation.rounds.run_rounds",
    "federation.fleet.LocalFleet.train",
    "monitoring.telemetry.Telemetry.iterate",
    "training.batched.BatchedEngine.train",
    "training.batched.ClientBatch.step",
    "training.stacked_step.StackedStep.__call__",
]


def test_a_newcomers_trace_has_eight_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    step = StackedStep.__call__

    def walk(self: StackedStep, *given: Any, **named: Any) -> Any:
        def watched(frame: Any, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code is step.__code__:
                trace = []
                while frame:
                    module = str(frame.f_globals.get("__name__", ""))
                    if module.startswith("fedloom."):
                        trace.append(f"{module.removeprefix('fedloom.')}.{frame.f_code.co_qualname}")
                    frame = frame.f_back
                traces.append(trace[::-1])

        sys.setprofile(watched)
        try:
            return step(self, *given, **named)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(StackedStep, "__call__", walk)
    result = CliRunner().invoke(app, ["run", "tiny", "federation.rounds=1", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert traces
    assert all(trace == TRACE for trace in traces), traces[0]
