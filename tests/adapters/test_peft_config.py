"""Every method that PEFT offers: federated, saved and opened again to the bit, or refused with a reason."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.marks import first
from support.tiny import PEFT_NEEDS, make_blocks, make_recipe, make_scorer, run_of

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.peft_config import build_config
from fedloom.data.tokens import ClientBlocks
from fedloom.errors import ModelError, RecipeError
from fedloom.experiment.building import adapt, build_shape, load_adapted_model, load_base
from fedloom.experiment.run import plan
from fedloom.federation.aggregation import STRATEGIES
from fedloom.federation.fleet import LocalFleet
from fedloom.federation.rounds import run_rounds
from fedloom.model.source import open_model
from fedloom.recipe.methods import METHODS
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import Federation
from fedloom.training.reference import ReferenceEngine

ALLOWED = [name for name, method in METHODS.items() if not method.refused]
EVERYWHERE = ("lora", "dora", "ia3", "vera", "prompt_tuning", "prefix_tuning")
"""Those that are tried on every architecture."""


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "everywhere": {"targets": "all-linear"},
    "with a head": {"options": {"modules_to_save": ["lm_head"]}},
    "with biases": {"options": {"lora_bias": True}},
    "from a gaussian": {"options": {"init_lora_weights": "gaussian"}},
    "with ranks": {"options": {"rank_pattern": {"v_proj": 2}, "layers_to_transform": [1], "init_lora_weights": False}},
    "with tokens": {"options": {"trainable_token_indices": [*range(0, 256, 4)]}},
}
"""LoRA's."""


def make(name: str, shape: str = "tiny-llama", **adapter: Any) -> Recipe:
    """A recipe with a method, or a variant of LoRA."""
    if name in VARIANTS:
        return make("lora", shape, **{**VARIANTS[name], **adapter})
    section = {"rank": None, "alpha": None, "options": PEFT_NEEDS.get(name, {}), **adapter}
    if METHODS[name].rank and "rank" not in adapter:
        section["rank"] = 4
    return make_recipe(model={"source": f"random:{shape}", "dtype": "float32"}, adapter={"method": name, **section})


def in_bfloat16(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})


def opened(recipe: Recipe) -> AdaptedModel:
    return load_adapted_model(recipe, open_model(recipe.model.source))


def federate(recipe: Recipe, adapted: AdaptedModel) -> Adapter:
    """One round of two clients; the new global adapter."""
    clients = [ClientBlocks(make_blocks(4, seed=seed), make_blocks(2, seed=seed + 7)) for seed in (1, 2)]
    engine = ReferenceEngine(adapted).train

    strategy = STRATEGIES["fedavg"](recipe.federation.strategy)
    start = adapted.read()
    fleet = LocalFleet(clients, engine, make_scorer(adapted))
    one_round = recipe.model_copy(update={"federation": Federation(rounds=1)})
    *_, last = run_rounds(run_of(one_round, fleet, strategy, lambda adapter: None, start), fleet)
    assert last.reports[0].loss_last > 0
    assert not torch.equal(start.weights_P, last.adapter.weights_P), "nothing was learnt"
    return last.adapter


def test_the_table_has_every_method_of_peft() -> None:
    assert set(METHODS) == {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} | {"full"}


