"""Journal of a client, read aloud; and what its commands say before anything is joined."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from fedloom.cli import app
from fedloom.deployment import keys
from fedloom.deployment.client import joining, rehearsal
from fedloom.deployment.client.first_use import confirm_server
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.client.policy import Policy, load_policy
from fedloom.deployment.client.preflight import Greeting
from fedloom.deployment.client.reading import read_aloud
from fedloom.deployment.processes import free_port
from fedloom.errors import DeploymentError


def said(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output or result.exception
    return result.output


def write(path: Path, *lines: tuple[float, dict[str, object]]) -> None:
    """Write a journal of things that were asked so many hours ago."""
    now = datetime.now(UTC)
    told = [{"when": (now - timedelta(hours=hours)).isoformat(), "task": str(n), **line}
            for n, (hours, line) in enumerate(lines)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in told))


def test_a_journal_is_read_aloud_with_what_is_left(tmp_path: Path) -> None:
    run = {"server": "fed:8443", "recipe": "diary\x1b[2J", "run": "0123456789abcdef"}
    write(
        tmp_path / "a.journal.jsonl",
        (30, {"recipe": "old", "model": "m", "round": 1, "epochs": 1, "steps": 2, "tokens": 3}),
        (3, {"kind": "meet", **run}),
        (2, {"kind": "train", **run, "round": 1, "epochs": 2, "tokens": 1234567, "outdated": True}),
        (1, {"kind": "score", **run}),
        (0.5, {"kind": "end", **run, "why": "another recipe came"}),
    )
    (tmp_path / "policy.toml").write_text("max_rounds_a_day = 1\nmax_rounds = 9\n")
    (tmp_path / "sent.kit").write_text('name = "a"\nserver = "localhost:1"\n')
    shown = said("journal", tmp_path / "sent.kit", "--policy", tmp_path / "policy.toml")
    assert "\x1b" not in shown
    head, *rows = shown.splitlines()
    assert head.split() == ["when", "(UTC)", "what", "server", "recipe", "run", "round", "epochs", "tokens"]
    assert [row.split("  ")[1].strip() for row in rows[:5]] == [
        *(
            "round",
            "documents read",
            "round: documents as before a change",
            "loss told",
            "run ended: another recipe came",
        )
    ]
    assert rows[2].split()[-3:] == ["1", "2", "1,234,567"]
    free = datetime.now(UTC) + timedelta(hours=22)
    assert f"1 of 1 rounds in the past 24 hours; the next may begin on {free:%Y-%m-%d at %H:}" in shown
    assert "1 of 20 recipes in the past 24 hours; the next may begin now" in shown
    assert "1 of 500 scores in the past 24 hours; the next may begin now" in shown
    assert rows[-1] == "1 of 9 rounds of run 0123456789abcdef"
    assert said("journal", tmp_path / "a.journal.jsonl", "--policy", tmp_path / "policy.toml") == shown


def test_a_journal_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"a.jsonl: no such journal: nothing was asked yet"):
        list(read_aloud(tmp_path / "a.jsonl", Policy()))


def test_a_policy_is_written_without_a_kit_and_never_over_a_file(tmp_path: Path) -> None:
    said("join", "--write-policy", tmp_path / "p.toml")
    assert load_policy(tmp_path / "p.toml") == Policy()
    before = (tmp_path / "p.toml").read_bytes()
    said("join", "--write-policy", tmp_path / "p.toml", code=1)
    assert (tmp_path / "p.toml").read_bytes() == before


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit whose server is not there, with its key, and documents beside it."""
    keys.init(tmp_path / "server", "localhost", free_port())
    made = keys.approve(tmp_path / "server", keys.request("alice", tmp_path), tmp_path).kit
    rows = [{"text": f"text {n}", "note": "x"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_a_preflight_says_what_would_keep_a_client_from_joining(kit: Path) -> None:
    rows = kit.parent / "rows.jsonl"
    shown = said("preflight", kit, "tiny", "--data", rows, code=1)
    bad = [line for line in shown.splitlines() if line.startswith("NO")]
    assert len(bad) == 1
    assert "server" in bad[0]
    assert "connection refused" in bad[0]
    assert "6 documents can be read" in shown
    assert "the policy allows it: random:tiny-llama, 3 rounds of 1 epoch; hold-out loss told" in shown
    assert not (kit.parent / "alice.journal.jsonl").exists(), "a rehearsal leaves nothing behind"


def test_a_preflight_of_conversations_says_which_recipe_reads_them(kit: Path) -> None:
    rows = kit.parent / "talks.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "secret words"}]}) + "\n")
    shown = said("preflight", kit, "--data", rows, code=1)
    assert "rows that a recipe with data.messages = 'messages' reads" in shown
    assert "secret" not in shown


PAIRS = """
name = "pairs"
[model]
source = "random:tiny-llama"
[data]
source = "python:functions"
prompt = "Q: {question}"
completion = "{answer}"
"""


@pytest.mark.parametrize(
    ("changes", "lines", "told"),
    [
        ("", '{"question": "q", "answer": "a"}', "6 documents can be read"),
        ("", '{"question": "q"}', "without text in column answer"),
        ('chat_template = "tokenizer"', '{"question": "q", "answer": "a"}', "conversations that the recipe reads"),
        ('chat_template = "tokenizer"', '{"text": "a text"}', "without text in column question"),
        ("[privacy]\nepsilon = 8.0\ndelta = 1e-3", '{"question": "q", "answer": "a"}', "6 documents can be read"),
        ("[privacy]\nepsilon = 8.0\ndelta = 1e-3", '{"question": "q"}', "without text in column answer"),
    ],
)
def test_a_preflight_judges_documents_by_the_columns_of_its_recipe(
    changes: str, lines: str, told: str, kit: Path
) -> None:
    """It wanted a column of texts, which such a recipe reads none of: `join` took the documents that it refused."""
    rows, recipe = kit.parent / "pairs.jsonl", kit.parent / "pairs.toml"
    rows.write_text(f"{lines}\n" * 6)
    recipe.write_text(PAIRS + changes)
    shown = said(
        "preflight", kit, recipe, "--data", rows, "--columns", "question", "--columns", "answer", code=1
    ).splitlines()
    (found,) = (line for line in shown if line[8:].startswith("documents"))
    assert told in found
    assert found.startswith("NO") == ("without text" in told)


def test_a_preflight_names_the_option_for_columns_that_a_recipe_reads(kit: Path) -> None:
    rows, recipe = kit.parent / "pairs.jsonl", kit.parent / "pairs.toml"
    rows.write_text('{"question": "q", "answer": "a"}\n' * 6)
    recipe.write_text(PAIRS)
    shown = said("preflight", kit, recipe, "--data", rows, code=1)
    _, found = shown.split("NO      documents")
    assert "if you mean to allow that, change columns (or --columns) in a policy" in found.splitlines()[1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--text", "nothing"), "no usable document"),
        (("--files", "*.txt"), "a single file and a split are read whole"),
        (("--files", "../x"), "it leads out of the folder"),
        (("--journal", "/nowhere/a.jsonl"), "can't be written"),
        (("--policy", "/nowhere/p.toml"), "can't read the policy"),
    ],
)
def test_what_a_client_would_run_into_is_found_in_a_preflight(words: tuple[str, ...], why: str, kit: Path) -> None:
    shown = said("preflight", kit, "--data", kit.parent / "rows.jsonl", *words, code=1)
    assert [line for line in shown.splitlines() if line.startswith("NO") and why in line]


def test_a_preflight_counts_documents_and_finds_a_missing_key(kit: Path) -> None:
    (kit.parent / "rows.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    (kit.parent / "alice.key").unlink()
    shown = said("preflight", kit, "--data", kit.parent / "rows.jsonl", code=1)
    assert "1 document: policy.min_documents wants 5 to train on" in shown
    assert "alice's key is not there" in shown


def test_a_preflight_that_finds_nothing_wrong_ends_with_0(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "greet_server", lambda server, ca: Greeting("", 0.0))
    shown = said("preflight", kit, "tiny", "--data", kit.parent / "rows.jsonl", code=0)
    assert not [line for line in shown.splitlines() if line.startswith("NO")]
    assert said("preflight", kit, "tiny-full", code=1).splitlines()[-2].startswith("NO      recipe")
    assert CliRunner().invoke(app, ["preflight", str(kit), "--no-such-option"]).exit_code == 2


def test_a_preflight_says_whether_the_fingerprint_is_confirmed(kit: Path) -> None:
    (line,) = (line for line in said("preflight", kit, code=1).splitlines() if "fingerprint" in line)
    assert line.startswith(
        f"ok      fingerprint       {read_kit(kit).fingerprint}, not confirmed yet: join asks for it"
    )
    confirm_server(read_kit(kit), read_kit(kit).fingerprint, None, lambda *_: None)
    assert f"{read_kit(kit).fingerprint}, confirmed" in said("preflight", kit, code=1)
    (kit.parent / "alice.known").write_text("ab" * 16)
    (line,) = (line for line in said("preflight", kit, code=1).splitlines() if line.startswith("NO      fingerprint"))
    assert "alice's key goes with another server" in line


def test_a_preflight_counts_documents_without_torch(kit: Path) -> None:
    """It took five seconds, for a library that reads no row."""
    code = (
        "import sys; from fedloom.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets', 'peft'} & {*sys.modules})"
    )
    words = ["preflight", str(kit), "tiny", "--data", str(kit.parent / "rows.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert "6 documents can be read" in done.stdout, done.stderr
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize("sent", ["alice.kit", "alice-2.kit", "new.kit"])
def test_a_journal_goes_by_the_key_whatever_a_kits_file_is_called(sent: str, kit: Path) -> None:
    """Who sends a kit names its file: a journal by that name would begin anew, and count from none."""
    journal = kit.parent / "alice.journal.jsonl"
    write(journal, (1, {"kind": "train", "recipe": "r", "round": 1}))
    kit = kit.rename(kit.parent / sent)
    assert f"{journal}: 1 of 200 rounds in the past 24 hours" in said("preflight", kit, code=1)
    assert "1 of 200 rounds in the past 24 hours" in said("journal", kit)
    given: list[Path] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(joining, "join", lambda members, say: given.append(members[0].journal))
        said("join", kit, "--data", kit.parent / "rows.jsonl", "--fingerprint", read_kit(kit).fingerprint)
    assert given == [journal]


def test_a_kit_can_not_name_a_journal_elsewhere(kit: Path) -> None:
    kit.write_text(kit.read_text().replace('"alice"', '"../alice"'))
    result = CliRunner().invoke(app, ["journal", str(kit)])
    assert isinstance(result.exception, DeploymentError)
    assert "not a name for a client" in str(result.exception)


def test_a_preflight_names_all_that_a_policy_refuses_of_a_recipe(kit: Path) -> None:
    recipe = kit.parent / "recipe.toml"
    recipe.write_text(
        'name = "x"\n[model]\nsource = "owner/name"\n[adapter]\nmethod = "full"\n[data]\nsource = "python:stdlib"\n'
        "max_length = 4\n[training]\nepochs = 99\n"
    )
    shown = said("preflight", kit, recipe, code=1)
    found = [line for line in shown.splitlines() if line.startswith("NO      recipe")]
    assert len(found) == 4, "a model of a hub is its owner's to name"
    for words in ('does not allow the method "full"', "max_length of at least 16, not 4", "20 epochs a round, not 99"):
        assert words in shown
