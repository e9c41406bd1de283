"""Policy of a client: what its owner allows, and what is refused."""

from pathlib import Path

import pytest
from support.tiny import make_recipe

from fedloom.deployment.client.policy import Policy, check_policy, load_policy
from fedloom.errors import RecipeError


def test_without_a_policy_everything_is_allowed() -> None:
    check_policy(Policy(), make_recipe())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('models = ["another"]', "does not allow the base model"),
        ("max_epochs = 1", "allows 1 epochs a round, not 2"),
        ("max_rounds = 1", "allows 1 rounds, not 2"),
    ],
)
def test_what_is_not_allowed_is_refused_with_the_reason(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(RecipeError, match=why):
        check_policy(load_policy(tmp_path / "policy.toml"), make_recipe(training={"epochs": 2}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("max_epoch = 1", "unknown key `max_epoch`; did you mean `max_epochs`"),
        ("max_epochs = 0", "max_epochs"),
        ("max_rounds_a_day = 0", "max_rounds_a_day"),
        ("=", "not valid TOML"),
    ],
)
def test_a_policy_that_is_none_is_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(RecipeError, match=why):
        load_policy(tmp_path / "policy.toml")
