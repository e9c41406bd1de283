"""A card: what was learnt from, how far its split is to be believed, and how the adapter is used."""

import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import typer
from support.marks import first
from support.tiny import make_recipe

from fedloom.cli import app
from fedloom.experiment.run import plan
from fedloom.recipe.recipe import Recipe
from fedloom.records.card import HERE, write_card

COMMIT = "a" * 40


def card_of(recipe: Recipe, *, on_a_hub: bool = False, **more: Any) -> str:
    planned = plan(recipe)
    if on_a_hub:
        planned = replace(planned, model="owner/model", model_revision=COMMIT)
    return write_card(recipe, planned, {"round": 1, "central_loss": 1.5}, **more)


def uses(card: str) -> dict[str, list[str]]:
    """The lines of code of each way to use it, by its name."""
    found = re.findall(r"^(\w+)(?:, from [^\n]*)?:\n\n```\w*\n(.*?)\n```", card, re.DOTALL | re.MULTILINE)
    return {name: [line for line in code.splitlines() if line] for name, code in found}


def test_a_card_says_how_much_was_learnt_from_and_what_its_split_is_worth() -> None:
    card, clients = card_of(make_recipe()), plan(make_recipe()).clients
    learnt, held_out = (sum(getattr(one, f"{side}_documents") for one in clients) for side in ("train", "holdout"))
    assert 0 < learnt < 24
    told = rf"^- Data: .*, {learnt} documents to train on and {6 + held_out} held out$"
    assert re.search(told, card, re.MULTILINE)
    assert re.search(
        r"^- Audit of the split, copies on two sides: .*: \d+ documents? .*from training$", card, re.MULTILINE
    )


def test_three_lines_each_for_peft_ollama_and_vllm() -> None:
    found = uses(card_of(make_recipe(adapter={"rank": 12}), on_a_hub=True))
    assert found.keys() == {"PEFT", "Ollama", "vLLM"}
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
        keep=2,
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


def test_a_trained_prompt_is_for_peft_alone() -> None:
    prompt = {"method": "prompt_tuning", "rank": None, "alpha": None, "options": {"num_virtual_tokens": 4}}
    assert uses(card_of(make_recipe(adapter=prompt), on_a_hub=True)).keys() == {"PEFT"}


def test_tasks_and_privacy_have_their_place_where_there_are_some() -> None:
    card = card_of(make_recipe(), sections={"Tasks": "| task | base | adapter |", "Privacy": "None."})
    assert card.index("\n## Tasks\n\n| task |") < card.index("\n## Privacy\n\nNone.\n") < card.index("\n## Use\n")
    assert "## Tasks" not in card_of(make_recipe())
