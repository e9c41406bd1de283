"""Another method, rule or strategy than the recipe's: what gives way is said, and what was typed stays."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import RecipeError
from fedloom.recipe.choices import CHOICES
from fedloom.recipe.loading import list_keys, load_recipe, shipped_recipes
from fedloom.recipe.methods import METHODS
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import STRATEGY_DEFAULTS


def choose(*overrides: str, source: str | Path = "tiny") -> tuple[Recipe, list[str]]:
    said: list[str] = []
    return load_recipe(source, overrides, say=lambda what, detail: said.append(f"{what}: {detail}")), said


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(changes: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(f'name = "mine"\nmodel = {{source = "m"}}\ndata = {{source = "d"}}\n{changes}')
        return path

    return write


def test_keys_that_a_method_has_no_use_for_are_left_out_and_said() -> None:
    recipe, said = choose("adapter.method=ia3")
    assert recipe.adapter.given == {"method", "targets"}
    assert said == [
        'choice: adapter.method = "ia3" has no use for adapter.rank = 4, adapter.alpha = 8: left out',
        'choice: adapter.method = "ia3" takes what the recipe has for "lora": adapter.targets = ["q_proj", "v_proj"]',
        'choice: training.learning_rate = 0.01 is what the recipe has for "lora": name one where "ia3" wants another',
    ]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.refused])
def test_every_method_can_be_chosen_in_a_recipe_for_lora(method: str) -> None:
    assert choose(f"adapter.method={method}")[0].adapter.method == method


@pytest.mark.parametrize("kind", STRATEGY_DEFAULTS)
def test_every_strategy_can_be_chosen_in_a_recipe_for_another(kind: str) -> None:
    recipe, said = choose(f"federation.strategy.kind={kind}", "data.clients=9", source="tiny-fedavgm")
    assert recipe.federation.strategy.kind == kind
    assert bool(said) == (kind != "fedavgm")


def test_what_another_strategy_uses_too_stays_and_that_is_said(recipe: Callable[[str], Path]) -> None:
    path = recipe('federation.strategy = {kind = "fedadam", learning_rate = 0.5, tau = 1e-2, weight_by = "equal"}')
    found, said = choose("federation.strategy.kind=fedavgm", source=path)
    assert found.federation.strategy.learning_rate == 0.5
    assert found.federation.strategy.weight_by == "equal"
    assert said == [
        'choice: federation.strategy.kind = "fedavgm" has no use for federation.strategy.tau = 0.01: left out',
        'choice: federation.strategy.kind = "fedavgm" takes what the recipe has for "fedadam":'
        " federation.strategy.learning_rate = 0.5",
    ]


def test_a_rule_for_lora_gives_way_to_another_method_and_ranks_to_another_rule(
    recipe: Callable[[str], Path],
) -> None:
    path = recipe('federation = {lora_rule = "svd", client_ranks = [2, 4, 8]}\nadapter.options.use_bdlora = false')
    found, said = choose("adapter.method=full", source=path)
    assert (found.federation.lora_rule, found.federation.client_ranks) == ("factors", None)
    left = said[0]
    assert "adapter.options = " in left
    assert 'federation.lora_rule = "svd", federation.client_ranks = [2, 4, 8]: left out' in left
    found, said = choose("federation.lora_rule=ffa", source=path)
    assert found.federation.client_ranks is None
    assert said == ['choice: federation.lora_rule = "ffa" has no use for federation.client_ranks = [2, 4, 8]: left out']


def test_a_partition_and_an_optimizer_are_choices_too(recipe: Callable[[str], Path]) -> None:
    path = recipe(
        '[data.partition]\nkind = "dirichlet"\nby = "package"\nalpha = 0.5\n[training.optimizer]\nbetas = [0.9, 0.99]'
    )
    path.write_text(path.read_text().replace('data = {source = "d"}', 'data.source = "d"'))
    found, _ = choose("data.partition.kind=iid", "training.optimizer.kind=sgd", source=path)
    assert found.data.partition.alpha is None
    assert found.training.optimizer_table.betas is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["adapter.method=ia3", "adapter.rank=4"], r'override: `adapter`.*"ia3" does not use rank$'),
        (["adapter.method=ia3", "federation.lora_rule=ffa"], "federation.lora_rule"),
        (["adapter.method=full", "adapter.options.use_bdlora=false"], '"full" does not use options'),
        (["federation.strategy.kind=krum", "federation.strategy.momentum=0.5"], '"krum" does not use momentum'),
    ],
)
def test_what_was_typed_is_never_left_out(overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        choose(*overrides)


def test_what_was_typed_among_options_stays_and_the_recipes_go(recipe: Callable[[str], Path]) -> None:
    path = recipe("adapter.options = {use_bdlora = false}")
    found, said = choose("adapter.method=prompt_tuning", "adapter.options.num_virtual_tokens=8", source=path)
    assert found.adapter.options == {"num_virtual_tokens": 8}
    assert "adapter.options.use_bdlora = false: left out" in said[0]


def test_a_learning_rate_is_never_silently_another_methods(recipe: Callable[[str], Path]) -> None:
    _, said = choose("adapter.method=full", "training.learning_rate=1e-4")
    assert not any("learning_rate" in line for line in said)
    _, said = choose("adapter.method=full", source=recipe(""))
    assert said == [
        "choice: training.learning_rate = 0.0001 is the default, whatever the method: name one where"
        ' "full" wants another'
    ]


def test_nothing_gives_way_where_nothing_is_chosen_or_nobody_listens(recipe: Callable[[str], Path]) -> None:
    for name in shipped_recipes():
        assert choose("seed=1", source=name)[1] == []
    assert choose("adapter.method=lora")[1] == []
    with pytest.raises(RecipeError, match='"ia3" does not use alpha and rank'):
        load_recipe("tiny", ["adapter.method=ia3"])
    with pytest.raises(RecipeError, match='"ia3" does not use rank'):
        choose("seed=1", source=recipe('adapter = {method = "ia3", rank = 4}'))
    with pytest.raises(RecipeError, match=r"unknown key `adapter\.rnak`"):
        choose("adapter.method=ia3", source=recipe("adapter = {rnak = 4}"))


def test_every_choice_is_a_key() -> None:
    assert {choice.dotted for choice in CHOICES} <= set(list_keys())


@given(st.lists(st.sampled_from([f"{choice.dotted}=" for choice in CHOICES]), min_size=1, max_size=3), st.data())
def test_any_choice_loads_or_is_a_recipe_error(keys: list[str], data: st.DataObject) -> None:
    values = st.sampled_from(["ia3", "3", "[]", "{a=1}", "krum", "svd", "sgd", "natural", "2020-01-01", "x:y", ""])
    with suppress(RecipeError):
        choose(*(key + data.draw(values) for key in keys), source="tiny-fedavgm")
