"""Real tokens computed alone, in one row: the same updates and scores as with padding, and twins that are not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.families import GEMMA_3N
from support.marks import CI, first
from support.shapes import ARCHITECTURES
from support.tiny import (
    PEFT_NEEDS,
    count_padding,
    make_adapted,
    make_job,
    make_parts,
    make_recipe,
    make_windowed,
    switch_off_dropout,
    updates_of,
)
from torch import Tensor, nn

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.packing import pack_blocks
from fedloom.data.tokens import TokenBlocks
from fedloom.evaluation.held_out import evaluate
from fedloom.model import unpadding
from fedloom.model.attention import EVEN, MASKLESS
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.training.assumptions import try_unpadding
from fedloom.training.batched import BatchedEngine
from fedloom.training.engines import open_engine
from fedloom.training.jobs import ClientUpdate
from fedloom.training.objective import find_real


def train(
    adapted: AdaptedModel, parts: Sequence[TokenBlocks], *, private: bool = False, **changes: Any
) -> list[Tensor]:
    start = adapted.read()
    told = {"batch_size": 3, "proximal_mu": 0.1, "max_gradient_norm": None if private else 1.0, **changes}
    jobs = [make_job(part, start, client=client, **told) for client, part in enumerate(parts)]
    if private:
        terms = [Terms(0.5, 0.4, 3, len(part), 6, 1e-3) for part in parts]
        jobs = [
            replace(job, ration=Ration(one, derive_key(b"secret", str(job.client))))
            for job, one in zip(jobs, terms, strict=True)
        ]
    found: list[ClientUpdate] = sorted(updates_of(BatchedEngine(adapted).train(jobs)), key=lambda update: update.client)
    adapted.load(start)
    return [update.adapter.weights_P - start.weights_P for update in found]


def both(adapted: AdaptedModel, parts: Sequence[TokenBlocks], **changes: Any) -> float:
    """The largest distance of a client's update from that with padding, relative to it."""
    assert adapted.unpads
    alone = train(adapted, parts, **changes)
    adapted.unpads = False
    padded = train(adapted, parts, **changes)
    adapted.unpads = True
    return max(float((one - other).norm() / other.norm()) for one, other in zip(alone, padded, strict=True))


