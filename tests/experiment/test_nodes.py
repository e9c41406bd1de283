"""Nodes that train some of a run's clients: here a stand-in for ssh starts them on this machine."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from support.import_file import import_file
from support.killed_runs import result_of
from support.quick_runs import make_recipe
from support.tiny import make_adapted, make_blocks, make_job, make_update

from fedloom import __version__
from fedloom.errors import FedloomError, RunError
from fedloom.experiment import cards, silence
from fedloom.experiment.cards import Card
from fedloom.experiment.clients import LocalClients
from fedloom.experiment.job_frames import (
    HEADER_BYTES,
    Found,
    Line,
    most_result_bytes,
    pack_result,
    read_word,
    unpack_result,
)
from fedloom.experiment.places import Place, choose_places, here
from fedloom.experiment.run import run
from fedloom.host.frames import HEAD, Frame, pack_head, unpack_frame
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import RoundRecord
from fedloom.training.jobs import ClientUpdate
from fedloom.training.optimizers import state_shapes

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-in before ssh, and a `fedloom` that it finds; return the file of the hosts that were asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", import_file(BENCH / "clients.py").stand_in_for_ssh(programs))
    monkeypatch.setenv("FEDLOOM_ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


def attempt(recipe: Recipe, folder: Path, nodes: Sequence[str] = (), observer: Observer | None = None) -> str:
    try:
        run(recipe, folder, observer or Observer(), resume=True, clients=LocalClients(nodes))
    except FedloomError as error:
        return str(error)
    return ""


@pytest.mark.long
def test_a_run_over_two_nodes_gives_what_one_process_gives_to_the_bit(asked: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, data={"clients": 4})
    assert attempt(recipe, tmp_path / "one") == ""
    assert attempt(recipe, tmp_path / "three", ["alpha", "me@beta.example/cpu"]) == ""
    assert result_of(tmp_path / "three") == result_of(tmp_path / "one")
    assert sorted(asked.read_text().split()) == ["alpha", "me@beta.example"]


@pytest.mark.slow
def test_a_node_that_goes_ends_the_run_in_one_line_and_it_goes_on(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, made = make_recipe(tmp_path, data={"clients": 4}), []
    start = cards.Card.__init__

    class Cutting(Observer):
        def show_round(self, record: object) -> None:
            if made and len(made) == 1:
                made[0]._process.kill()
                made.append(made[0])

    monkeypatch.setattr(cards.Card, "__init__", lambda card, *given: (start(card, *given), made.append(card))[0])
    says = attempt(recipe, tmp_path / "cut", ["alpha"], Cutting())
    assert says.startswith("--node: the process that trains on alpha/cpu was killed (signal 9); see that `ssh ")
    assert "-- alpha fedloom --version` answers; go on with --resume" in says
    assert attempt(recipe, tmp_path / "cut", ["alpha"]) == ""
    assert attempt(recipe, tmp_path / "whole") == ""
    assert result_of(tmp_path / "cut") == result_of(tmp_path / "whole")


def test_a_node_that_can_not_be_reached_is_one_line_before_any_round(asked: Path, tmp_path: Path) -> None:
    (asked.parent / "bin" / "ssh").write_text("#!/bin/sh\nexit 255\n")
    says = attempt(make_recipe(tmp_path), tmp_path / "run", ["alpha"])
    assert says.startswith("--node: the process that trains on alpha/cpu ended (status 255); see that `ssh ")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_node_whose_shell_prints_is_told_of_before_any_round(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "GRACE_SECONDS", 0.2)
    (asked.parent / "bin" / "ssh").write_text("#!/bin/sh\necho Welcome to alpha, and have a nice day\nexec sleep 60\n")
    says = attempt(make_recipe(tmp_path), tmp_path / "run", ["alpha"])
    assert says.startswith("--node: the process that trains on alpha/cpu says what fedloom does not; see that `ssh ")
    assert "-- alpha fedloom --version` answers with its one line and nothing else; go on with --resume" in says


def test_a_node_that_does_not_stop_is_ended(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run waited for it for ever, whatever was typed."""
    (asked.parent / "bin" / "ssh").write_text("#!/bin/sh\nexec sleep 600\n")
    for name in ("GRACE_SECONDS", "STOP_SECONDS"):
        monkeypatch.setattr(cards, name, 0.2)
    card = Card(Place("cpu", "alpha"), Observer())
    job = make_job(make_blocks(2), make_adapted().read(), client=3)
    card.ask([job])
    card.stop()
    assert not card.is_busy
    assert card._process.poll() is not None
    with pytest.raises(RunError, match=r"the process that trains on alpha/cpu was killed \(signal 15\)"):
        card.ask([job])


