"""How many clients fit, and what a step of theirs needs: predicted without memory, against a step that is run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import CI, first
from support.shapes import ARCHITECTURES
from support.tiny import make_adapted, make_blocks, make_job, make_recipe

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.peft_config import build_config
from fedloom.adapters.stacked_lora import Stack
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import ModelError
from fedloom.evaluation.held_out import evaluate, evaluate_together
from fedloom.experiment.preparation import check
from fedloom.model import attention
from fedloom.model.loading import build_meta_model
from fedloom.model.source import open_model
from fedloom.training import client_slots, memory
from fedloom.training.batched import ClientBatch
from fedloom.training.memory import (
    CERTAIN_TIMES,
    HELD_BY_ALLOCATOR,
    ROWS_HELD,
    SHARE_OF_FREE,
    LiveBytes,
    StepMemory,
    count_roughly,
    free_bytes,
    leaves_no_doubt,
    predict_step,
    trace_scoring,
    trace_step,
)
from fedloom.training.stretches import STRETCH

CPU = torch.device("cpu")
LENGTH = 32


@pytest.fixture(params=first(ARCHITECTURES))
def shape(request: pytest.FixtureRequest) -> str:
    """A shape each; a trace takes a second."""
    return str(request.param)


def build(
    shape: str, layers: int = 2, dtype: str = "float32", attention: str | None = None, **adapter: Any
) -> AdaptedModel:
    base = build_meta_model(open_model(f"random:{shape}"), layers=layers, dtype=dtype, attention=attention)
    section = make_recipe(adapter={"rank": 2, "targets": ARCHITECTURES[shape], **adapter}).adapter
    return AdaptedModel(base, build_config(section, base), 7)


@pytest.mark.parametrize("dtype", first(["float32", "bfloat16"], rest=CI))
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("masked", first([False, True]))
def test_the_trace_is_what_a_real_step_has_alive(shape: str, dtype: str, clients: int, masked: bool) -> None:
    training = make_recipe(training={"batch_size": 2, "max_gradient_norm": 1.0}).training
    attention = "sdpa" if masked else None
    adapted = make_adapted(shape, dtype, dropout=0.1, attention=attention)
    blocks = make_blocks(2, LENGTH)
    real = LENGTH - 5 if masked else LENGTH
    full = type(blocks)(blocks.tokens_NT, torch.full((2,), real), torch.ones(2, LENGTH, dtype=torch.bool))
    start = adapted.read()
    with LiveBytes([*adapted.model.parameters(), *adapted.model.buffers(), start.weights_P]) as live:
        jobs = [
            make_job(full, start, client=client, batch_size=2, max_gradient_norm=1.0, epochs=1)
            for client in range(clients)
        ]
        crew = ClientBatch(adapted, Stack(adapted), jobs)
        for job in jobs:
            crew.admit(job)
        crew.step()
    traced = trace_step(build(shape, dtype=dtype, dropout=0.1, attention=attention), training, clients, LENGTH, CPU)
    assert traced == pytest.approx(live.peak, rel=0.03)


@pytest.mark.long
def test_what_a_gpu_is_sent_for_a_stretch_is_in_the_trace() -> None:
    adapted, length = make_adapted("tiny-llama"), 16
    full = TokenBlocks(
        torch.arange(100 * length).view(100, length) % 250,
        torch.full((100,), length),
        torch.ones(100, length, dtype=torch.bool),
    )
    jobs = [make_job(full, adapted.read(), client=client, batch_size=1, epochs=1) for client in range(2)]
    with LiveBytes([*adapted.model.parameters(), *adapted.model.buffers(), jobs[0].adapter.weights_P]) as live:
        crew = ClientBatch(adapted, Stack(adapted), jobs, fixed_shapes=True)
        for job in jobs:
            crew.admit(job)
        crew.step()
    training = make_recipe(training={"batch_size": 1}).training
    traced, without = (
        trace_step(build("tiny-llama"), training, 2, length, CPU, fixed=fixed) for fixed in (True, False)
    )
    sent = STRETCH * (2 * length * (8 + 8 + 4) + 2 * 8 * 3)
    # These texts are full; others' places may be sent, of a row.
    of_a_row = STRETCH * 2 * length * 8
    assert traced - without == pytest.approx(sent + of_a_row, rel=0.1)
    traced -= of_a_row
    # Beside what is on the device, the processor writes to two rooms as large, and holds its batches.
    assert live.peak - 2 * sent == pytest.approx(traced, rel=0.3)
    assert live.peak - 2 * sent > traced - sent / 2


@pytest.mark.parametrize(
    ("fixed", "targets", "share"),
    first(
        [
            *((False, None, share) for share in (0.5, 0.86)),
            # Beyond 96 % there is no row.
            *((True, targets, share) for share in (0.9, 0.5, 0.8) for targets in (None, "all-linear")),
        ],
        keep=4,
        every=2,
    ),
)
@pytest.mark.parametrize("dtype", first(["float32", "bfloat16"]))
def test_real_tokens_alone_take_no_more_than_a_full_batch(
    shape: str, fixed: bool, targets: str | None, share: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ROW_LAUNCHES": 0, "WIDTHS": 1, "SIZES": 64}.items():
        monkeypatch.setattr(client_slots, name, value)
    if fixed:  # as on a GPU, whose rows are no multiple
        monkeypatch.setattr(attention, "EVEN", 1)
    told = {"targets": targets} if targets else {}
    adapted, length = make_adapted(shape, dtype, **told), 64
    real = int(length * share)
    tokens_NT = torch.arange(2 * length).view(2, length)
    blocks = TokenBlocks(tokens_NT, torch.tensor([length, real]), torch.ones(2, length, dtype=torch.bool))
    blocks = replace(blocks, counted_NT=blocks.is_real)
    jobs = [make_job(blocks, adapted.read(), client=client, batch_size=2, epochs=1) for client in range(2)]
    with LiveBytes([*adapted.model.parameters(), *adapted.model.buffers(), jobs[0].adapter.weights_P]) as live:
        crew = ClientBatch(adapted, Stack(adapted), jobs, fixed_shapes=fixed)
        for job in jobs:
            crew.admit(job)
        crew.step()
    training = make_recipe(training={"batch_size": 2}).training
    traced = trace_step(build(shape, dtype=dtype, **told), training, 2, length, CPU, fixed=fixed)
    if fixed:
        assert crew._room is not None
        assert crew._room.has_rows
        # What the processor writes to is no memory of a GPU.
        assert crew._stretches is not None
        assert crew._stretches._now is not None
        lines = crew._stretches._now.lines
        live.peak -= lines._written_EW.nbytes + lines._spare_EW.nbytes
    assert live.peak < 1.03 * traced


def predict(shape: str = "tiny-llama", clients: int = 2, layers: int = 2, **training: Any) -> StepMemory:
    section = make_recipe(training={"batch_size": 2, **training}).training
    return predict_step(lambda count: build(shape, count), layers, section, clients=clients, length=LENGTH, device=CPU)


@pytest.mark.long
def test_deep_models_are_told_from_short_ones(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HELD_BY_ALLOCATOR", {"cpu": 1.0})
    traced = trace_step(build(shape, 6), make_recipe().training, 2, LENGTH, CPU)
    predicted = predict(shape, layers=6)
    assert predicted.peak_bytes(2) - predicted.base_bytes == pytest.approx(traced, rel=0.01)


@pytest.mark.long
def test_what_costs_memory_shows(shape: str) -> None:
    plain = predict(shape)
    assert predict(shape, batch_size=4).client_bytes > 1.5 * plain.client_bytes
    assert predict(shape, gradient_checkpointing=True).peak_bytes(20) < plain.peak_bytes(20)
    assert predict(shape, optimizer="sgd").peak_bytes(2) < plain.peak_bytes(2)
    assert plain.peak_bytes(5) - plain.peak_bytes(4) == plain.client_bytes > 0


@pytest.mark.parametrize("adapter", [{}, {"rank": 4096, "targets": "all-linear"}], ids=["small", "wide"])
@pytest.mark.parametrize(("clients", "batch_size", "length"), first([(2, 400, 16), (1, 1, 2), (3, 2, 256)], rest=CI))
def test_a_step_that_is_certain_to_fit_does(
    shape: str, adapter: dict[str, Any], clients: int, batch_size: int, length: int
) -> None:
    training = make_recipe(training={"batch_size": batch_size}).training
    count = count_roughly(build(shape, **adapter), training, clients, length, 0, CPU)
    traced = trace_step(build(shape, **adapter), training, clients, length, CPU)
    assert count is not None
    assert count * CERTAIN_TIMES >= HELD_BY_ALLOCATOR["cpu"] * traced


@pytest.mark.parametrize("adapter", [{}, {"rank": 4096, "targets": "all-linear"}], ids=["small", "wide"])
@pytest.mark.parametrize(("tokens", "length"), first([(6400, 16), (2, 2), (1024, 256)], rest=CI))
def test_an_evaluation_that_is_certain_to_fit_does(
    shape: str, adapter: dict[str, Any], tokens: int, length: int
) -> None:
    # A step of one token beside it.
    training = make_recipe(training={"batch_size": 1}).training
    count = count_roughly(build(shape, **adapter), training, 1, 1, tokens, CPU)
    traced = trace_scoring(build(shape, **adapter), tokens, length, CPU)
    assert count is not None
    assert count * CERTAIN_TIMES >= HELD_BY_ALLOCATOR["cpu"] * traced


@pytest.mark.parametrize("dtype", first(["float32", "bfloat16"], rest=CI))
@pytest.mark.parametrize(("settings", "adapters"), first([({}, 1), ({}, 4), ({"targets": ["lm_head"]}, 4)], keep=2))
def test_the_trace_of_scoring_is_what_an_evaluation_has_alive(
    shape: str, dtype: str, settings: dict[str, Any], adapters: int
) -> None:
    adapted, sequences = make_adapted(shape, dtype, **settings), 16
    tokens_NT = torch.arange(8 * LENGTH).view(8, LENGTH) % 250
    blocks = TokenBlocks(tokens_NT, torch.full((8,), LENGTH), torch.ones(8, LENGTH, dtype=torch.bool))
    start = adapted.read()
    asked = [(replace(start, weights_P=start.weights_P + number), blocks) for number in range(adapters)]
    weights = [adapter.weights_P for adapter, _ in asked]
    with LiveBytes([*adapted.model.parameters(), *adapted.model.buffers(), *weights]) as live:
        if adapters > 1:
            evaluate_together(adapted, asked, batch_size=sequences, at_once=8)
        else:
            evaluate(adapted, start, blocks, batch_size=sequences)
    tokens = LENGTH * (8 if adapters == 1 else sequences)
    traced = trace_scoring(build(shape, dtype=dtype, **settings), tokens, LENGTH, CPU)
    pass_bytes = adapters * start.weights_P.nbytes if adapters > 1 else 0
    assert live.peak == pytest.approx(traced + pass_bytes, rel=0.1)


@pytest.mark.long
def test_what_an_evaluation_needs_is_in_the_prediction(shape: str) -> None:
    plain = predict(shape)
    section = make_recipe(training={"batch_size": 2}).training

    def with_scoring(tokens: int) -> StepMemory:
        return predict_step(
            lambda count: build(shape, count), 2, section, clients=2, length=LENGTH, device=CPU, scored_tokens=tokens
        )

    small, large = with_scoring(LENGTH), with_scoring(1000 * LENGTH)
    assert small.peak_bytes(2) == plain.peak_bytes(2), "it takes less than a step"
    assert large.peak_bytes(2) > 10 * plain.peak_bytes(2)
    assert large.peak_bytes(3) - large.peak_bytes(2) == large.held_bytes == ROWS_HELD * 4 * build(shape).layout.size
    free = round((large.peak_bytes(2) + large.held_bytes / 2) / SHARE_OF_FREE)
    assert large.clients_that_fit(free) == 2 < plain.clients_that_fit(free)


def test_a_doubt_is_left_where_little_is_free_or_the_shape_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, training = build("tiny-llama"), make_recipe().training
    told: dict[str, Any] = {"clients": 2, "length": LENGTH, "scored_tokens": 256, "device": CPU}
    assert leaves_no_doubt(adapted, training, **told, free=2**33)
    assert not leaves_no_doubt(adapted, training, **told, free=2**20)
    assert not leaves_no_doubt(adapted, training, **{**told, "scored_tokens": 2**21}, free=2**33)
    monkeypatch.setattr(adapted.base.config, "get_text_config", object)
    assert not leaves_no_doubt(adapted, training, **told, free=2**33)


@pytest.mark.long
def test_the_base_model_is_counted_once() -> None:
    base = sum(p.numel() * p.element_size() for p in make_adapted().model.parameters())
    assert predict(clients=1).base_bytes == predict(clients=3).base_bytes == base


@pytest.mark.parametrize(("free", "fit"), [(0, 1), (5800, 1), (8000, 10), (10_000, 19)])
def test_clients_that_fit(free: int, fit: int) -> None:
    step = StepMemory(base_bytes=5000, fixed_bytes=200, client_bytes=200)
    assert step.clients_that_fit(free) == fit
    assert step.peak_bytes(3) == 5800


def test_on_a_processor_there_can_be_too_many() -> None:
    step = StepMemory(base_bytes=5000, fixed_bytes=200, client_bytes=2**30)
    assert step.clients_worthwhile(CPU) == 5
    assert step.clients_worthwhile(torch.device("cuda")) > 10**9
    assert StepMemory(0, 0, 2**34).clients_worthwhile(CPU) == 1


def test_this_machine_has_memory() -> None:
    assert free_bytes(CPU) > 2**20


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.host.machine.CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2**20
    (tmp_path / "memory.max").write_text("3000000\n")
    assert free_bytes(CPU) == 2_000_000


def test_a_model_that_is_larger_than_its_gpu_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, gpu = make_recipe(), torch.device("cuda:1")
    source = open_model(recipe.model.source)
    free = sum(p.numel() * p.element_size() for p in make_adapted().model.parameters())
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert check(recipe, source, gpu).engine == "batched"
    monkeypatch.setattr(memory, "free_bytes", lambda device: free - 1)
    with pytest.raises(ModelError, match=r"model.source: its weights take .*, and cuda:1 has .*; model.quantization"):
        check(recipe, source, gpu)
    assert check(recipe, source, CPU).engine == "batched", "a processor's memory is no such limit"
