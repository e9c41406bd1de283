"""A few rows of logits at a time give what all of them give."""

from typing import Any

import pytest
import torch
import transformers
from support.marks import CI, first
from support.tiny import DEVICE, make_adapted, make_blocks
from torch.nn import functional

from fedloom.model import loss_head, unpadding
from fedloom.model.loading import load_model
from fedloom.model.loss_head import LossHead
from fedloom.model.source import open_model
from fedloom.training.memory import LiveBytes


def whole(
    model: torch.nn.Module, tokens_BT: torch.Tensor, rows_M: torch.Tensor, targets_M: torch.Tensor
) -> torch.Tensor:
    return functional.cross_entropy(
        model(input_ids=tokens_BT).logits.flatten(0, 1)[rows_M], targets_M, reduction="none"
    )


@pytest.mark.parametrize("chunk_bytes", [1, 5 * 4 * 260, 2**30])
def test_losses_and_gradients_are_those_of_whole_logits(
    shape: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_head.CHUNK_BYTES, "cpu", chunk_bytes)
    adapted = make_adapted(shape, "float64")
    adapted.weights_P.data.normal_(0, 0.1)
    model, tokens_BT = adapted.model.get_base_model(), make_blocks(4).tokens_NT.to(DEVICE)
    rows_M = torch.tensor([0, 1, 5, 17, 18, 40, 63], device=DEVICE)
    targets_M = torch.arange(7, device=DEVICE) * 30
    weight_M = torch.arange(1.0, 8.0, dtype=torch.float64, device=DEVICE)
    assert adapted.loss_head._head is not None
    results = []
    for losses in (adapted.loss_head.losses, lambda *given: whole(model, *given)):
        adapted.gradient_P.zero_()
        losses_M = losses(tokens_BT, rows_M, targets_M)
        (losses_M * weight_M).sum().backward()
        results.append((losses_M.detach(), adapted.gradient_P.clone()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_what_is_read_of_rows_is_their_losses_and_the_likeliest(shape: str) -> None:
    adapted = make_adapted(shape)
    model, tokens_BT = adapted.model.get_base_model(), make_blocks(4).tokens_NT.to(DEVICE)
    rows_M = torch.arange(0, 64, 3, device=DEVICE)
    with torch.no_grad():
        targets_M = model(input_ids=tokens_BT).logits.flatten(0, 1)[rows_M].argmax(-1)
        targets_M[:4] += 1
        expected_M = whole(model, tokens_BT, rows_M, targets_M % 260)
        losses_M, likeliest_M = adapted.loss_head.read_rows(tokens_BT, rows_M, targets_M % 260)
    torch.testing.assert_close(losses_M, expected_M)
    assert likeliest_M.tolist() == [False] * 4 + [True] * (len(rows_M) - 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("highest", first([1, 3, 40], rest=CI))
def test_the_likeliest_token_is_that_of_argmax_where_several_are_alike(dtype: torch.dtype, highest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_MV = torch.randint(-highest, highest + 1, (200, 7), generator=generator).to(dtype)
    targets_M = torch.randint(7, (200,), generator=generator)
    expected_M = logits_MV.argmax(-1) == targets_M
    others_MV = logits_MV.scatter(1, targets_M[:, None], -torch.inf)
    ties_M = logits_MV.gather(1, targets_M[:, None])[:, 0] == others_MV.amax(-1)
    assert 0 < int((expected_M & ties_M).sum()) < int(ties_M.sum()), "some ties are won, and some lost"
    found_M = loss_head._are_likeliest(logits_MV.to(DEVICE), targets_M.to(DEVICE))
    assert torch.equal(found_M.cpu(), expected_M)


@pytest.mark.parametrize("warns", [False, True])
def test_nothing_is_sorted_to_write_to_places_that_are_different(warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is told to repeat its results sorts what it is told to write by number, twelve kernels a time."""
    asked: list[bool] = []

    def noting(right: Any) -> Any:
        def write(self: torch.Tensor, *args: Any) -> torch.Tensor:
            asked.append(torch.are_deterministic_algorithms_enabled())
            found: torch.Tensor = right(self, *args)
            return found

        return write

    for name in ("index_copy_", "scatter_"):
        monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name)))
    adapted, row = make_adapted(), torch.tensor([0, 2, 5])
    torch.use_deterministic_algorithms(True, warn_only=warns)
    try:
        adapted.loss_head.losses(make_blocks(2).tokens_NT.to(DEVICE), row.to(DEVICE), row.to(DEVICE)).sum().backward()
        spread = unpadding._Spread.apply(torch.ones(3, 2, requires_grad=True), row, 6)
        unpadding._Gather.apply(spread, row).sum().backward()
        assert len(asked) == 4
        assert not any(asked)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        torch.use_deterministic_algorithms(False)


class Capped(torch.nn.Module):
    """A model that does more to its logits than its head says, as Gemma's do."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base_model(self) -> torch.nn.Module:
        return self.model.base_model

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = torch.tanh(output.logits / 0.1) * 0.1
        return output


def test_a_model_that_cannot_be_taken_apart_is_taken_whole() -> None:
    source = open_model("random:tiny-llama")
    capped = Capped(load_model(source, dtype="float32", device=torch.device("cpu")))
    read = LossHead(capped)
    assert read._head is None
    tokens_BT, rows_M, targets_M = make_blocks(2).tokens_NT, torch.arange(5), torch.arange(5)
    with torch.no_grad():
        expected = whole(capped, tokens_BT, rows_M, targets_M)
        torch.testing.assert_close(read.losses(tokens_BT, rows_M, targets_M), expected)
        torch.testing.assert_close(read.read_rows(tokens_BT, rows_M, targets_M)[0], expected)


def test_an_adapter_on_the_head_is_not_left_out() -> None:
    assert make_adapted(targets=["lm_head"]).loss_head._head is None


@pytest.mark.parametrize(("scaling", "splits"), [(1.0, True), (8.0, False)])
def test_on_the_meta_device_the_configuration_tells_scaled_logits(scaling: float, splits: bool) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "logits_scaling": scaling}
    with torch.device("meta"):
        scaled = transformers.AutoModelForCausalLM.from_config(transformers.GraniteConfig(**sizes, **heads))
        plain = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        )
    assert (LossHead(scaled)._head is not None) == splits
    assert LossHead(plain)._head is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_at_a_time_change_no_bit_and_hold_no_more_than_a_cache(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    states_MD = torch.randn(30, 16, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(4096, 16, generator=generator).to(dtype)
    targets_M = torch.randint(0, 4096, (30,), generator=generator)

    def losses_and_gradient() -> tuple[list[torch.Tensor], int]:
        with LiveBytes([states_MD, weight_VD]) as live:
            losses_M = loss_head._RowLosses.apply(states_MD, None, targets_M, weight_VD, None)
        (gradient_MD,) = torch.autograd.grad(losses_M.sum(), states_MD)
        return [losses_M.detach(), gradient_MD], live.peak

    whole, most = losses_and_gradient()
    monkeypatch.setattr(loss_head, "CACHE_BYTES", 2 * 4 * 4096)
    few, least = losses_and_gradient()
    assert all(torch.equal(*pair) for pair in zip(whole, few, strict=True))
    logits_bytes = 30 * 4096 * dtype.itemsize
    # The logits of all rows, and two or three tensors of a few rows in float32.
    assert least < logits_bytes + 4 * torch.get_num_threads() * 2 * 4 * 4096 < most


def test_what_is_read_of_few_rows_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted("tiny-llama", "bfloat16")
    tokens_BT = make_blocks(4).tokens_NT.to(DEVICE)
    rows_M, targets_M = torch.arange(40, device=DEVICE), torch.arange(40, device=DEVICE) * 6
    with torch.no_grad():
        whole = adapted.loss_head.read_rows(tokens_BT, rows_M, targets_M)
        alone = adapted.loss_head.score_rows(tokens_BT, rows_M, targets_M)
        monkeypatch.setattr(loss_head, "CACHE_BYTES", 1)
        few = adapted.loss_head.read_rows(tokens_BT, rows_M, targets_M)
    assert torch.equal(alone, whole[0])
    assert all(torch.equal(*pair) for pair in zip(whole, few, strict=True))