@pytest.mark.parametrize(
    ("name", "shape"),
    first([(name, "tiny-llama") for name in [*VARIANTS, *ALLOWED] if name != "full"], keep=6, every=2)
    + first([(name, shape) for name in EVERYWHERE for shape in ("tiny-opt", "tiny-gpt2")], keep=2),
)
def test_peft_opens_what_a_federation_trained_and_gives_its_logits(name: str, shape: str, tmp_path: Path) -> None:
    recipe = make(name, shape)
    adapted = opened(recipe)
    assert adapted.weights_P.dtype == torch.float32
    before = {
        key: value.clone() for key, value in load_base(recipe, open_model(recipe.model.source)).named_parameters()
    }
    trained = federate(recipe, adapted)
    # Far from where it started, so that a part that is not saved would show.
    noise_P = torch.randn(adapted.layout.size, generator=torch.Generator().manual_seed(0))
    trained = Adapter(adapted.layout, trained.weights_P + 0.05 * noise_P)
    adapted.load(trained)
    adapted.save(trained, tmp_path / "adapter")
    assert torch.equal(adapted.open(tmp_path / "adapter").weights_P, trained.weights_P)

    tokens_BT = make_blocks(3).tokens_NT
    with torch.random.fork_rng(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.manual_seed(123)
        base = load_base(recipe, open_model(recipe.model.source))
        assert all(torch.equal(value, before[key]) for key, value in base.named_parameters())
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not [warning for warning in said if "adapter keys" in str(warning.message)]
    with torch.inference_mode():
        ours = adapted.model.eval()(input_ids=tokens_BT, use_cache=False).logits
        assert torch.equal(theirs(input_ids=tokens_BT, use_cache=False).logits, ours)
        assert torch.equal(adapted.logits(tokens_BT), ours[:, -tokens_BT.shape[1] :])
    again = opened(recipe)
    again.load(trained)
    with torch.inference_mode():
        assert torch.equal(again.model.eval()(input_ids=tokens_BT, use_cache=False).logits, ours), "on another client"


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.refused])
def test_a_refused_method_says_why(name: str) -> None:
    with pytest.raises(ValueError, match=rf'method "{name}" is refused: \w'):
        make_recipe(adapter={"method": name, "rank": None, "alpha": None})


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"method": "ia3", "rank": 4}, '"ia3" does not use rank'),
        ({"method": "ia3", "rank": None, "dora": True}, '"ia3" does not use dora'),
        ({"method": "full", "rank": None, "targets": ["q_proj"]}, '"full" does not use targets'),
        ({"method": "full", "rank": None, "options": {"r": 4}}, '"full" does not use options'),
        ({"options": {"r": 4}}, "options.r can't be set here: use adapter.rank"),
        ({"options": {"use_dora": True}}, "options.use_dora can't be set here: use adapter.dora"),
        ({"options": {"task_type": "CAUSAL_LM"}}, "options.task_type is set by fedloom"),
        ({"method": "vera", "options": {"projection_prng_key": 1}}, "projection_prng_key is set by fedloom"),
        ({"options": {"eva_config": {}}}, "eva_config is for a variant"),
        ({"options": {"init_lora_weights": "pissa_niter_4"}}, "changes the base model that everybody shares"),
        ({"options": {"init_lora_weights": "olora"}}, "changes the base model"),
        ({"options": {"init_lora_weights": "loftq"}}, "changes the base model"),
        ({"options": {"init_lora_weights": "eva"}}, "computed from documents"),
        ({"options": {"init_lora_weights": "corda"}}, "computed from documents"),
        ({"options": {"init_lora_weights": "lora_ga"}}, "computed from gradients"),
        ({"options": {"init_lora_weights": "zeros"}}, "choose one of: true, false, gaussian, orthogonal"),
    ],
)
def test_a_choice_that_can_not_be_is_refused_at_load(adapter: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_recipe(adapter={"alpha": None, **adapter})


@pytest.mark.parametrize(
    ("recipe", "says"),
    first([
        (make("vera", options={"d_initail": 0.2}), r'no option "d_initail"; did you mean `d_initial`'),
        (make("lora", options={"lora_bias": True, "init_lora_weights": "gaussian"}), "PEFT refuses.*lora_bias"),
        (make("prompt_tuning", options={}), r"prompt_tuning needs a number of virtual tokens.*num_virtual_tokens"),
        (make("ia3", targets=["q_projj"]), r'no layer "q_projj".*k_proj'),
        (make("ln_tuning", "tiny-opt"), r"can't put ln_tuning on this model: Please specify"),
        (make("hra", "tiny-gpt2"), r"can't put hra on this model.*Conv1D"),
        (make("adaption_prompt", "tiny-opt"), "Unsupported model type"),
        (make("osf", "tiny-gpt2"), "nothing of this model would be trained"),
        (make("prefix_tuning", options={"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8}),
         "but not save it"),
        (make("vblora", options={**PEFT_NEEDS["vblora"], "save_only_topk_weights": True}), "but not save it"),
        (make("prompt_tuning", options={"num_virtual_tokens": 250}), r"32 tokens after a prompt of 250.*at most 6"),
        (in_bfloat16(make("full")), "model.dtype: .* would be trained in bfloat16.*1e-5"),
        (in_bfloat16(make("ln_tuning")), "layernorm.* would be trained in bfloat16"),
        (in_bfloat16(make("with a head")), "lm_head.* would be trained in bfloat16"),
        (make_recipe(model={"quantization": "4bit"}), "no weights to pack as 4bit|4bit weights need bitsandbytes"),
        (make_recipe(model={"quantization": "packed"}), "only a .gguf file has packed weights"),
    ], keep=6),
)  # fmt: skip
def test_a_combination_that_can_not_be_is_refused_before_weights_are_loaded(recipe: Recipe, says: str) -> None:
    with pytest.raises((RecipeError, ModelError), match=says):
        plan(recipe)


@pytest.mark.parametrize("name", first(ALLOWED, keep=12))
def test_what_is_trained_is_counted_without_the_weights(name: str) -> None:
    recipe = make(name)
    adapted, shape = opened(recipe), build_shape(recipe, open_model(recipe.model.source), "float32")
    assert shape.layout == adapted.layout
    assert shape.num_parameters == adapted.num_parameters


@pytest.mark.parametrize("name", first((name for name in ALLOWED if not METHODS[name].float32_base), keep=3))
def test_over_a_bfloat16_base_float32_is_trained(name: str, tmp_path: Path) -> None:
    recipe = in_bfloat16(make(name))
    adapted = opened(recipe)
    assert adapted.weights_P.dtype == torch.float32
    trained = federate(recipe, adapted)
    adapted.load(trained)
    adapted.save(trained, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(load_base(recipe, open_model(recipe.model.source)), tmp_path / "adapter")
    tokens_BT = make_blocks(3).tokens_NT
    with torch.inference_mode():
        ours = adapted.model.eval()(input_ids=tokens_BT, use_cache=False).logits
        assert torch.equal(theirs.eval()(input_ids=tokens_BT, use_cache=False).logits, ours)


@pytest.mark.parametrize("name", ["vera", "pvera", "randlora", "shira", "tinylora", "unilora", "fourierft"])
def test_what_is_random_and_not_trained_comes_from_the_recipes_seed(name: str) -> None:
    recipe = make(name)
    first, again = opened(recipe), opened(recipe)
    other = adapt(load_base(recipe, open_model(recipe.model.source)), recipe.model_copy(update={"seed": 8}),
        open_model(recipe.model.source))  # fmt: skip
    weights_P = torch.randn(first.layout.size, generator=torch.Generator().manual_seed(0))
    logits = []
    for adapted in (first, again, other):
        adapted.load(Adapter(adapted.layout, weights_P))
        with torch.inference_mode():
            adapted.model.eval()
            logits.append(adapted.logits(make_blocks(2).tokens_NT))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning", "adaption_prompt"])
def test_a_prompt_keeps_a_token_from_seeing_those_to_its_right(name: str) -> None:
    adapted = opened(make(name))
    adapted.load(federate(make(name), adapted))
    tokens_BT = make_blocks(2).tokens_NT
    changed_BT = tokens_BT.clone()
    changed_BT[:, 9:] = 7
    with torch.inference_mode():
        adapted.model.eval()
        ours, theirs = adapted.logits(tokens_BT), adapted.logits(changed_BT)
    torch.testing.assert_close(ours[:, :9], theirs[:, :9])
    assert not torch.allclose(ours[:, 9:], theirs[:, 9:])


@pytest.mark.parametrize(
    ("name", "adapter", "fields"),
    [
        ("vera", {"rank": 3, "dropout": 0.25}, {"r": 3, "vera_dropout": 0.25}),
        ("loha", {"rank": 3, "alpha": 5}, {"r": 3, "alpha": 5}),
        ("randlora", {"rank": 3, "alpha": 5}, {"r": 3, "randlora_alpha": 5}),
        ("lora", {"rank": 3, "options": {"bias": "all"}}, {"r": 3, "lora_alpha": 32, "bias": "all"}),
        ("vera", {"rank": None}, {"r": 256}),
    ],
)
def test_the_recipes_keys_are_pefts_fields(name: str, adapter: dict[str, Any], fields: dict[str, Any]) -> None:
    recipe = make(name, **adapter)
    config = build_config(recipe.adapter, load_base(recipe, open_model(recipe.model.source)))
    assert {field: getattr(config, field) for field in fields} == fields