class Waits(Observer):
    """Keeps what a run says, and does something once it waits for its nodes."""

    def __init__(self, then: Callable[[], object] = bool) -> None:
        self.said: list[str] = []
        self._then = then

    def show_step(self, what: str, detail: str) -> None:
        self.said.append(f"{what}: {detail}")
        if what == "devices":
            self._then()


@pytest.mark.long
def test_a_node_that_hangs_while_it_loads_is_told_of_and_given_up(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run waited for it for ever."""
    (asked.parent / "bin" / "ssh").write_text("#!/bin/sh\nexec sleep 600\n")
    for name, seconds in {"LOOK_SECONDS": 0.05, "LATE_SECONDS": 0.1, "FIRST_SECONDS": 1.0}.items():
        monkeypatch.setattr(silence, name, seconds)
    waits = Waits()
    says = attempt(make_recipe(tmp_path), tmp_path / "run", ["alpha"], waits)
    assert says.startswith(
        "--node: the process that trains on alpha/cpu said nothing for 0:01: it was given up; see th"
    )
    assert says.endswith("-- alpha fedloom --version` answers; go on with --resume, without it if it hangs again")
    assert [line for line in waits.said if line.startswith("late")] == [
        "late: alpha/cpu has said nothing for 0:00; given up after 0:01"
    ]


def test_one_ctrl_c_ends_a_run_that_waits_for_a_node(asked: Path, tmp_path: Path) -> None:
    """It took two: the first waited for the end of a step that never came."""
    (asked.parent / "bin" / "ssh").write_text("#!/bin/sh\nexec sleep 600\n")
    press = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        attempt(make_recipe(tmp_path), tmp_path / "run", ["alpha"], Waits(press.start))
    press.join()
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["by itself", "by one Ctrl-C"])
def test_a_node_that_hangs_in_a_round_is_given_up_and_the_run_goes_on(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    recipe, made = make_recipe(tmp_path, data={"clients": 4}), []
    start = cards.Card.__init__

    class Stopping(Observer):
        def show_round(self, record: RoundRecord) -> None:
            if len(made) == 1 and record["round"] == 1:  # its pace is known
                (node,) = psutil.Process(made[0].pid).children() or [psutil.Process(made[0].pid)]
                node.suspend()
                made.append(node)
                if ends == "by one Ctrl-C":
                    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT)).start()
                else:
                    monkeypatch.setattr(silence, "LONGEST_SECONDS", 0.5)
                    monkeypatch.setattr(silence, "LONGEST_TIMES", 0)

    monkeypatch.setattr(cards.Card, "__init__", lambda card, *given: (start(card, *given), made.append(card))[0])
    if ends == "by itself":
        says = attempt(recipe, tmp_path / "cut", ["alpha"], Stopping())
        assert says.startswith("--node: the process that trains on alpha/cpu said nothing for 0:0")
        assert " at most before: it was given up; see that `ssh " in says
    else:
        with pytest.raises(KeyboardInterrupt):
            attempt(recipe, tmp_path / "cut", ["alpha"], Stopping())
    with suppress(psutil.NoSuchProcess):  # on another machine it would be there still
        made[1].kill()
    monkeypatch.undo()
    assert attempt(recipe, tmp_path / "cut") == ""
    assert attempt(recipe, tmp_path / "whole") == ""
    assert result_of(tmp_path / "cut") == result_of(tmp_path / "whole")


JOB = make_job(make_blocks(2), make_adapted().read(), client=3, optimizer_state="keep")
WEIGHTS_P = JOB.adapter.weights_P
STATE = {"step": torch.tensor(2.0), "exp_avg": WEIGHTS_P * 0, "exp_avg_sq": WEIGHTS_P * 0 + 1}


def said(**told: object) -> Frame:
    """A result of the job, with something else in it."""
    update = make_update(JOB.adapter, 3, examples=2, tokens=9)
    report = replace(update.report, steps=JOB.training.steps_of(2))
    good = pack_result(replace(update, report=report, optimizer_state=STATE))
    return Frame({**good.manifest, **told}, good.payload)


def reported(**told: object) -> Frame:
    return said(report={**said().manifest["report"], **told})


def with_weights(weights_P: torch.Tensor) -> Frame:
    return with_state(weights_P, STATE)


def with_state(weights_P: torch.Tensor, state: Mapping[str, torch.Tensor], **more: torch.Tensor) -> Frame:
    named = {"adapter/weights_P": weights_P, **{f"state/{name}": value for name, value in state.items()}, **more}
    return Frame(said().manifest, safetensors.torch.save(named))


FAILED = {"what": "no", "round": 1, "client": 3, "step": None, "stage": "", "mend": ""}


@pytest.mark.parametrize(
    "frame",
    [
        Frame({}),
        Frame({"do": ["result"]}),
        Frame({"do": "ready", "base": ""}),
        Frame({"do": "done", "lowered_to": None}),
        Frame({"do": "say", "what": "x"}),
        Frame({"do": "progress"}),
        Frame({"do": "progress", "row": ["train", "many", 1, 1, 1]}),
        Frame({"do": "progress", "row": ["x", 1, 1, 1, 1]}),
        Frame({"do": "progress", "row": ["train", 1]}),
        said(client=4),
        said(client=[3]),
        said(trial=1),
        said(report=None),
        said(report={}),
        reported(client=4),
        reported(steps="x" * 9),
        reported(steps=1),
        reported(round=2),
        reported(examples=1),
        reported(examples=10**6),
        reported(tokens=10**9),
        reported(tokens=0),
        reported(proximal_mu=0.5),
        reported(loss_mean=math.nan),
        reported(loss_first=None, loss_last=None, loss_mean=None),
        reported(drift=math.inf),
        reported(seconds=-1.0),
        reported(evaluate_seconds=9.0),
        reported(holdout_loss_after=0.001),
        said(error=None),
        said(error={**FAILED, "more": 1}, short=False),
        said(error={**FAILED, "what": ["x"]}, short=False),
        said(error=FAILED),
        said(error={**FAILED, "client": 4}, short=False),
        said(error={**FAILED, "round": 2**70}, short=False),
        Frame({"do": "progress", "row": ["train", -1, 1, 1, 1]}),
        Frame({"do": "progress", "row": ["train", 1, 2**60, 1, 1]}),
        with_weights(WEIGHTS_P * math.nan),
        with_state(WEIGHTS_P, {}),
        with_state(WEIGHTS_P, {**STATE, "more": torch.ones(1)}),
        with_state(WEIGHTS_P, {**STATE, "exp_avg": STATE["exp_avg"][1:].clone()}),
        with_state(WEIGHTS_P, {**STATE, "exp_avg": STATE["exp_avg"].double()}),
        with_state(WEIGHTS_P, {**STATE, "step": torch.ones(1)}),
        with_state(WEIGHTS_P, STATE, other=torch.ones(1)),
        with_weights(WEIGHTS_P[:-1]),
        with_weights(WEIGHTS_P.double()),
        with_weights(WEIGHTS_P[None]),
        Frame(said().manifest, b""),
        Frame(said().manifest, b"\xff" * 100),
        Frame(said().manifest, safetensors.torch.save({"weights": WEIGHTS_P})),
    ],
)
def test_what_a_node_can_not_say_is_no_word_of_it(frame: Frame) -> None:
    jobs = {(0, 3): JOB}
    with pytest.raises(ConnectionError, match="not a word of fedloom's"):
        read_word(frame, jobs)
    assert jobs, "it still owes the result"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adafactor"])
@pytest.mark.parametrize("keeps", ["reset", "keep"])
def test_no_result_is_longer_than_a_node_may_send(optimizer: str, keeps: str) -> None:
    how: dict[str, Any] = {"optimizer": optimizer, "optimizer_state": keeps}
    job = make_job(make_blocks(2), make_adapted().read(), client=3, **how)
    shapes = state_shapes(job.training, job.adapter.layout)
    update = replace(make_update(job.adapter, 3), optimizer_state={name: torch.ones(shapes[name]) for name in shapes})
    length = len(pack_result(update).payload)
    assert length <= most_result_bytes([job, JOB]) < length + len(shapes) * HEADER_BYTES + 10 * WEIGHTS_P.nbytes


@pytest.mark.parametrize("trains", [True, False])
def test_a_node_that_claims_to_send_more_than_a_result_is_not_listened_to(
    asked: Path, monkeypatch: pytest.MonkeyPatch, trains: bool
) -> None:
    (asked.parent / "told").write_bytes(HEAD.pack(2, 2**24 if trains else 1) + b"{}")
    (asked.parent / "bin" / "ssh").write_text(f"#!/bin/sh\ncat {asked.parent}/told\nexec sleep 600\n")
    monkeypatch.setattr(cards, "GRACE_SECONDS", 0.2)
    card = Card(Place("cpu", "alpha"), Observer())
    if trains:
        card.ask([JOB])
    with pytest.raises(RunError, match="alpha/cpu says what fedloom does not"):
        card.hear() if trains else card.check("")
    card.close()


def test_a_node_answers_once_and_for_its_own_clients() -> None:
    jobs = {(0, 3): JOB}
    assert isinstance(told := read_word(said(), jobs), Found)
    assert isinstance(found := unpack_result(told.frame, JOB), ClientUpdate)
    assert torch.equal(found.adapter.weights_P, make_update(JOB.adapter, 3).adapter.weights_P)
    with pytest.raises(ConnectionError):
        read_word(said(), jobs)
    assert found.optimizer_state.keys() == STATE.keys()
    for lowered in (0, 2**40):
        with pytest.raises(ConnectionError):
            read_word(Frame({"do": "done", "lowered_to": lowered}), jobs)
    assert read_word(Frame({"do": "done", "lowered_to": 2}), jobs) == (2,)


def test_what_a_node_says_to_people_reaches_them_as_text() -> None:
    line = read_word(Frame({"do": "say", "what": "x", "detail": "\x1b[2J" + "y" * 10**6}), {})
    assert isinstance(line, Line)
    assert line.detail.startswith("\\x1b[2Jyyy")
    assert len(line.detail) < 3000
    failed = read_word(said(error={**FAILED, "what": "\x1b[2J"}, short=True), {(0, 3): JOB})
    assert isinstance(failed, Found)
    assert "\x1b" not in str(unpack_result(failed.frame, JOB).error)  # type: ignore[union-attr]


SPEAKS = """\
import sys
from fedloom.experiment import card_process

class Line(card_process.Line):
    def serve(self):
        print("a library prints")
        told = card_process.receive_frame(self._connection).manifest
        self.tell("failed", why=told["version"])

card_process.Line = Line if "--print" in sys.argv else card_process.Line
card_process.serve_streams()
"""


def speak(frame: Frame, *words: str) -> tuple[Frame, str]:
    """Have a node read a frame and the end of its input; return its first answer, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", SPEAKS, *words], input=pack_head(frame) + frame.payload, capture_output=True, timeout=300
    )
    size = HEAD.size + sum(HEAD.unpack_from(done.stdout))
    answer = unpack_frame(done.stdout[:size])
    assert answer, done
    assert len(done.stdout) == size, "and nothing else"
    return answer, done.stderr.decode()


