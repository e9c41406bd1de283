"""Stand-ins of the benchmarks: they speak as clients of this version do, or what is measured is something else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from support.import_file import import_file

from fedloom.deployment.messages import unpack_facts
from fedloom.deployment.processes import Child, hand_over, private_folder
from fedloom.deployment.signing import Signer, make_signing_key
from fedloom.host.frames import Frame, ask

BENCH = Path(__file__).parents[2] / "bench" / "deployment.py"


def test_an_echo_reads_signed_questions_and_tells_the_facts_of_a_client(tmp_path: Path) -> None:
    facts, key = tmp_path / "facts.json", tmp_path / "signing.key"
    facts.write_text(json.dumps(import_file(BENCH).make_facts("alice")))
    words = ["--name=alice", f"--signer={make_signing_key(key)}"]
    signer = Signer(key)
    with private_folder() as folder:
        path = str(folder / "worker.sock")
        command = [sys.executable, str(BENCH), "--echo", str(facts)]
        child = Child(command, tmp_path / "log", os.environ | hand_over([*words, f"--socket={path}"]))

        def answer(do: str) -> Frame:
            asked = signer.sign(Frame({"do": do}, b"numbers"), "alice", 60.0)
            return ask(path, asked, patience_seconds=60, answer_seconds=60)

        try:
            assert unpack_facts(answer("meet")).name == "alice"
            assert answer("train").payload == b"numbers"
            assert answer("evaluate").payload == b""
        finally:
            child.end()


@pytest.mark.slow
def test_a_round_of_made_answers_is_taken() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--memory", "2"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["clients"] == 2
