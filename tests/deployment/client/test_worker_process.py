"""Process of a worker: what it holds while nothing is asked, what it knows when it has begun anew."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from support.federation_here import wait_until
from support.tiny import make_recipe

from fedloom.deployment.client.account import LAST_SECONDS, Run
from fedloom.deployment.client.secret import read_secret, secret_path
from fedloom.deployment.client.worker_process import IDLE_SECONDS, idle_seconds, leave, take_left
from fedloom.deployment.messages import pack_recipe, unpack_facts
from fedloom.deployment.processes import Child, hand_over, private_folder
from fedloom.deployment.signing import Signer, make_signing_key
from fedloom.host.frames import Frame, ask

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="it looks at /proc")

HASTY = """\
from fedloom.deployment.client import worker_process
worker_process.LOOK_SECONDS, worker_process.IDLE_SECONDS, worker_process.IDLE_LOADS = 0.2, 0.2, 0.0
worker_process.main()
"""
"""Worker that lets its model go as soon as it can."""


class Node:
    """Worker's process, with the key that signs questions to it."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._socket, self.place = str(folder / "worker.sock"), folder / "worker.left"
        self.journal, self.log = home / "alice.journal.jsonl", home / "log"
        read_secret(secret_path(self.journal))
        data = home / "documents.jsonl"
        data.write_text("".join(json.dumps({"text": f"word{row} " * (row + 5)}) + "\n" for row in range(12)))
        signer = make_signing_key(home / "signing.key")
        self.signer = Signer(home / "signing.key")
        self._words = [f"--socket={self._socket}", "--name=alice", f"--data={data}", f"--journal={self.journal}"]
        self._words.append(f"--signer={signer}")

    def start(self) -> Child:
        self.child = Child([sys.executable, "-c", HASTY], self.log, os.environ | hand_over(self._words))
        return self.child

    def ask(self, question: Frame) -> Mapping[str, Any]:
        return ask(self._socket, question, patience_seconds=60, answer_seconds=60).manifest

    @property
    def holds_torch(self) -> bool:
        return b"libtorch" in Path(f"/proc/{self.child.pid}/maps").read_bytes()

    @property
    def megabytes(self) -> float:
        lines = Path(f"/proc/{self.child.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000

    def kinds(self) -> list[str]:
        """Kinds of the lines in its journal."""
        return [json.loads(line)["kind"] for line in self.journal.read_text().splitlines()]


@contextmanager
def started(home: Path, left: Run | None = None) -> Iterator[Node]:
    with private_folder() as folder:
        node = Node(folder, home)
        if left:
            node.place.write_text(json.dumps({"run": asdict(left), "until": left.until, "questions": None}))
        child = node.start()
        try:
            yield node
        finally:
            child.end()


def test_the_end_of_a_run_is_told_and_written_down_without_what_trains(tmp_path: Path) -> None:
    """The run ends a while after the model was let go."""
    begun = Run("test", "a" * 64, 600.0, time.monotonic() - LAST_SECONDS + 1.0, is_last=True)
    with started(tmp_path, left=begun) as node:
        wait_until(lambda: b"its last round was trained" in node.log.read_bytes(), "the end")
        # It hands its socket on to itself.
        wait_until(lambda: b"--listener=" in Path(f"/proc/{node.child.pid}/environ").read_bytes(), "it begins anew")
        assert not node.holds_torch
        assert not node.child.ended
    assert node.kinds() == ["end"]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_model_is_let_go_and_nothing_that_protects_is_forgotten(tmp_path: Path) -> None:
    recipe = make_recipe(training={"engine": "reference"}, model={"dtype": "float32"})
    question = Frame({"do": "meet", "recipe": pack_recipe(recipe), "seconds": 600.0})
    with started(tmp_path) as node:
        wait_until(lambda: node.log.exists(), "its start")
        assert not node.holds_torch
        first = node.signer.sign(question, "alice", 600)
        facts = unpack_facts(Frame(node.ask(first)))
        process = node.child.pid
        wait_until(lambda: not node.holds_torch and node.megabytes < 25, "a small process")
        # What was let through by the process that ended is refused by the next.
        assert node.ask(first) == {"name": "alice", "refused": "question"}
        wait_until(lambda: not node.holds_torch, "a small process")
        # The same run goes on, with the same documents.
        again = unpack_facts(Frame(node.ask(node.signer.sign(question, "alice", 600))))
        assert (again.documents, again.base) == (facts.documents, facts.base)
        assert (node.child.pid, node.child.ended) == (process, False)
    assert node.kinds() == ["meet", "meet"]
    assert len({json.loads(line)["task"] for line in node.journal.read_text().splitlines()}) == 1, "it counts once"


def test_what_is_left_is_taken_once(tmp_path: Path) -> None:
    """After a worker that died, the relay brings its question again."""
    place = tmp_path / "worker.left"
    account: Any = SimpleNamespace(leave=lambda: None, until=None)
    leave(account, [{"question": 5.0}, 4.0], place)
    assert take_left(place)["questions"] == [{"question": 5.0}, 4.0]
    assert take_left(place)["questions"] is None


def test_loading_again_costs_a_tenth_of_the_time_in_which_nothing_was_done() -> None:
    assert idle_seconds(1.0) == IDLE_SECONDS
    assert idle_seconds(30.0) == 300.0
