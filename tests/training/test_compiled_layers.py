"""Layers through `torch.compile` against layers as they are.

`aot_eager` traces as torch's own compiler does, forward and back, and then runs the operations that it traced: nothing
differs but what was left out or changed by the tracing. One test has the compiler itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from shutil import which
from typing import Any

import pytest
import torch
from support.marks import first
from support.tiny import count_padding, make_adapted, make_blocks, make_job, updates_of
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.stacked_product import multiply_stacked
from fedloom.training import compiled_layers
from fedloom.training.batched import BatchedEngine, ClientBatch
from fedloom.training.jobs import ClientJob, ClientUpdate

SIZES = (6, 3, 5)
"""Documents of three clients, who end one after another."""


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were traced, each run as it is."""
    graphs: list[Any] = []
    as_it_is = lookup_backend("aot_eager")

    def keep(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return as_it_is(graph, inputs)

    monkeypatch.setattr(compiled_layers, "BACKEND", keep)
    return graphs


def make_jobs(adapted: AdaptedModel, sizes: Sequence[int] = SIZES, round: int = 1, **told: Any) -> list[ClientJob]:
    told = {"batch_size": 2, "epochs": 1, "proximal_mu": 0.1, "optimizer_state": "keep", **told}
    return [
        make_job(make_blocks(size, seed=client), adapted.read(), client=client, round=round, **told)
        for client, size in enumerate(sizes)
    ]


def train(engine: BatchedEngine, jobs: Sequence[ClientJob], **told: Any) -> list[ClientUpdate]:
    jobs = [replace(job, training=job.training.model_copy(update=told)) for job in jobs]
    return list(updates_of(engine.train(jobs)))


def launched(adapted: AdaptedModel, jobs: Sequence[ClientJob], monkeypatch: pytest.MonkeyPatch) -> list[ClientUpdate]:
    """The updates by layers as they are, in shapes that are fixed as compiled ones' are."""
    plain = ClientBatch.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            ClientBatch,
            "__init__",
            lambda self, *given, **named: plain(self, *given, **{**named, "fixed_shapes": True}),
        )
        return train(BatchedEngine(adapted), jobs)


def assert_equal(found: Sequence[ClientUpdate], expected: Sequence[ClientUpdate]) -> None:
    """To the bit."""
    assert [update.client for update in found] == [update.client for update in expected]
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.adapter.weights_P, its.adapter.weights_P)
        assert replace(mine.report, seconds=0) == replace(its.report, seconds=0)
        for name, value in its.optimizer_state.items():
            assert torch.equal(mine.optimizer_state[name], value)


@pytest.mark.parametrize("shape", first(["tiny-gpt2", "tiny-llama", "tiny-opt"]))
def test_compiled_updates_are_the_others_to_the_bit_and_layers_share_what_was_compiled(
    shape: str, traced: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # GPT-2 and OPT have dropout of their own, GPT-2 on its attention too.
    adapted, said = make_adapted(shape, dropout=0.3), []
    jobs = make_jobs(adapted)
    engine = BatchedEngine(adapted, say=lambda *words: said.append(words))
    found = train(engine, jobs, compile=True)
    assert not said
    # The first layer, below which nothing is trained, and all others; one shape, while clients end one by one.
    assert len(traced) == 2
    assert_equal(found, launched(adapted, jobs, monkeypatch))
    assert "forward" not in vars(adapted.base.get_submodule("model.layers.0")) if shape == "tiny-llama" else True


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "micro-batches": ({}, {"gradient_accumulation": 2}),
    "A frozen": ({"freeze_a": True}, {}),
    "all layers, bfloat16": ({"targets": "all-linear", "dtype": "bfloat16"}, {}),
    "masks": ({"attention": "sdpa"}, {}),
    "residuals": ({"residuals": True}, {}),
}


@pytest.mark.parametrize("variant", first([*VARIANTS]))
def test_so_are_those_of_every_kind_of_step(variant: str, traced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (model, told), said = VARIANTS[variant], []
    adapted = make_adapted(**{"dropout": 0.3, **model})
    jobs = make_jobs(adapted, **told)
    if variant == "masks":
        jobs = [replace(job, blocks=count_padding(job.blocks)) for job in jobs]
    found = train(BatchedEngine(adapted, say=lambda *words: said.append(words)), jobs, compile=True)
    assert not said
    assert traced
    assert_equal(found, launched(adapted, jobs, monkeypatch))


@pytest.mark.parametrize("fails", ["in tracing", "forward", "back"])
def test_what_can_not_be_compiled_is_said_once_and_nothing_is_lost(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop

    def stop(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    def ask_the_device(layer: Any, keys_N: Tensor, calls: Tensor, states: Tensor, **others: Any) -> Any:
        return states * states.sum().item(), 0

    backend = {
        "in tracing": "aot_eager",
        "forward": stop,
        "back": aot_autograd(fw_compiler=nop, bw_compiler=stop),
    }[fails]
    monkeypatch.setattr(compiled_layers, "BACKEND", backend)
    if fails == "in tracing":
        monkeypatch.setattr(compiled_layers, "_call_layer", ask_the_device)
    adapted, said = make_adapted(dropout=0.3), []
    jobs = make_jobs(adapted)
    engine = BatchedEngine(adapted, say=lambda *words: said.append(words))
    found = train(engine, jobs, compile=True)
    assert [step for step, _ in said] == ["compile"]
    assert said[0][1].startswith("none, layers are called as they are: ")
    assert fails == "in tracing" or "no compiler here" in said[0][1]
    assert_equal(found, launched(adapted, jobs, monkeypatch))
    # The next round goes without, of real tokens alone.
    assert_equal(train(engine, jobs, compile=True), train(BatchedEngine(adapted), jobs))
    assert len(said) == 1


def test_a_compiled_product_rounds_as_it_is_told_and_leaves_the_precision_as_it_was() -> None:
    generator = torch.Generator().manual_seed(1)
    x_MI, a_KRI, b_KOR = (torch.randn(size, generator=generator) for size in ((6, 5), (3, 2, 5), (3, 4, 2)))
    before, seen = torch.backends.cuda.matmul.fp32_precision, []
    bmm = torch.bmm

    def watch(*given: Any) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return bmm(*given)

    found = []
    for multiply in (multiply_stacked, torch.compile(multiply_stacked, fullgraph=True, backend="aot_eager")):
        x, a, b = (value.clone().requires_grad_() for value in (x_MI, a_KRI, b_KOR))
        gradients = torch.zeros(6, 2, 5), torch.zeros(6, 4, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "bmm", watch)
            product = multiply(x, a, b, gradients, None, True)
            product.square().sum().backward()
        found.append((product, x.grad, *gradients))
    assert {*seen} == {"tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == before
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="no C++ compiler")
def test_by_torchs_own_compiler_updates_are_the_others_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, said = make_adapted(dropout=0.3), []
    jobs = make_jobs(adapted, (4, 3))
    found = train(BatchedEngine(adapted, say=lambda *words: said.append(words)), jobs, compile=True)
    assert not said
    for mine, its in zip(found, launched(adapted, jobs, monkeypatch), strict=True):
        moved = (its.adapter.weights_P - jobs[0].adapter.weights_P).norm()
        assert (mine.adapter.weights_P - its.adapter.weights_P).norm() < 1e-3 * moved
