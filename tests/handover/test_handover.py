"""What is done with an adapter afterwards: it stays the same."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.asked import write_tasks
from support.full_disk import no_file_above
from support.marks import CI, first
from support.tiny import make_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedloom import run
from fedloom.cli import app
from fedloom.errors import RunError
from fedloom.handover.evaluate import evaluate
from fedloom.handover.export import export
from fedloom.handover.generate import generate
from fedloom.handover.proof import open_subject
from fedloom.model.loading import load_model
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.records.run import Run, read_run
from fedloom.text import show_controls

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=first(["factors", "ffa"], rest=CI))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = make_recipe(federation={"rounds": 1, "lora_rule": request.param})
    return run(recipe, tmp_path_factory.mktemp("runs") / "run", Observer())


def test_an_exported_adapter_is_the_runs(finished: Run, tmp_path: Path) -> None:
    assert export(finished.folder, tmp_path / "out" / "adapter") == 0.0
    files = {path.name for path in (tmp_path / "out" / "adapter").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("recipe.toml", "recipe.toml is missing; see what else is: fedloom fsck RUN"),
        ("adapters/best", 'no adapter "best"; go on with fedloom run --resume, which writes it again'),
        ("resolved.json", "it has no resolved.json; restore it, or begin again elsewhere"),
    ],
)
def test_what_a_run_lost_is_named_where_its_adapter_is_asked_for(
    lost: str, says: str, finished: Run, tmp_path: Path
) -> None:
    """A pipe in a file's place would be waited for."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    os.mkfifo(folder / lost)
    with pytest.raises(RunError) as caught:
        export(folder, tmp_path / "out")
    assert says in str(caught.value)


def test_a_merged_model_opens_without_peft_and_says_the_same(finished: Run, tmp_path: Path) -> None:
    assert 0 < export(finished.folder, tmp_path / "merged", merged=True) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    base = load_model(open_model("random:tiny-llama"), dtype="float32", device=CPU)
    with_adapter = PeftModel.from_pretrained(base, finished.folder / "adapters" / "best").eval()
    tokens_BT = AutoTokenizer.from_pretrained(tmp_path / "merged")("def main():", return_tensors="pt")["input_ids"]
    assert torch.allclose(merged(tokens_BT).logits, with_adapter(tokens_BT).logits, atol=1e-4)


