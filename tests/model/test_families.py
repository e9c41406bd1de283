"""Every family of models against training by hand, and against what docs/models.md says of it."""

from pathlib import Path

import pytest
from support.families import FAMILIES, NOT_TRIED, save_tiny_model, type_of
from support.family_check import make_tiny_recipe, try_family
from support.marks import first
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedloom.experiment.preparation import prepare
from fedloom.monitoring.observer import Observer

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
OFTEN = ["bloom", "olmoe"]
"""Families that `make test` tries: the one without fused attention, the other with experts, in float64."""

# Of transformers and PEFT, about the models.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", first(sorted(FAMILIES, key=lambda name: name not in OFTEN), keep=len(OFTEN), every=30))
def test_it_trains_as_by_hand_and_the_page_says_so(name: str, tmp_path: Path) -> None:
    row = try_family(name, tmp_path).row()
    assert row in PAGE, f"docs/models.md is out of date: make check-models; {row}"


def test_the_page_has_every_family_that_transformers_has() -> None:
    tried = {type_of(name) for name in FAMILIES}
    assert tried | set(NOT_TRIED) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not tried & set(NOT_TRIED)
    rows = "\n".join(PAGE)
    for name in FAMILIES:
        family, _, setting = name.partition(" ")
        assert f"| `{family}`{f', `{setting}`' if setting else ''} | `" in rows
    assert all(f"`{name}`" in rows for name in NOT_TRIED)


@pytest.mark.parametrize(("name", "notes"), [("bloom", 1), ("rwkv", 0), ("opt", 0)])
def test_a_plan_notes_slow_attention_where_there_is_attention(name: str, notes: int, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path / "model")
    recipe = make_tiny_recipe(name, tmp_path / "model")
    warnings = prepare(recipe, Observer(), predict=False).plan.warnings
    assert sum("eager, which is slower" in warning for warning in warnings) == notes