def rows_seen(adapted: AdaptedModel) -> list[int]:
    """The rows that the model's last norm sees in each pass from now on."""
    norm = next(module for module in reversed([*adapted.base.modules()]) if "norm" in type(module).__name__.lower())
    seen: list[int] = []

    def see(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append(output.numel() // output.shape[-1])

    norm.register_forward_hook(see)
    return seen


@pytest.mark.parametrize(
    "changes",
    first(
        [
            {},
            {"gradient_checkpointing": True},
            {"gradient_accumulation": 2},
            {"private": True},
            {"private": True, "gradient_checkpointing": True},
            {"batch_size": 1},
        ],
        keep=4,
    ),
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_updates_are_those_of_padded_batches_with_dropout_too(shape: str, changes: dict[str, Any]) -> None:
    adapted = make_adapted(shape, "float64", dropout=0.2)
    assert both(adapted, make_parts(), **changes) < 1e-9


@pytest.mark.parametrize("model_type", first(["gemma2", "gemma3_text"], rest=CI))
@pytest.mark.parametrize("changes", first([{"gradient_checkpointing": True}, {}, {"private": True}]), ids=str)
def test_layers_with_windows_and_capped_scores_too(model_type: str, changes: dict[str, Any]) -> None:
    adapted = make_windowed(model_type)
    try_unpadding(adapted, 24, lambda *_: None)
    assert both(adapted, make_parts(), **changes) < 1e-9


@pytest.mark.parametrize("changes", [{}, {"private": True}], ids=["plain", "private"])
def test_what_fills_up_is_a_texts_own_token(changes: dict[str, Any]) -> None:
    """Gemma 3n divides by the size of what it computes: of padding, whose embedding is zeros, there is no slope.

    In a private step such a document would count as nothing, and nobody would know.
    """
    adapted = make_windowed("gemma3n_text", pad_token_id=0, **GEMMA_3N)
    assert not adapted.model.get_input_embeddings().weight[0].any()
    switch_off_dropout(adapted)
    assert both(adapted, make_parts(), **changes) < 1e-5, "a part of it is computed in float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_other_dtypes_they_are_up_to_rounding(shape: str, dtype: str) -> None:
    assert both(make_adapted(shape, dtype), make_parts(), optimizer="sgd") < (1e-4 if dtype == "float32" else 0.05)


def test_packed_texts_stay_apart_in_a_row(shape: str) -> None:
    adapted = make_adapted(shape, "float64")
    wide = [replace(part, tokens_NT=nn.functional.pad(part.tokens_NT, (0, 24)),
                    counted_NT=nn.functional.pad(part.counted_NT, (0, 24))) for part in make_parts()]  # fmt: skip
    packed = [pack_blocks(part) for part in wide]
    assert all(len(one) < len(other) for one, other in zip(packed, wide, strict=True))
    assert both(adapted, packed) < 1e-9


def test_the_model_sees_no_token_that_nothing_needs(shape: str) -> None:
    adapted = make_adapted(shape)
    seen = rows_seen(adapted)
    parts = make_parts()
    train(adapted, parts, batch_size=64, epochs=1)
    # Of each text, all but the last token, which predicts nothing.
    assert seen == [sum(int((part.widths - 1).sum()) for part in parts)]
    seen.clear()
    evaluate(adapted, adapted.read(), parts[2], batch_size=64)
    assert seen == [int((parts[2].widths - 1).sum())]


def test_scores_are_those_of_padded_batches(shape: str) -> None:
    adapted, part = make_adapted(shape, "float64"), make_parts()[2]
    alone = evaluate(adapted, adapted.read(), part, batch_size=64)
    adapted.unpads = False
    padded = evaluate(adapted, adapted.read(), part, batch_size=64)
    assert alone.loss_sum == pytest.approx(padded.loss_sum, rel=1e-12)
    assert (alone.correct, alone.num_targets) == (padded.correct, padded.num_targets)


def test_batches_that_are_full_already_are_left_as_they_are() -> None:
    full = torch.arange(1, 129).repeat(4, 1)
    assert find_real(full) is None
    assert find_real(torch.full((2, 8), -100)) is None
    targets_NT = torch.tensor([[5, -100, 7, -100], [-100, -100, -100, -100], [-100, 3, -100, -100]])
    assert find_real(targets_NT).tolist() == [0, 1, 2, 8, 9]  # type: ignore[union-attr]
    assert find_real(targets_NT, 4).tolist() == [0, 1, 2, 3, 4, 5, 8, 9]  # type: ignore[union-attr]
    assert find_real(targets_NT, 32) is None, "there are no more"


def test_rows_in_bfloat16_have_few_sizes_on_a_processor_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneDNN keeps what it compiles for each size: a run over texts of several lengths grew by a gigabyte."""
    sizes: dict[str, set[int]] = {"bfloat16": set(), "float32": set()}

    def note_size(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes[str(x.dtype).removeprefix("torch.")].add(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    linear, parts = nn.functional.linear, make_parts(width=60)
    found = {dtype: make_adapted(dtype=dtype) for dtype in sizes}
    monkeypatch.setattr(nn.functional, "linear", note_size)
    for adapted in found.values():
        train(adapted, parts)
        evaluate(adapted, adapted.read(), parts[2], batch_size=64)
    assert len(sizes["float32"]) > 3
    assert all(size % EVEN == 0 for size in sizes["bfloat16"]), sizes["bfloat16"]


def test_padding_that_counts_is_computed() -> None:
    adapted = make_adapted(attention="sdpa")
    assert not adapted.unpads
    seen, parts = rows_seen(adapted), [count_padding(part) for part in make_parts()]
    train(adapted, parts, batch_size=64, epochs=1)
    assert seen == [3 * 9 * 24]


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_an_adapter_that_may_look_at_places_gets_its_padding(method: str) -> None:
    adapted = make_adapted(method=method, targets=None, rank=None, alpha=None, options=PEFT_NEEDS[method])
    assert not adapted.unpads


class Twin(unpadding.RealRow):
    """A row whose texts begin where the one before them ended."""

    def take(self, values_BT: Tensor) -> Tensor:
        taken = super().take(values_BT)
        return (
            torch.arange(taken.shape[1])[None]
            if bool((values_BT[0] == torch.arange(values_BT.shape[1])).all())
            else taken
        )


class Mixed(unpadding.RealRow):
    """A row whose texts see the ones before them."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.texts = [sum(self.texts)]


@pytest.mark.parametrize("twin", [Twin, Mixed])
@pytest.mark.parametrize("shape", first([*ARCHITECTURES], rest=CI))
def test_a_model_to_which_a_row_is_another_text_gets_its_padding(
    shape: str, twin: type[unpadding.RealRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, said = make_adapted(shape), []
    data = make_recipe().data
    open_engine("batched", adapted, data, lambda _: None, lambda *told: said.append(told))
    assert adapted.unpads
    assert not said
    monkeypatch.setattr("fedloom.model.attention.RealRow", twin)
    # To rotated positions, only the distance of two tokens matters: two texts in a row may begin anywhere.
    harmless = twin is Twin and shape == "tiny-llama"
    try_unpadding(adapted, 32, lambda *told: said.append(told))
    assert adapted.unpads is harmless
    assert [told[0] for told in said] == ([] if harmless else ["padding"])
    if not harmless:
        adapted.unpads = True
        switch_off_dropout(adapted)
        assert both(adapted, make_parts()) > 1e-3


def test_no_row_is_left_behind_when_a_step_fails() -> None:
    adapted = make_adapted()
    assert adapted.base.config._attn_implementation == MASKLESS
    with pytest.raises(RuntimeError), unpadding.in_a_row(unpadding.RealRow(torch.arange(3), (2, 4))):
        raise RuntimeError
    assert unpadding.current_row() is None
