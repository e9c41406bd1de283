"""A card: what was learnt from, how far its split is to be believed, and how the adapter is used."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from peft import LoraConfig, get_peft_model
from support.marks import first
from support.tiny import make_recipe, write_tiny_gguf

from fedloom.cli import app
from fedloom.evaluation.measures import share
from fedloom.experiment.building import load_base
from fedloom.experiment.run import plan
from fedloom.model.gguf_layout import ARCHITECTURES
from fedloom.model.source import gguf_arguments, open_model
from fedloom.recipe.recipe import Recipe
from fedloom.records.card import BASE, GGUF_KINDS, HERE, describe_tasks, put_tasks, without_tasks, write_card

COMMIT = "a" * 40


def card_of(recipe: Recipe, *, on_a_hub: bool = False) -> str:
    planned = plan(recipe)
    if on_a_hub:
        planned = replace(planned, model="owner/model", model_revision=COMMIT)
    return write_card(recipe, planned, {"round": 1, "central_loss": 1.5})


def uses(card: str) -> dict[str, list[str]]:
    """The lines of code of each way to use it, by its name."""
    found = re.findall(r"^(\w+)(?:, from [^\n]*)?:\n\n```\w*\n(.*?)\n```", card, re.DOTALL | re.MULTILINE)
    return {name: [line for line in code.splitlines() if line] for name, code in found}


@pytest.mark.long
def test_a_card_says_where_the_documents_were() -> None:
    recipe, planned = make_recipe(), plan(make_recipe())
    assert "3 clients, simulated: the documents lay on one machine, and were dealt out" in card_of(recipe)
    there = write_card(recipe, replace(planned, elsewhere=("a", "b", "c")), {"round": 1, "central_loss": 1.5})
    assert "3 clients, each on its own documents, which stayed where they were; only adapters travelled." in there


def test_a_card_names_no_clients_and_says_whose_documents_each_figure_is_of() -> None:
    """A loss on the server's documents stood there as one on those of "local: alice, bob: each its own"."""
    planned = replace(plan(make_recipe()), data="alice, bob: each its own", data_revision="unknown")
    figures = {"round": 1, "central_loss": 1.5, "client_loss": 1.25}
    card = write_card(make_recipe(), replace(planned, elsewhere=("alice", "bob")), figures)
    assert "alice" not in card
    assert re.search(r"^- Data: the clients' own documents, \d+ documents to train on", card, re.MULTILINE)
    results = card.split("- task:")[1:]
    assert ["server's own" in one for one in results] == ["value: 1.5" in one for one in results]
    assert any("value: 1.25" in one and "clients' own" in one for one in results)


def test_a_card_says_how_much_was_learnt_from_and_what_its_split_is_worth() -> None:
    card, clients = card_of(make_recipe()), plan(make_recipe()).clients
    learnt, held_out = (sum(getattr(one, f"{side}_documents") for one in clients) for side in ("train", "holdout"))
    assert 0 < learnt < 24
    told = rf"^- Data: .*, {learnt} documents to train on and {6 + held_out} held out$"
    assert re.search(told, card, re.MULTILINE)
    assert re.search(
        r"^- Audit of the split, copies on two sides: .*: \d+ documents? .*from training$", card, re.MULTILINE
    )


@pytest.mark.long
def test_three_lines_each_for_peft_ollama_and_vllm() -> None:
    found = uses(card_of(make_recipe(adapter={"rank": 12}), on_a_hub=True))
    assert found.keys() == {"PEFT", "Ollama", "vLLM"}
    assert re.split(", | and ", GGUF_KINDS) == [*ARCHITECTURES]
    assert all(len(lines) <= 3 for lines in found.values())
    assert found["PEFT"][1] == f'model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")'
    served = shlex.split(" ".join(line.rstrip("\\") for line in found["vLLM"]))
    assert served == [
        "vllm", "serve", "owner/model", "--revision", COMMIT, "--enable-lora", "--max-lora-rank", "16",
        "--lora-modules", f"test={HERE}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "ollama", "vllm"),
    first(
        [
            ({"adapter": {"dora": True}}, "--merged", "vllm serve merged"),
            ({"adapter": {"method": "full", "rank": None, "alpha": None}}, "my-test", f"vllm serve {HERE}"),
            ({"federation": {"lora_rule": "fedex"}}, "my-test", "vllm serve merged"),
            ({"adapter": {"rank": 600}}, "my-test", "vllm serve merged"),
        ],
    ),
)
def test_what_a_program_can_not_load_as_an_adapter_is_merged_first(
    sections: dict[str, Any], ollama: str, vllm: str
) -> None:
    found = uses(card_of(make_recipe(**sections), on_a_hub=True))
    assert found["Ollama"][0].endswith(ollama)
    assert found["vLLM"][-1] == vllm
    options = {
        option for parameter in typer.main.get_command(app).commands["export"].params for option in parameter.opts
    }
    for line in found["Ollama"] + found["vLLM"]:
        if line.startswith("fedloom export "):
            assert {word for word in line.split() if word.startswith("--")} <= options


