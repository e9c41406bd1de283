"""Products of adapters in the base's dtype, which a GPU has beside bfloat16; here on whatever device there is."""

from typing import Any

import pytest
import torch
from support.marks import first
from support.tape import fix_shapes
from support.tiny import (
    DEVICE,
    draw_asked,
    make_adapted,
    make_blocks,
    make_job,
    start_from,
    switch_off_dropout,
    updates_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from fedloom.adapters import rounded_product
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.rounded_product import RoundedProduct, add_products, sums_rounded, why_not_rounded
from fedloom.adapters.stacked_lora import Stack
from fedloom.evaluation.held_out import Asked, Score, evaluate, evaluate_together
from fedloom.experiment.session import Session
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.telemetry import Telemetry
from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientJob, ClientUpdate
from fedloom.training.reference import ReferenceEngine


@pytest.fixture(autouse=True)
def rounds_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have products in the base's dtype, whatever it is, on any device, and shapes as a GPU has them."""
    patched = staticmethod(lambda adapted, _: None if adapted.frozen else adapted.base.dtype)
    monkeypatch.setattr(Stack, "rounds_to", patched)
    fix_shapes(monkeypatch)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Return the dtypes of the products that are made, in order."""
    made: list[torch.dtype] = []
    apply = RoundedProduct.apply

    def watched(result: torch.Tensor, *others: Any) -> torch.Tensor:
        made.append(result.dtype)
        return apply(result, *others)

    monkeypatch.setattr(RoundedProduct, "apply", watched)
    return made


def jobs_of(start: Adapter, **changes: Any) -> list[ClientJob]:
    blocks = [make_blocks(size, 12 + 2 * client, seed=client) for client, size in enumerate((8, 5, 11))]
    how: dict[str, Any] = {"proximal_mu": 0.1, **changes}
    return [make_job(part, start, client=client, **how) for client, part in enumerate(blocks)]


def train(build: Any, adapted: AdaptedModel, jobs: list[ClientJob]) -> list[ClientUpdate]:
    return sorted(updates_of(build(adapted).train(jobs)), key=lambda update: update.report.client)


def distance(ours: list[ClientUpdate], theirs: list[ClientUpdate], start: Adapter) -> float:
    """Return how far the updates that are furthest apart are, relative to how far they moved."""
    pairs = [(our.adapter.weights_P, their.adapter.weights_P) for our, their in zip(ours, theirs, strict=True)]
    return max(float((our - their).norm() / (their - start.weights_P).norm()) for our, their in pairs)


@pytest.mark.parametrize(
    "changes",
    first([{}, {"gradient_accumulation": 2}, {"gradient_checkpointing": True}, {"clients_at_once": 2}]),
    ids=lambda changes: ",".join(changes) or "plain",
)
@pytest.mark.parametrize("dropout", first([0.2, 0.0]))
def test_without_rounding_the_updates_are_the_references(
    shape: str, changes: dict[str, Any], dropout: float, products: list[torch.dtype]
) -> None:
    adapted = make_adapted(shape, "float64", dropout=dropout, alpha=3)
    if not dropout:
        switch_off_dropout(adapted)
    start = start_from(adapted)
    jobs = jobs_of(start, **changes)
    theirs = train(ReferenceEngine, adapted, jobs)
    assert not products
    assert distance(train(BatchedEngine, adapted, jobs), theirs, start) < 1e-9
    assert {*products} == {torch.float64}


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_any_layer_can_be_adapted(targets: Any, products: list[torch.dtype]) -> None:
    adapted = make_adapted(dtype="float64", targets=targets)
    start = start_from(adapted)
    jobs = jobs_of(start)
    assert distance(train(BatchedEngine, adapted, jobs), train(ReferenceEngine, adapted, jobs), start) < 1e-9
    assert products


@pytest.mark.parametrize("shape", first(["tiny-opt", "tiny-llama"]))
def test_in_bfloat16_updates_are_as_near_to_the_truth_as_the_references(
    shape: str, products: list[torch.dtype]
) -> None:
    # With SGD: Adam makes a step of a sign that rounding decides.
    adapted, exact = (make_adapted(shape, dtype) for dtype in ("bfloat16", "float64"))
    for one in (adapted, exact):
        switch_off_dropout(one)
    with torch.no_grad():
        for mine, theirs in zip(exact.base.parameters(), adapted.base.parameters(), strict=True):
            mine.copy_(theirs)
    start = start_from(adapted)
    far = Adapter(start.layout, start.weights_P.double())
    how: dict[str, Any] = {"batch_size": 4, "epochs": 8, "optimizer": "sgd", "learning_rate": 0.3}
    truth = train(ReferenceEngine, exact, jobs_of(far, **how))
    reference = distance(train(ReferenceEngine, adapted, jobs_of(start, **how)), truth, start)
    assert 0 < distance(train(BatchedEngine, adapted, jobs_of(start, **how)), truth, start) < 1.5 * reference
    assert {*products} == {torch.bfloat16}


def test_what_is_trained_is_not_rounded() -> None:
    adapted = make_adapted(dtype="bfloat16")
    start = start_from(adapted)
    # A step of a thousandth of what bfloat16 tells apart would be none at all.
    (update, *_) = train(BatchedEngine, adapted, jobs_of(start, learning_rate=1e-8, epochs=1))
    moved_P = update.adapter.weights_P - start.weights_P
    assert update.adapter.weights_P.dtype == torch.float32
    assert (moved_P != 0).float().mean() > 0.3


def test_a_frozen_a_stays_what_it_is_in_the_model(products: list[torch.dtype]) -> None:
    adapted = make_adapted(dtype="float64", freeze_a=True)
    start = start_from(adapted)
    jobs = jobs_of(start)
    assert distance(train(BatchedEngine, adapted, jobs), train(ReferenceEngine, adapted, jobs), start) < 1e-9
    assert not products


def asked_on_a_gpu(adapted: AdaptedModel) -> list[Asked]:
    """Adapters with blocks of their own, which are scored with their padding."""
    adapted.unpads = False
    return draw_asked(adapted)


def losses(scores: list[Score]) -> torch.Tensor:
    return torch.tensor([score.loss for score in scores], dtype=torch.float64)


def test_without_rounding_scores_are_those_of_peft(shape: str, products: list[torch.dtype]) -> None:
    adapted = make_adapted(shape, "float64", dropout=0.9, alpha=3)
    asked = asked_on_a_gpu(adapted)
    theirs = [evaluate(adapted, *one, batch_size=4) for one in asked]
    assert not products
    ours = evaluate_together(adapted, asked, batch_size=4, at_once=2)
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-12, atol=0)
    assert [score.correct for score in ours] == [score.correct for score in theirs]
    assert {*products} == {torch.float64}


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-opt"])
def test_in_bfloat16_scores_are_those_of_peft_up_to_rounding(shape: str, products: list[torch.dtype]) -> None:
    adapted = make_adapted(shape, "bfloat16")
    asked = asked_on_a_gpu(adapted)
    peft = losses([evaluate(adapted, *one, batch_size=4) for one in asked])
    ours = losses(evaluate_together(adapted, asked, batch_size=4, at_once=3))
    assert 0 < (ours - peft).abs().max() < 1e-4 * peft.min()
    assert {*products} == {torch.bfloat16}


@pytest.mark.parametrize(("batched", "rounds"), [(True, True), (False, False)])
def test_a_run_scores_a_single_adapter_as_it_trains_it(
    batched: bool, rounds: bool, products: list[torch.dtype]
) -> None:
    adapted = make_adapted(dtype="bfloat16")
    with Telemetry(gpu=False) as telemetry:
        session = Session(adapted, ReferenceEngine(adapted), telemetry, Observer(), batched=batched)
        session.score(asked_on_a_gpu(adapted)[:1], batch_size=4)
    assert bool(products) is rounds


def test_a_result_that_another_layer_reads_is_not_written_over() -> None:
    # What is written over is the frozen layer's own result alone: what was given stays.
    adapted = make_adapted(dtype="float64")
    start = start_from(adapted)
    jobs = jobs_of(start)
    layer = adapted.base.get_decoder().layers[0].self_attn.q_proj.get_base_layer()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer.register_forward_hook(lambda _, given, found: seen.append((given[0], given[0].clone())))
    train(BatchedEngine, adapted, jobs)
    assert seen
    assert all(torch.equal(given, before) for given, before in seen)


def refuse(*_: Any) -> None:
    raise RuntimeError("no such product")


def add_in_bfloat16(sums_GXY: torch.Tensor, *given: Any) -> None:
    exact_GXY = sums_GXY.clone()
    add_products(exact_GXY, *given)
    sums_GXY.copy_(exact_GXY.bfloat16())


@pytest.mark.parametrize(
    ("add", "why"),
    [(add_products, ""), (refuse, "no such product"), (add_in_bfloat16, "it gives other sums")],
)
def test_a_device_is_tried_once_and_outside_of_a_trace(add: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded_product, "add_products", add)
    monkeypatch.setattr(rounded_product, "_reasons", {})
    sums_rounded.cache_clear()
    with FakeTensorMode():
        assert sums_rounded(DEVICE) is not bool(why)
    monkeypatch.setattr(rounded_product, "add_products", None)
    assert sums_rounded(DEVICE) is not bool(why)
    assert why_not_rounded(DEVICE) == why
    sums_rounded.cache_clear()


def test_people_are_told_once_that_products_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, said = make_adapted(dtype="float32"), []
    monkeypatch.setitem(rounded_product._reasons, adapted.device, "no such product")
    engine = BatchedEngine(adapted, say=lambda what, detail: said.append((what, detail)))
    for _ in range(2):
        assert len([*engine.train(jobs_of(adapted.read()))])
    assert said == [("products", "those of adapters are in float32 in place of bfloat16: no such product")]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublas")]
)
def test_a_device_without_memory_is_tried_again(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any) -> None:
        raise error

    sums_rounded.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(rounded_product, "add_products", run_out)
        with pytest.raises(RuntimeError, match=str(error)[:10]):
            sums_rounded(DEVICE)
    assert sums_rounded(DEVICE)
    sums_rounded.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pieces", [3, 12])
def test_a_gpu_adds_products_of_bfloat16_in_float32(pieces: int) -> None:
    left_MX, right_MY = (torch.randn(96, size, device="cuda").bfloat16() for size in (5, 16))
    # Views of flat gradients: each client's begins somewhere in its row.
    flat = torch.randn(pieces, 200, device="cuda")
    sums = flat[:, 7:87].view(pieces, 5, 16)
    wanted = sums.double() + 0.5 * torch.bmm(
        left_MX.double().view(pieces, -1, 5).mT, right_MY.double().view(pieces, -1, 16)
    )
    before = flat.clone()
    add_products(sums, left_MX, right_MY, 0.5)
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(flat[:, :7], before[:, :7])
    assert torch.equal(flat[:, 87:], before[:, 87:])
