"""Averaging LoRA rightly: each rule's model against the dense average, on layers that are not square."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from support.marks import first
from support.tiny import make_adapted, make_blocks, make_recipe, make_update

from fedloom import run
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.files import load_adapter
from fedloom.adapters.lora import lora_pairs
from fedloom.errors import RecipeError
from fedloom.experiment.run import plan
from fedloom.federation.lora_rules import LORA_RULES, adapter_of_rank, describe_lora_rules, factored_svd, trained_part
from fedloom.model.loading import load_model
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.recipe.sections import Federation
from fedloom.records.check import check_run

TARGETS = {"tiny-llama": ["k_proj", "down_proj"], "tiny-gpt2": ["c_attn"], "tiny-opt": ["fc1", "v_proj"]}
"""Layers with more features on one side than on the other: nn.Linear, and GPT-2's Conv1D."""
EXAMPLES = (5, 1, 3)
NO_RANK: dict[str, Any] = {"rank": None, "alpha": None}
IA3 = {"method": "ia3", **NO_RANK}
PREFIX = {"method": "prefix_tuning", "options": {"num_virtual_tokens": 4}, **NO_RANK}
PATTERN = {"options": {"rank_pattern": {"q_proj": 4}}}
FULL = {"method": "full", **NO_RANK}


def make_model(shape: str, rule: str, **adapter: Any) -> AdaptedModel:
    adapter = {"targets": TARGETS[shape], "rank": 3, "alpha": 7.5, **adapter}
    return make_adapted(shape, freeze_a=rule == "ffa", residuals=rule == "fedex", **adapter)


def draw(adapter: Adapter, client: int, rule: str, round: int) -> Adapter:
    """An update that moved far, in the part that its rule trains."""
    generator = torch.Generator().manual_seed(1000 * round + client)
    moved_P = adapter.weights_P + torch.randn(adapter.layout.size, generator=generator)
    part_P = trained_part(adapter.layout, rule, round)
    return replace(adapter, weights_P=moved_P if part_P is None else torch.where(part_P, moved_P, adapter.weights_P))


@torch.no_grad()
def products(adapted: AdaptedModel, adapter: Adapter) -> dict[str, torch.Tensor]:
    """What the adapter adds to each layer, as a matrix, found by asking the layer itself."""
    adapted.load(adapter)
    added = {}
    for name, layer in adapted.model.eval().named_modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            frozen = getattr(base, "frozen", base)
            eye = torch.eye(layer.in_features, dtype=adapter.weights_P.dtype)
            added[name] = layer(eye) - frozen(eye)
    return added


def aggregate(
    rule: str, adapter: Adapter, rounds: int, adapted: AdaptedModel
) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The adapter after some rounds, and the dense average of the last round's models."""
    strategy = LORA_RULES[rule](Federation(lora_rule=rule))
    state = strategy.init(adapter)
    for round in range(1, rounds + 1):
        updates = [make_update(draw(adapter, k, rule, round), k, examples=n) for k, n in enumerate(EXAMPLES)]
        found = [products(adapted, update.adapter) for update in updates]
        dense = {
            layer: sum(n * one[layer] for n, one in zip(EXAMPLES, found, strict=True)) / sum(EXAMPLES)
            for layer in found[0]
        }
        state, adapter = strategy.update(state, adapter, iter(updates[::-1]))
    return adapter, dense


@pytest.mark.parametrize("shape", TARGETS)
@pytest.mark.parametrize(("rule", "rounds"), [("ffa", 1), ("rolora", 1), ("rolora", 2), ("fedex", 1), ("fedex", 3)])
def test_the_model_of_an_exact_rule_is_the_dense_average(shape: str, rule: str, rounds: int) -> None:
    adapted = make_model(shape, rule)
    start = adapted.read()
    start = replace(start, weights_P=torch.randn(start.layout.size, generator=torch.Generator().manual_seed(3)))
    adapter, dense = aggregate(rule, start, rounds, adapted)
    for layer, product in products(adapted, adapter).items():
        assert (product - dense[layer]).norm() < 2e-6 * dense[layer].norm(), layer


def test_averaging_the_factors_apart_is_not() -> None:
    adapted = make_model("tiny-llama", "factors")
    adapter, dense = aggregate("factors", adapted.read(), 1, adapted)
    for layer, product in products(adapted, adapter).items():
        assert (product - dense[layer]).norm() > 0.1 * dense[layer].norm(), layer