def test_what_is_not_the_same_is_not_written(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.handover.export.TOLERANCES", {"float32": 0.0})
    with pytest.raises(RunError, match="does not match the run's adapter"):
        export(finished.folder, tmp_path / "merged", merged=True)
    assert list(tmp_path.iterdir()) == []


class WrongAt(torch.nn.Module):
    """A model whose logits are others at the positions that are true."""

    def __init__(self, model: torch.nn.Module, wrong_BT: torch.Tensor) -> None:
        super().__init__()
        self.model, self.wrong_BT = model, wrong_BT

    def forward(self, **told: Any) -> Any:
        said = self.model(**told)
        said.logits = said.logits + self.wrong_BT[..., None]
        return said


def test_a_proof_looks_at_tokens_and_not_at_padding(tmp_path: Path) -> None:
    """Rounding can carry the logits of padding far away: those of quickstart-chat, so that it could not be merged."""
    lines = [json.dumps({"text": f"{number * 7919} " * (1 + number % 3)}) for number in range(40)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    recipe = make_recipe(data={"source": str(tmp_path / "short.jsonl"), "max_length": 48}, federation={"rounds": 1})
    subject = open_subject(run(recipe, tmp_path / "run", Observer()).folder, "best", Observer())
    real_BT = torch.arange(subject.tokens_BT.shape[1]) < subject.real_BT.sum(1, keepdim=True)
    assert torch.equal(subject.real_BT, real_BT)
    assert not real_BT.all()
    assert subject.prove(WrongAt(subject.adapted.model, ~real_BT), tmp_path, 0.0) == 0.0
    last = real_BT & ~real_BT.roll(-1, 1)
    with pytest.raises(RunError, match="does not match the run's adapter"):
        subject.prove(WrongAt(subject.adapted.model, last), tmp_path, 1e-3)


@pytest.mark.long
def test_a_merged_model_that_can_not_be_saved_is_one_error(tmp_path: Path) -> None:
    """Layers that stand twice share their weights, which safetensors does not write."""
    adapter = {"targets": ["q_proj"], "options": {"layer_replication": [[0, 2], [1, 2]]}}
    twice = run(make_recipe(adapter=adapter, federation={"rounds": 1}), tmp_path / "run", Observer())
    with pytest.raises(RunError, match=r"--merged: the merged model can't be saved: .*; leave it out"):
        export(twice.folder, tmp_path / "merged", merged=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_merged_model_on_a_full_disk_says_so(finished: Run, tmp_path: Path) -> None:
    with no_file_above(50_000), pytest.raises(RunError, match=r"can't be written \(File too large\); make room for it"):
        export(finished.folder, tmp_path / "merged", merged=True)
    assert not list(tmp_path.iterdir())


def test_a_target_that_exists_is_left_alone(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(RunError, match="the target exists"):
        export(finished.folder, tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.long
@pytest.mark.parametrize(
    "more", first([{"personalise": {"epochs": 2}}, {"federation": {"rounds": 1, "lora_rule": "fedsa"}}])
)
def test_a_clients_own_adapter_is_exported_and_asked(more: dict[str, Any], tmp_path: Path) -> None:
    told = {"federation": {"rounds": 1}, "training": {"learning_rate": 0.1}, **more}
    finished = run(make_recipe(**told), tmp_path / "run", Observer())

    def type_in(*words: str) -> str:
        found = CliRunner().invoke(app, [words[0], str(finished.folder), *words[1:]])
        assert found.exit_code == 0, found.output
        return found.stdout

    said = type_in("export", "--client", "1", "--to", str(tmp_path / "adapter"))
    assert "its logits lie 0.0e+00 from the run's" in said
    weights = "adapter_model.safetensors"
    own, best = finished.folder / "clients" / "1" / "adapter" / weights, finished.folder / "adapters" / "best" / weights
    assert (tmp_path / "adapter" / weights).read_bytes() == own.read_bytes() != best.read_bytes()
    assert "client 1" in (tmp_path / "adapter" / "README.md").read_text()
    said = type_in("export", "--client", "1", "--to", str(tmp_path / "merged"), "--merged", "--vllm")
    assert f"vllm serve {tmp_path / 'merged'}" in said

    asked = ("generate", "import os", "--tokens", "24")
    said = type_in(*asked, "--client", "1")
    pieces: list[str] = []
    generate(tmp_path / "run", "import os", max_new_tokens=24, which=1, say=pieces.append)
    assert said.rstrip("\n") == show_controls("".join(pieces)).rstrip("\n")
    answers = [
        [
            type_in("generate", prompt, "--tokens", "8", *more)
            for prompt in ("import os", "def f(", "#", "x = [", "a b c")
        ]
        for more in ((), ("--client", "1"))
    ]
    assert answers[0] != answers[1]
    for hand_over in (
        lambda: export(finished.folder, tmp_path / "none", which=9),
        lambda: generate(finished.folder, "", which=9),
    ):
        with pytest.raises(RunError, match=r"client 9 has no adapter of its own; clients that have one: 0 to 2$"):
            hand_over()
    assert not (tmp_path / "none").exists()


def test_an_adapter_is_known_by_the_record_of_its_round_whatever_others_are_lost(finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    rounds = folder / "rounds.jsonl"
    lines = rounds.read_text().splitlines(keepends=True)
    rounds.write_text("".join(lines[1:]))
    assert generate(folder, "a text") == generate(finished.folder, "a text")
    rounds.unlink()
    for which in ("best", "last"):
        with pytest.raises(RunError, match=rf'no round is on record that adapter "{which}" is of; see what else is'):
            generate(folder, "a text", which=which)


@pytest.mark.parametrize("which", first([0, "best"]))
def test_an_adapter_that_is_not_the_one_on_record_is_handed_to_nobody(which: str | int, tmp_path: Path) -> None:
    """Those of two clients lie in each other's folders, say, or a copy was cut short and put together again."""
    recipe = make_recipe(federation={"rounds": 1}, personalise={"epochs": 1}, training={"epochs": 8})
    folder = run(recipe, tmp_path / "run", Observer()).folder
    for name in ("adapters/best", "adapters/last") if which == "best" else ("clients/0/adapter",):
        shutil.copy(folder / "clients" / "1" / "adapter" / "adapter_model.safetensors", folder / name)
    says = r"another adapter than the one on record: it was changed or damaged; go on with fedloom run --resume"
    with pytest.raises(RunError, match=says):
        export(folder, tmp_path / "out", which=which)
    with pytest.raises(RunError, match=says):
        generate(folder, "a text", which=which)
    if which == "best":
        tasks = write_tasks(tmp_path / "asked", [{"q": "sky", "c": ["red", "blue"], "a": "red"}], {"name": "mine"})
        with pytest.raises(RunError, match=says):
            evaluate(folder, [tasks])
        shutil.copytree(folder / "clients" / "1" / "adapter", folder / "adapters" / "initial", dirs_exist_ok=True)
        with pytest.raises(RunError, match=f"initial: {says}"):
            evaluate(folder, [tasks], which=[], base=True)
        assert not read_run(folder).evaluations
    assert not (tmp_path / "out").exists()


def test_without_own_adapters_there_is_none_of_a_client(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"client 0 has no adapter of its own; personalise = \{ epochs = 1 \}, or"):
        export(finished.folder, tmp_path / "adapter", which=0)


def test_text_comes_piece_by_piece_from_both(finished: Run) -> None:
    pieces: list[str] = []
    generate(finished.folder, "import os", base=True, max_new_tokens=8, say=pieces.append)
    text = "".join(pieces)
    assert text.startswith("--- base model ---\nimport os")
    assert text.count("import os") == 2
    again: list[str] = []
    generate(finished.folder, "import os", max_new_tokens=8, say=again.append)
    assert text.endswith("".join(again))


def test_generation_is_transformers_own(finished: Run) -> None:
    pieces: list[str] = []
    generate(finished.folder, "import os", max_new_tokens=12, say=pieces.append)
    source = open_model("random:tiny-llama")
    base = load_model(source, dtype="float32", device=CPU)
    base.set_attn_implementation("sdpa")
    model = PeftModel.from_pretrained(base, finished.folder / "adapters" / "best").eval()
    inputs = source.tokenizer("import os", return_tensors="pt")["input_ids"]
    written = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False, pad_token_id=256
    )
    assert "".join(pieces).strip() == source.tokenizer.decode(written[0], skip_special_tokens=True).strip()


def test_a_prompt_is_not_ended_by_a_tokenizer_that_ends_documents(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers.processors import TemplateProcessing

    plain: list[str] = []
    generate(finished.folder, "import os", max_new_tokens=8, say=plain.append)
    ending = open_model("random:tiny-llama")
    ending.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", ending.tokenizer.eos_token_id)]
    )
    assert ending.tokenizer("import os")["input_ids"][-1] == ending.tokenizer.eos_token_id
    monkeypatch.setattr("fedloom.handover.generate.open_source", lambda *_: ending)
    found: list[str] = []
    generate(finished.folder, "import os", max_new_tokens=8, say=found.append)
    assert "".join(found) == "".join(plain)


@pytest.mark.parametrize(("prompt", "says"), [("", "the prompt is empty"), ("x" * 300, "has 300 tokens")])
def test_a_prompt_that_can_not_be_written_on(finished: Run, prompt: str, says: str) -> None:
    with pytest.raises(RunError, match=says):
        generate(finished.folder, prompt)


def test_a_card_is_what_a_hub_reads(finished: Run) -> None:
    import yaml

    text = (finished.folder / "adapters" / "best" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["library_name"] == "peft"
    assert "base_model" not in card, "random weights are on no hub"
    metrics = {metric["name"]: metric["value"] for metric in card["model-index"][0]["results"][0]["metrics"]}
    best = next(record for record in finished.rounds if record["round"] == finished.best_round)
    assert metrics["Loss on the central hold-out (nats per token)"] == best["central_loss"]
    assert f"round {best['round']} of 1" in body
    assert 'source = "random:tiny-llama"' in body
    assert "model-index" not in (finished.folder / "adapters" / "initial" / "README.md").read_text()


def test_a_card_tells_no_paths(tmp_path: Path, write_jsonl: Any) -> None:
    home = tmp_path / "ward 7: surgery"  # a colon makes no scheme of a path
    home.mkdir()
    path = write_jsonl([f"document {i}: some words and more" for i in range(40)], "patients.jsonl").rename(
        home / "patients.jsonl"
    )
    (home / "questions.jsonl").write_text('{"q": "what is said?", "a": "some words"}\n')
    tasks = home / "mine.toml"
    tasks.write_text(
        '[[task]]\nname = "mine"\nsource = "questions.jsonl"\nkind = "exact"\nprompt = "{q}"\nanswer = "{a}"\n'
    )
    recipe = make_recipe(
        data={"source": str(path)}, federation={"rounds": 1}, evaluation={"tasks": [str(tasks)], "batch_size": 4}
    )
    finished = run(recipe, tmp_path / "run", Observer())
    for name in ("initial", "best"):
        text = (finished.folder / "adapters" / name / "README.md").read_text()
        assert str(tmp_path) not in text
        assert "surgery" not in text
        assert "local: patients.jsonl" in text
        assert 'tasks = ["local: mine.toml"]' in text
        assert "AutoPeftModelForCausalLM" not in text, "there is no hub model to load"


def test_what_a_run_used_is_what_is_opened_again(finished: Run, tmp_path: Path) -> None:
    from fedloom.handover.finished_run import recipe_of

    copied = tmp_path / "run"
    copied.mkdir()
    for name in ("resolved.json", "rounds.jsonl", "clients.jsonl", "status.json", "environment.json"):
        (copied / name).write_bytes((finished.folder / name).read_bytes())
    (copied / "plan.json").write_text(json.dumps({**finished.plan, "model_revision": "a" * 40}))
    (copied / "recipe.toml").write_text((finished.folder / "recipe.toml").read_text())
    assert recipe_of(copied).model.revision == "a" * 40
    assert recipe_of(finished.folder).model.revision is None


def test_without_a_central_hold_out_the_clients_prove_it(tmp_path: Path) -> None:
    finished = run(make_recipe(data={"central_holdout": 0}, federation={"rounds": 1}), tmp_path / "run", Observer())
    assert export(finished.folder, tmp_path / "adapter") == 0.0


OTHERS = {
    "ia3": {"method": "ia3", "rank": None, "alpha": None},
    "dora": {"dora": True},
    "prompt_tuning": {"method": "prompt_tuning", "rank": None, "alpha": None, "options": {"num_virtual_tokens": 4}},
    "prefix_tuning": {"method": "prefix_tuning", "rank": None, "alpha": None, "options": {"num_virtual_tokens": 4}},
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # of PEFT, about itself
@pytest.mark.parametrize("name", first(OTHERS))
def test_other_methods_are_handed_on_and_write(name: str, tmp_path: Path) -> None:
    recipe = make_recipe(adapter=OTHERS[name], federation={"rounds": 1})
    other = run(recipe, tmp_path / "run", Observer())
    assert export(other.folder, tmp_path / "adapter") == 0.0
    if name in ("ia3", "dora"):
        assert export(other.folder, tmp_path / "merged", merged=True) < 1e-4
    else:
        with pytest.raises(RunError, match=f"PEFT can't merge {name} into"):
            export(other.folder, tmp_path / "merged", merged=True)
    pieces: list[str] = []
    generate(other.folder, "import os", base=True, max_new_tokens=6, say=pieces.append)
    assert "".join(pieces).count("import os") == 2

    source = open_model("random:tiny-llama")
    base = load_model(source, dtype="float32", device=CPU, attention="sdpa")
    model = PeftModel.from_pretrained(base, other.folder / "adapters" / "best").eval()
    tokens = source.tokenizer("import os", return_tensors="pt")["input_ids"]
    written = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, pad_token_id=256
    )
    text = source.tokenizer.decode(written[0], skip_special_tokens=True)
    assert "".join(pieces).split("--- with the adapter ---\n")[1].strip() == text.strip()
    card = (other.folder / "adapters" / "best" / "README.md").read_text()
    assert f"An adapter ({'lora, DoRA, rank 2' if name == 'dora' else name}) of random:tiny-llama" in card