@pytest.mark.slow
def test_what_is_printed_on_a_node_is_no_part_of_what_it_says() -> None:
    answer, printed = speak(Frame({"version": "7"}), "--print")
    assert answer.manifest == {"do": "failed", "why": "7"}
    assert "a library prints" in printed


@pytest.mark.long
def test_a_node_with_another_version_is_refused() -> None:
    answer, _ = speak(Frame({"version": "0.0.0", "recipe": {}, "engine": "reference", "threads": 0}))
    assert answer.manifest == {"do": "failed", "why": f"it has fedloom {__version__}, and the run has 0.0.0"}


def test_nodes_are_read_as_they_are_typed() -> None:
    assert choose_places(None, CPU, ()) == ()
    assert choose_places(["cpu", "cpu"], CPU, ()) == (Place("cpu"), Place("cpu"))
    assert choose_places(None, CPU, ["alpha"]) == (Place("cpu"), Place("cpu", "alpha"))
    assert choose_places(["cpu", "cpu"], CPU, ["me@b-1.example"])[2:] == (Place("cpu", "me@b-1.example"),)
    assert choose_places(None, GPU, ["a", "a/cuda:1"])[1:] == (Place("cuda:0", "a"), Place("cuda:1", "a"))
    assert here(choose_places(None, GPU, ["a"])) == [GPU]


@pytest.mark.parametrize("name", ["", "-oProxyCommand=x", "a b", "a;b", "a/tpu", "a/", "@a", "a@-b", "a\n"])
def test_what_is_no_node_is_refused_before_anything_is_started(name: str) -> None:
    with pytest.raises(RunError, match="is no node; name one as HOST, or HOST/cuda:1"):
        choose_places(None, CPU, [name])


def test_a_node_of_another_kind_is_refused() -> None:
    with pytest.raises(RunError, match="a/cuda:1 is of another kind than cpu, which the run itself is on"):
        choose_places(None, CPU, ["a/cuda:1"])
