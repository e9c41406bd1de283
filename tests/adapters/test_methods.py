"""Every method that PEFT offers: federated, saved and opened again to the bit, or refused with a reason."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_blocks, make_recipe
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from fedloom.adapters.adapter import AdaptedModel, Adapter
from fedloom.adapters.configuration import build_config
from fedloom.adapters.methods import METHODS
from fedloom.errors import FedloomError, ModelError, RecipeError
from fedloom.evaluation import evaluate
from fedloom.experiment import plan
from fedloom.federation.aggregation import STRATEGIES
from fedloom.federation.fleet import ClientBlocks, LocalFleet
from fedloom.federation.rounds import run_rounds
from fedloom.model import open_model
from fedloom.preparation import adapt, load_adapted_model, load_base
from fedloom.recipe import Recipe
from fedloom.training.reference import build_reference_engine

NEEDED: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 1},
    "boft": {"boft_block_size": 8},
    "c3a": {"block_size": 32},
    "fourierft": {"n_frequency": 50},
    "oft": {"oft_block_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "road": {"group_size": 32},
    "trainable_tokens": {"token_indices": [*range(0, 256, 4)]},
    "vblora": {"vector_length": 32, "num_vectors": 16},
    "waveft": {"n_frequency": 50},
}
"""Options without which PEFT, or a model this small, can't do."""
ALLOWED = [name for name, method in METHODS.items() if not method.refused]
EVERYWHERE = ("lora", "dora", "ia3", "vera", "prompt_tuning", "prefix_tuning")
"""Those that are tried on every architecture."""


def make(name: str, shape: str = "tiny-llama", **adapter: Any) -> Recipe:
    """A recipe with a method; `dora` is LoRA's."""
    section = {"rank": None, "alpha": None, "options": NEEDED.get(name, {}), **adapter}
    if name == "dora":
        return make(shape=shape, name="lora", dora=True, **{"rank": 4, **adapter})
    if METHODS[name].rank and "rank" not in adapter:
        section["rank"] = 4
    return make_recipe(model={"source": f"random:{shape}", "dtype": "float32"}, adapter={"method": name, **section})


def opened(recipe: Recipe) -> AdaptedModel:
    return load_adapted_model(recipe, open_model(recipe.model.source))


def federate(recipe: Recipe, adapted: AdaptedModel) -> Adapter:
    """One round of two clients; the new global adapter."""
    clients = [ClientBlocks(make_blocks(4, seed=seed), make_blocks(2, seed=seed + 7)) for seed in (1, 2)]
    engine = build_reference_engine(adapted, recipe.training, rounds=1, seed=1)

    def score(adapter: Adapter, blocks: Any) -> Any:
        return evaluate(adapted, adapter, blocks, batch_size=4)

    strategy = STRATEGIES["fedavg"](recipe.federation.strategy)
    start = adapted.read()
    *_, last = run_rounds(
        LocalFleet(clients, engine, score), strategy, lambda adapter: None, start, rounds=1, fraction=1.0, seed=1
    )
    assert last.reports[0].loss_last > 0
    assert not torch.equal(start.weights_P, last.adapter.weights_P), "nothing was learnt"
    return last.adapter


def test_the_table_has_every_method_of_peft() -> None:
    assert set(METHODS) == {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING} | {"full"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, "tiny-llama") for name in [*ALLOWED, "dora"] if name != "full"]
    + [(name, shape) for name in EVERYWHERE for shape in ("tiny-opt", "tiny-gpt2")],
)
def test_peft_opens_what_a_federation_trained_and_gives_its_logits(name: str, shape: str, tmp_path: Path) -> None:
    recipe = make(name, shape)
    adapted = opened(recipe)
    assert adapted.weights_P.dtype == torch.float32
    before = {key: value.clone() for key, value in load_base(recipe, open_model(recipe.model.source)).named_parameters()}
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