@pytest.mark.parametrize("shape", TARGETS)
def test_svd_is_the_dense_svd(shape: str) -> None:
    adapted = make_model(shape, "svd")
    adapter, dense = aggregate("svd", adapted.read(), 1, adapted)
    for layer, product in products(adapted, adapter).items():
        u, s, v = torch.linalg.svd(dense[layer].double(), full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        assert s[3] > 0.01 * s[0], "an average of a higher rank than the adapter's"
        assert (product - best).norm() < 2e-6 * best.norm(), layer


@pytest.mark.parametrize(("outer", "inner", "width"), [(7, 5, 3), (5, 7, 12), (4, 9, 6), (6, 6, 6), (3, 2, 1)])
def test_the_factored_svd_never_sees_the_product(outer: int, inner: int, width: int) -> None:
    generator = torch.Generator().manual_seed(outer)
    b_OS, a_SI = torch.randn(outer, width, generator=generator), torch.randn(width, inner, generator=generator)
    u, s, v = factored_svd(b_OS, a_SI)
    dense = torch.linalg.svdvals(b_OS.double() @ a_SI.double())
    assert torch.allclose((u * s) @ v, b_OS.double() @ a_SI.double(), atol=1e-12)
    assert torch.allclose(s[: len(dense)], dense[: len(s)], atol=1e-12)


def test_clients_of_smaller_ranks_get_the_best_of_theirs() -> None:
    adapted = make_model("tiny-llama", "svd")
    adapter, _ = aggregate("svd", adapted.read(), 1, adapted)
    whole, small = products(adapted, adapter), products(adapted, adapter_of_rank(adapter, 2))
    for layer in whole:
        u, s, v = torch.linalg.svd(whole[layer].double(), full_matrices=False)
        assert (small[layer] - (u[:, :2] * s[:2]) @ v[:2]).norm() < 1e-5 * s[0], layer


@pytest.mark.parametrize("shape", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_opens_an_adapter_with_its_residual(shape: str, rslora: bool, tmp_path: Path) -> None:
    adapted = make_model(shape, "fedex", rslora=rslora, dtype="float64")
    adapter, _ = aggregate("fedex", adapted.read(), 2, adapted)
    adapted.load(adapter)
    tokens = make_blocks(2).tokens_NT
    ours = adapted.model.eval()(input_ids=tokens).logits
    adapted.save(adapter, tmp_path / "saved")
    base = load_model(open_model(f"random:{shape}"), dtype="float64", device=torch.device("cpu"))
    opened = PeftModel.from_pretrained(base, tmp_path / "saved").eval()(input_ids=tokens).logits
    assert (ours - opened).norm() < 1e-12 * opened.norm()
    again = load_adapter(tmp_path / "saved", adapted.layout)
    assert torch.equal(again.weights_P, adapter.weights_P)
    assert again.residual is not None
    for layer, product in products(adapted, again).items():
        assert torch.allclose(product, products(adapted, adapter)[layer], atol=1e-6)


def test_the_residual_takes_no_more_ranks_than_it_has() -> None:
    adapted = make_model("tiny-llama", "fedex")
    adapter, _ = aggregate("fedex", adapted.read(), 30, adapted)
    assert adapter.residual is not None
    for layer, (a_name, b_name) in lora_pairs(adapter.layout.names).items():
        tensors = adapter.layout.split(adapter.weights_P)
        assert adapter.residual.factors[layer][1].shape[0] <= min(tensors[a_name].shape[1], tensors[b_name].shape[0])


@pytest.mark.parametrize("rule", first(LORA_RULES, keep=2))
@pytest.mark.parametrize("engine", first(["batched", "reference"]))
def test_every_rule_runs_from_a_recipe(rule: str, engine: str, tmp_path: Path) -> None:
    recipe = make_recipe(
        federation={"rounds": 2, "lora_rule": rule},
        adapter={"targets": ["down_proj"]},
        training={"engine": engine, "epochs": 2},
    )
    finished = run(recipe, tmp_path / "run", Observer())
    first, last = finished.rounds[1], finished.rounds[2]
    one_way = 3 * 4 * {"ffa": 2 * 64 * 2, "rolora": 2 * 64 * 2, "fedsa": 2 * 128 * 2}.get(rule, 2 * (128 + 64) * 2)
    assert first["bytes_up"] == one_way
    assert first["bytes_down"] == (3 * 4 * 2 * (128 + 64) * 2 if rule == "rolora" else one_way)
    assert last["bytes_up"] == {"rolora": 3 * 4 * 2 * 128 * 2}.get(rule, one_way)
    assert (last["bytes_down"] > one_way) == (rule == "fedex")
    error = last.get("lora_error")
    assert error is None if rule == "ffa" else error < 1e-7 if rule == "rolora" else error > 1e-7
    assert last["central_loss"] < finished.rounds[0]["central_loss"]


@pytest.mark.parametrize("rule", ["rolora", "fedsa", "svd"])
def test_rules_of_the_factors_alone_refuse_more(rule: str) -> None:
    recipe = make_recipe(federation={"lora_rule": rule}, adapter={"options": {"lora_bias": True, "bias": "lora_only"}})
    with pytest.raises(RecipeError, match=r"can average only LoRA's factors, and .*bias is trained too"):
        plan(recipe)


def test_a_client_is_scored_with_the_residual(tmp_path: Path) -> None:
    losses = []
    for engine in ("batched", "reference"):
        recipe = make_recipe(
            federation={"rounds": 3, "lora_rule": "fedex"},
            adapter={"targets": ["k_proj", "q_proj"], "rank": 8},
            training={"engine": engine, "learning_rate": 0.03, "epochs": 4},
            model={"dtype": "float64"},
        )
        finished = run(recipe, tmp_path / engine, Observer())
        losses.append({c["client"]: c["holdout_loss_after"] for c in finished.clients if c["round"] == 3})
        assert not [finding for finding in check_run(tmp_path / engine) if not finding.well]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_the_documents_have_every_rule() -> None:
    page = Path(__file__).parents[2] / "docs" / "strategies.md"
    assert describe_lora_rules() in page.read_text(encoding="utf-8"), "make pages"


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
def test_clients_of_different_ranks_train_and_send_their_own(engine: str, tmp_path: Path) -> None:
    recipe = make_recipe(
        federation={"rounds": 2, "lora_rule": "svd", "client_ranks": [1, 2, 4]},
        adapter={"targets": ["k_proj"], "rank": 4},
        data={"documents_per_client": 24},
        training={"engine": engine, "weight_decay": 0.1},
    )
    finished = run(recipe, tmp_path / "run", Observer())
    assert [record["bytes_up"] for record in finished.rounds[1:]] == [4 * 2 * (32 + 64) * (1 + 2 + 4)] * 2
    assert finished.rounds[2]["central_loss"] < finished.rounds[0]["central_loss"]


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"federation": {"lora_rule": "svd", "strategy": {"kind": "fedmedian"}}}, "federation.strategy"),
        ({"federation": {"lora_rule": "fedex", "strategy": {"kind": "krum"}}}, "federation.strategy"),
        ({"federation": {"lora_rule": "fedsa", "strategy": {"kind": "fedavgm"}}}, "federation.strategy"),
        ({"federation": {"lora_rule": "fedsa"}, "personalise": {"epochs": 1}}, "personalise"),
        ({"federation": {"lora_rule": "rolora", "strategy": {"kind": "fedadam"}}}, "federation.strategy"),
        ({"federation": {"lora_rule": "svd"}, "training": {"optimizer_state": "keep"}}, "training.optimizer_state"),
        ({"federation": {"lora_rule": "rolora"}, "training": {"optimizer_state": "keep"}}, "training.optimizer_state"),
        ({"federation": {"client_ranks": [1, 2, 2]}}, "federation.client_ranks"),
        ({"federation": {"client_ranks": [1, 2], "lora_rule": "svd"}}, "federation.client_ranks"),
        ({"federation": {"client_ranks": [1, 2, 3], "lora_rule": "svd"}}, "federation.client_ranks"),
        ({"federation": {"min_clients": 4}}, "federation.min_clients"),
        ({"federation": {"lora_rule": "fedex"}, "adapter": PATTERN}, "federation.lora_rule"),
        ({"federation": {"lora_rule": "ffa"}, "adapter": IA3}, "federation.lora_rule"),
        ({"federation": {"lora_rule": "svd"}, "adapter": {"dora": True}}, "federation.lora_rule"),
        ({"training": {"gradient_checkpointing": True}, "adapter": PREFIX}, "training.gradient_checkpointing"),
        ({"model": {"quantization": "4bit"}, "adapter": FULL}, "model.quantization"),
        ({"model": {"quantization": "packed"}, "adapter": {"dora": True}}, "model.quantization"),
        ({"federation": {"rounds": 1}, "training": {"proximal_schedule": "adaptive"}}, "training.proximal_schedule"),
    ],
)
def test_what_cant_be_combined_is_refused_when_the_recipe_is_made(sections: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(**sections)
    assert caught.value.where == where
    assert caught.value.mend