def save_adapter(base: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Save an adapter that changes what a base says, and return both."""
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # transformers' own, of a packed file
@pytest.mark.parametrize("source", ["package:a_base/tiny.gguf", "package:a_base/unpacked", "local: tiny.gguf",
                                    "local: unpacked", "random:tiny-llama"])  # fmt: skip
def test_the_lines_for_peft_open_an_adapter_whose_base_is_on_no_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, words = tmp_path / "a_base", torch.tensor([[3, 4, 5]])
    home.mkdir()
    (home / "__init__.py").write_text("raise ImportError('it lies there, and lacks what it needs')")
    base = load_base(make_recipe(), open_model(source)) if source.startswith("random:") else None
    if base is None:
        file = write_tiny_gguf(home / "tiny.gguf", "Q8_0")
        base = transformers.AutoModelForCausalLM.from_pretrained(**gguf_arguments(file))
        base.save_pretrained(home / "unpacked")
    expected = save_adapter(base, tmp_path / "adapter")(words).logits
    monkeypatch.syspath_prepend(tmp_path)
    card = write_card(make_recipe(), replace(plan(make_recipe()), model=source, model_revision="sha256"), None)
    lines = "\n".join(uses(card)["PEFT"]).replace(HERE, str(tmp_path / "adapter"))
    found: dict[str, Any] = {}
    exec(lines.replace(BASE, str(home / ("unpacked" if source.endswith("unpacked") else ""))), found)
    assert torch.equal(found["model"](words).logits, expected)


@pytest.mark.long
def test_a_trained_prompt_is_for_peft_alone() -> None:
    prompt = {"method": "prompt_tuning", "rank": None, "alpha": None, "options": {"num_virtual_tokens": 4}}
    assert uses(card_of(make_recipe(adapter=prompt), on_a_hub=True)).keys() == {"PEFT"}


def test_tasks_have_their_place_and_are_replaced_and_taken_out_to_the_letter() -> None:
    # A recipe may say what looks like the card's own headings.
    card = card_of(make_recipe(description="a\n\n## Privacy\n\n## Tasks\n\n## Use\nb"))
    told = put_tasks(card, "| task | base | adapter |")
    assert told.index("\n\n## Tasks\n\n| task |") < told.index("\n\n## Privacy\n\n") < told.index("\n## Use\n")
    assert put_tasks(told, "others") == put_tasks(card, "others") != told
    assert without_tasks(told) == put_tasks(told, "") == card == without_tasks(card)
    earlier = card[: card.index("## Privacy")] + card[card.index("## Use") :]
    assert without_tasks(put_tasks(earlier, "words")) == earlier


def test_of_tasks_a_card_has_those_of_its_own_round_beside_the_base_and_the_baselines() -> None:
    def record(task: str, right: int, **model: Any) -> dict[str, Any]:
        measures = {"accuracy": share([1.0] * right + [0.0] * (10 - right)).to_json()}
        told = {"kind": "choice", "digest": "d", "questions": 10, "in_training": 3}
        return {**model, **told, "task": task, "measures": measures}

    records = [record("quiz", 2), record("quiz", 5, round=1), record("quiz", 7, round=2), record("more", 1, round=2)]
    records += [record("quiz", 4, baseline="local", client=client) for client in (0, 1)]
    lines = describe_tasks(records, 1).splitlines()
    assert lines[2:4] == ["| Task | Measure | base | round 1 | clients alone, on average |", "|" + " --- |" * 5]
    cells = "20.0 % (2 of 10; 5.7 to 51.0) | 50.0 % (5 of 10; 23.7 to 76.3) | 40.0 % (40.0 to 40.0) |"
    assert lines[4] == f"| quiz | accuracy | {cells}"
    assert lines[-1] == "- quiz: 10 questions, 3 of them among the documents trained on"
    assert "| more | accuracy |" in describe_tasks(records, 2)
    assert describe_tasks(records, 0) == ""
