"""Base models that bitsandbytes packs, in the engine that trains many clients at once; on a processor here."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from support.marks import first
from support.quick_runs import attempt
from support.small_models import write_small_model
from support.tiny import make_blocks, make_job, make_recipe, updates_of
from transformers import AutoModelForCausalLM

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.peft_config import build_config
from fedloom.adapters.stacked_lora import Stack
from fedloom.evaluation.held_out import evaluate, evaluate_together
from fedloom.experiment.building import build_shape, load_adapted_model, open_source
from fedloom.experiment.preparation import prepare
from fedloom.model.loading import quantized
from fedloom.model.packed_shape import count_bytes_of_4
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import read_run
from fedloom.training.batched import BatchedEngine, ClientBatch
from fedloom.training.engines import choose_engine
from fedloom.training.memory import LiveBytes, trace_step
from fedloom.training.reference import ReferenceEngine

needs_bits = pytest.mark.oracles("bitsandbytes")
CPU, LENGTH = torch.device("cpu"), 32
PACKINGS = [("4bit", {"compute_dtype": "float32"}), ("8bit", None), ("4bit", {"type": "fp4", "double": False})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


def recipe_of(folder: Path, quantization: str | None, options: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    model = {"source": str(folder), "dtype": "float32", "quantization": quantization, "quantization_options": options}
    return make_recipe(**{"model": model, "adapter": {"targets": ["q_proj", "v_proj"]}, **sections})


def load(recipe: Recipe) -> AdaptedModel:
    return load_adapted_model(recipe, open_source(recipe))


@needs_bits
@pytest.mark.parametrize(("quantization", "options"), first(PACKINGS, keep=2))
def test_engines_agree_over_packed_weights(folder: Path, quantization: str, options: dict[str, Any] | None) -> None:
    adapted = load(recipe_of(folder, quantization, options))
    start, found = adapted.read(), {}
    for build in (ReferenceEngine, BatchedEngine):
        jobs = [
            make_job(make_blocks(6 + client, LENGTH, seed=client), start, client=client, proximal_mu=0.1)
            for client in range(3)
        ]
        found[build] = {update.client: update for update in updates_of(build(adapted).train(jobs))}
    for client, plain in found[ReferenceEngine].items():
        change_P = plain.adapter.weights_P - start.weights_P
        apart_P = found[BatchedEngine][client].adapter.weights_P - plain.adapter.weights_P
        # In bfloat16, what an adapter adds is rounded at another place.
        exact = quantization == "8bit" or (options or {}).get("compute_dtype") == "float32"
        assert apart_P.norm() / change_P.norm() < (1e-4 if exact else 5e-2)
        assert change_P.norm() > 0.01


@needs_bits
@pytest.mark.parametrize(("quantization", "options"), PACKINGS)
def test_scores_are_those_of_plain_transformers_one_document_after_another(
    folder: Path, quantization: str, options: dict[str, Any] | None
) -> None:
    recipe = recipe_of(folder, quantization, options)
    adapted, asked, expected = load(recipe), [], []
    start = adapted.read()
    told = quantized(quantization, CPU, recipe.model.quantization_options)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **told)
    # For evaluation, bitsandbytes packs 4 bits anew on some processors, and rounds what 8 bits are multiplied with.
    # There is no dropout here.
    plain = get_peft_model(plain, build_config(recipe.adapter, plain)).train(quantization == "4bit")
    for client in range(3):
        noise_P = torch.randn(start.layout.size, generator=torch.Generator().manual_seed(client))
        adapter = replace(start, weights_P=start.weights_P + 0.1 * noise_P)
        blocks = make_blocks(5 + client, LENGTH, seed=client)
        set_peft_model_state_dict(plain, start.layout.split(adapter.weights_P.clone()))
        texts = [tokens_T[None, :length] for tokens_T, length in zip(blocks.tokens_NT, blocks.lengths_N, strict=True)]
        losses = [
            (len(text_1T[0]) - 1) * float(plain(input_ids=text_1T, labels=text_1T).loss.detach()) for text_1T in texts
        ]
        asked.append((adapter, blocks))
        expected.append(sum(losses))
    alone = [evaluate(adapted, *one, batch_size=3) for one in asked]
    for found in (alone, evaluate_together(adapted, asked, batch_size=4, at_once=3)):
        assert [score.loss_sum for score in found] == pytest.approx(expected, rel=1e-5)


@needs_bits
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_run_over_packed_weights_trains_all_clients_at_once(quantization: str, folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, quantization, training={"learning_rate": 1e-2})
    assert attempt(recipe, tmp_path / "whole") == ""
    whole = read_run(tmp_path / "whole")
    assert whole.plan["engine"] == "batched"
    losses = [record["central_loss"] for record in whole.rounds]
    assert losses[-1] != losses[0]
    assert attempt(recipe, tmp_path / "broken", "state.manifest=enospc@2")
    assert attempt(recipe, tmp_path / "broken") == ""
    assert [record["central_loss"] for record in read_run(tmp_path / "broken").rounds] == losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "options"), PACKINGS)
@needs_bits
def test_the_trace_is_what_a_step_over_packed_weights_has_alive(
    folder: Path, quantization: str, options: dict[str, Any] | None, dtype: str
) -> None:
    recipe = recipe_of(folder, quantization, options)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    adapted, source = load(recipe), open_source(recipe)
    blocks = make_blocks(2, LENGTH)
    full = type(blocks)(blocks.tokens_NT, torch.full((2,), LENGTH), torch.ones(2, LENGTH, dtype=torch.bool))
    start, stack = adapted.read(), Stack(adapted)
    jobs = [make_job(full, start, client=client, batch_size=2, epochs=2) for client in range(2)]
    crew = ClientBatch(adapted, stack, jobs)
    for job in jobs:
        crew.admit(job)
    crew.step()  # what bitsandbytes keeps from its first step on is no step's
    held = [*adapted.model.parameters(), *adapted.model.buffers(), *packed_beside(adapted), start.weights_P]
    with LiveBytes(held) as live:
        crew.step()
    shape = build_shape(recipe, source, dtype, packed=True)
    traced = trace_step(shape, jobs[0].training, 2, LENGTH, CPU)
    # The step's own buffers were there before the measured step.
    buffers = 2 * 5 * adapted.layout.size * 4
    assert live.peak == pytest.approx(traced - buffers, rel=0.15)


def packed_beside(adapted: AdaptedModel) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside its weights: scales, and scales of those."""
    found = []
    for layer in adapted.base.modules():
        if is_bits(layer):
            four = getattr(layer.weight, "quant_state", None)
            eight = getattr(layer, "state", None)
            held = [four and four.absmax, four and four.state2 and four.state2.absmax]
            held += [layer.weight.SCB if eight.SCB is None else eight.SCB] if eight else []
            found += [one for one in held if one is not None]
    return found


