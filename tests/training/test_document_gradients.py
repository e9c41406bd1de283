"""Gradients of single documents: in slots beside each other or one by one, they are the same, and PEFT's own."""

from dataclasses import replace

import pytest
import torch
from support.tiny import make_adapted, make_blocks

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import TokenBlocks, take_batch
from fedloom.training import document_gradients
from fedloom.training.document_gradients import alignments
from fedloom.training.objective import mean_token_loss


def drawn(adapted: AdaptedModel, seed: int) -> torch.Tensor:
    return torch.randn(adapted.layout.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(adapted: AdaptedModel, adapter: Adapter, change_P: torch.Tensor, blocks: TokenBlocks) -> list[float]:
    adapted.load(adapter)
    found = []
    for row in range(len(blocks)):
        batch = take_batch(blocks, torch.tensor([row]))
        adapted.gradient_P.zero_()
        mean_token_loss(adapted.logits(batch.tokens_BT, batch.mask_BT), batch.labels_BT).backward()
        found.append(float(torch.cosine_similarity(-adapted.gradient_P, change_P, dim=0)))
    return found


def test_a_documents_alignment_is_that_of_its_own_gradient(shape: str) -> None:
    # Dropout is for training, the adapter's as the model's own.
    adapted, blocks = make_adapted(shape, "float64", device="cpu", dropout=0.9), make_blocks(11)
    start = adapted.read()
    start = replace(start, weights_P=start.weights_P + 0.1 * drawn(adapted, 1).to(start.weights_P.dtype))
    change_P = drawn(adapted, 2).to(start.weights_P.dtype)
    cosines_N, losses_N = alignments(adapted, start, change_P, blocks)
    assert cosines_N.tolist() == pytest.approx(by_hand(adapted, start, change_P, blocks), abs=1e-6)
    batch = take_batch(blocks, torch.tensor([3]))
    loss = mean_token_loss(adapted.logits(batch.tokens_BT), batch.labels_BT).item()
    assert losses_N[3].item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("method", ["ia3", "prompt_tuning"])
def test_every_method_has_alignments(method: str) -> None:
    more = {"options": {"num_virtual_tokens": 4}} if method == "prompt_tuning" else {}
    adapted = make_adapted(method=method, rank=None, alpha=None, targets=None, device="cpu", **more)
    blocks, start = make_blocks(4), adapted.read()
    change_P = drawn(adapted, 2).to(start.weights_P.dtype)
    assert alignments(adapted, start, change_P, blocks)[0].tolist() == pytest.approx(
        by_hand(adapted, start, change_P, blocks), abs=1e-5
    )


def test_a_gradient_that_is_nothing_is_aligned_with_nothing() -> None:
    adapted, blocks = make_adapted(device="cpu"), make_blocks(3)
    nothing_P = torch.zeros(adapted.layout.size)
    assert alignments(adapted, adapted.read(), nothing_P, blocks)[0].tolist() == [0, 0, 0]


def test_documents_do_not_share_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, blocks = make_adapted(device="cpu"), make_blocks(6)
    change_P = drawn(adapted, 2).float()
    together = alignments(adapted, adapted.read(), change_P, blocks)[0]
    monkeypatch.setattr(document_gradients, "AT_ONCE", 1)
    assert torch.allclose(alignments(adapted, adapted.read(), change_P, blocks)[0], together, atol=1e-5)