@needs_bits
@pytest.mark.parametrize(("quantization", "options"), PACKINGS)
def test_packed_layers_are_counted_as_they_lie_in_memory(
    folder: Path, quantization: str, options: dict[str, Any] | None
) -> None:
    recipe = recipe_of(folder, quantization, options)
    adapted = load(recipe)
    shape = build_shape(recipe, open_source(recipe), "float32", packed=True)
    real, counted = (
        sum(value.numel() * value.element_size() for value in {*each.model.parameters()}) for each in (adapted, shape)
    )
    assert counted == real + sum(value.numel() * value.element_size() for value in packed_beside(adapted))


@pytest.mark.parametrize(("double", "share"), [(True, 0.516), (False, 0.5625)])
def test_four_bits_take_half_a_byte_and_their_scales(double: bool, share: float) -> None:
    assert count_bytes_of_4(4096 * 4096, double) / 4096**2 == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(("quantization", "bytes_of_one"), [("4bit", 0.516), ("8bit", 1.0)])
def test_a_prediction_knows_that_layers_are_packed(folder: Path, quantization: str, bytes_of_one: float) -> None:
    recipe = recipe_of(folder, quantization)
    source = open_source(recipe)
    whole, packed = (build_shape(recipe, source, "bfloat16", packed=answer) for answer in (False, True))
    layers = [value.numel() for name, value in whole.base.named_parameters() if is_packed(name)]
    spared, total = (
        sum(value.numel() * value.element_size() for name, value in shape.base.named_parameters()
            if not is_packed(name) or shape is packed)
        for shape in (whole, packed)
    )  # fmt: skip
    assert total - spared == pytest.approx(bytes_of_one * sum(layers), rel=0.06)


def is_packed(name: str) -> bool:
    return "_proj" in name and "lora" not in name


def test_packed_bases_are_for_all_clients_in_one_pass(folder: Path) -> None:
    for quantization in ("4bit", "8bit"):
        recipe = recipe_of(folder, quantization)
        shape = build_shape(recipe, open_source(recipe), "bfloat16")
        assert choose_engine(recipe.adapter, recipe.training, recipe.model, shape) == "batched"


@needs_bits
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_no_sequence_of_a_batch_decides_over_another(folder: Path, quantization: str) -> None:
    adapted = load(recipe_of(folder, quantization, {"compute_dtype": "float32"} if quantization == "4bit" else None))
    tokens_BT = torch.randint(0, 500, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # The last one's embeddings are those of outliers, which LLM.int8 finds over the whole batch.
        embedding = adapted.base.get_input_embeddings().weight
        embedding[511] = 40 * embedding[511]
        tokens_BT[3] = 511
        together_BTV, alone_BTV = adapted.logits(tokens_BT)[:3], adapted.logits(tokens_BT[:3])
    assert torch.allclose(together_BTV, alone_BTV, atol=1e-4)


@needs_bits
def test_a_layer_that_was_evaluated_can_still_be_trained_through(folder: Path) -> None:
    adapted = load(recipe_of(folder, "4bit", {"compute_dtype": "float32"}))
    layers = [layer for layer in adapted.base.modules() if type(layer).__name__ == "Linear4bit" and is_bits(layer)]
    adapted.base.eval()
    with torch.no_grad():
        adapted.logits(torch.arange(8)[None])
    for layer in layers:
        x = torch.randn(2, layer.in_features, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@needs_bits
def test_nothing_is_shown_of_a_kernel_of_4_bits_that_is_missing() -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes asks for that kernel on processors with AVX512-BF16 alone")
    code = "import fedloom.experiment.run, sys; assert 'bitsandbytes.backends.cpu.ops' in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("", "")


def is_bits(layer: torch.nn.Module) -> bool:
    return type(layer).__module__.startswith("bitsandbytes")


@needs_bits
def test_a_plan_has_the_memory_of_packed_weights(folder: Path) -> None:
    peaks = {}
    for quantization in (None, "4bit"):
        plan = prepare(recipe_of(folder, quantization), Observer()).plan
        assert plan.peak_bytes is not None
        peaks[quantization] = plan.peak_bytes
    assert peaks["4bit"] < peaks[None]
