"""Each attack has a leak that it must find, and a nothing that it must not.

On random tokens: gradients of a random model on texts of one language all point one way.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.marks import first
from support.random_texts import random_blocks
from support.tiny import make_adapted, make_job, make_recipe, updates_of
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.audit.attack import Attack, Sent
from fedloom.audit.canaries import COPIES, REFERENCES, judge_canaries, make_canaries, seek_canaries
from fedloom.audit.client import attack_client
from fedloom.audit.leaked_tokens import find_first_layer, read_tokens, span_of
from fedloom.audit.statistics import NO, NOT_TRIED, TOO_FEW, YES
from fedloom.audit.verbatim import repeat_verbatim
from fedloom.data.documents import Document
from fedloom.data.tokens import TokenBlocks, join_blocks, tokenize_documents
from fedloom.model.source import open_model
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.report.audit_page import give_verdict
from fedloom.training.batched import BatchedEngine

MEMBERS, OTHERS = 30, 60


def train(adapted: AdaptedModel, blocks: TokenBlocks, ration: Ration | None = None, **training: object) -> Sent:
    """A client's round, as an engine does it."""
    start = adapted.read()
    job = make_job(blocks, start, **{"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, **training})
    job = type(job)(**{**vars(job), "ration": ration})
    (update,) = updates_of(BatchedEngine(adapted).train([job]))
    return Sent(start, update.adapter.weights_P - start.weights_P)


def members_told(adapted: AdaptedModel, sent: Sent, members: TokenBlocks, terms: Terms | None = None) -> list[Attack]:
    return list(attack_client(adapted, [sent], members, random_blocks(OTHERS, seed=99), terms, 1))


def test_members_are_told_from_others() -> None:
    adapted, members = make_adapted(device="cpu", rank=8, alpha=16, targets="all-linear"), random_blocks(MEMBERS)
    aligned, lost, _ = members_told(adapted, train(adapted, members, learning_rate=3e-3), members)
    assert (aligned.word, lost.word) == (YES, YES)
    assert aligned.found["auc"] >= 0.95, "a tool that finds less is not worth having"


def test_nobody_is_told_apart_by_an_update_of_others_documents() -> None:
    adapted, members = make_adapted(device="cpu", rank=8, alpha=16), random_blocks(MEMBERS)
    sent = train(adapted, random_blocks(MEMBERS, seed=5))
    assert YES not in {attack.word for attack in members_told(adapted, sent, members)}


def test_an_update_that_is_no_number_tells_nothing() -> None:
    adapted, members = make_adapted(device="cpu"), random_blocks(12)
    lost = Sent(adapted.read(), torch.full((adapted.layout.size,), torch.nan))
    attacks = members_told(adapted, lost, members)
    assert YES not in {attack.word for attack in attacks}
    assert attacks[0].found["auc"] == 0.5
    assert all(value == value for attack in attacks for value in attack.found.values())


def private(units: int, noise: float, seed: int) -> Ration:
    terms = Terms(noise, 0.5, units, units, 1, 1e-3)
    return Ration(terms, derive_key(b"secret", str(seed)))


@pytest.mark.parametrize("noise", first([1.5, 0.02]))
def test_noise_is_what_the_bound_says(noise: float) -> None:
    """A noise that is too little changes nothing, and one that is enough brings the attack near a coin."""
    adapted, members = make_adapted(device="cpu", rank=8, alpha=16), random_blocks(MEMBERS)
    aucs = []
    for seed in range(3):
        ration = private(MEMBERS, noise, seed)
        sent = train(adapted, members, ration, optimizer="sgd", learning_rate=1.0)
        aligned = members_told(adapted, sent, members, ration.terms)[0]
        aucs.append(aligned.found["auc"])
    if noise < 1:
        assert aligned.bound["auc"] > 0.99
        assert min(map(float, aucs)) > 0.9
    else:
        assert 0.6 < aligned.bound["auc"] < 0.75
        assert np.mean(aucs) <= aligned.bound["auc"] + 0.05


class Silent(Ration):
    """A broken twin that says how much noise there is, and adds none."""

    def noise(self, step: int, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)


def test_noise_that_is_told_of_and_not_added_is_seen() -> None:
    adapted, members = make_adapted(device="cpu", rank=8, alpha=16), random_blocks(MEMBERS)
    right = private(MEMBERS, 1.5, 0)
    found = []
    for ration in (right, Silent(right.terms, right.key)):
        sent = train(adapted, members, ration, optimizer="sgd", learning_rate=1.0)
        attacks = members_told(adapted, sent, members, ration.terms)
        found.append(give_verdict({"clients": {"you": [a.to_json() for a in attacks]}, "privacy": {"noise": "secret"}}))
    assert "more was found than the bound allows" not in found[0]
    assert "more was found than the bound allows" in found[1]


def tokens_of(blocks: TokenBlocks) -> int:
    return len(blocks.tokens_NT.unique())


def moved(adapted: AdaptedModel, seed: int = 3) -> None:
    """Give B values, as it has them after the first round."""
    generator = torch.Generator().manual_seed(seed)
    adapted.weights_P.data.add_(0.02 * torch.randn(adapted.layout.size, generator=generator))


def test_one_step_of_sgd_on_one_document_gives_its_words_away() -> None:
    adapted = make_adapted(device="cpu", rank=12, alpha=12)
    moved(adapted)
    document = random_blocks(1, length=14)
    sent = train(adapted, document, optimizer="sgd", epochs=1, learning_rate=1.0)
    read = read_tokens(adapted, [sent], document)
    assert read.word == YES
    assert read.found["read"] >= tokens_of(document) - 2, "the last token is in no gradient"
    assert read.found["false"] == 0


def test_many_documents_hide_their_words_from_that_attack() -> None:
    adapted, documents = make_adapted(device="cpu", rank=4, alpha=4), random_blocks(12)
    moved(adapted)
    read = read_tokens(adapted, [train(adapted, documents)], documents)
    assert (read.found["read"], read.found["false"]) == (0, 0)
    assert read.word != YES


def test_a_random_change_tells_no_words() -> None:
    adapted, documents = make_adapted(device="cpu", rank=4, alpha=4), random_blocks(4)
    change_P = torch.randn(adapted.layout.size, generator=torch.Generator().manual_seed(1))
    read = read_tokens(adapted, [Sent(adapted.read(), change_P)], documents)
    assert (read.found["read"], read.found["false"]) == (0, 0)
    assert read.word != YES


@pytest.mark.parametrize("shape", ["tiny-opt", "tiny-gpt2"])
def test_words_are_not_sought_in_models_that_the_attack_does_not_know(shape: str) -> None:
    adapted = make_adapted(shape, device="cpu")
    assert find_first_layer(adapted) is None
    read = read_tokens(adapted, [Sent(adapted.read(), torch.ones(adapted.layout.size))], random_blocks(2))
    assert read.word == NOT_TRIED
    assert "Llama" in read.why


def test_without_a_and_with_too_many_ranks_nothing_is_sought() -> None:
    frozen = make_adapted(device="cpu", freeze_a=True)
    assert find_first_layer(frozen) is None
    wide = make_adapted(device="cpu", rank=32)
    change_P = torch.randn(wide.layout.size, generator=torch.Generator().manual_seed(1))
    assert "too large" in read_tokens(wide, [Sent(wide.read(), change_P)], random_blocks(2)).why


def test_roundings_own_directions_are_not_in_a_span() -> None:
    adapted = make_adapted(device="cpu", rank=12, alpha=12)
    layer = find_first_layer(adapted)
    assert layer is not None
    start = adapted.read()
    # A change of one direction, as it looks once it was added to weights in float32.
    change = adapted.layout.split(torch.zeros(adapted.layout.size))
    change[layer.names[0]].copy_(1e-4 * torch.outer(torch.ones(12), layer.inputs_VI[7].float()))
    flat_P = torch.cat([value.flatten() for value in change.values()])
    rounded_P = (start.weights_P + flat_P) - start.weights_P
    assert len(span_of(layer, start, rounded_P)) == 1


@pytest.mark.long  # 60 epochs
def test_secrets_that_were_learnt_are_remembered_and_others_are_not() -> None:
    data = make_recipe(data={"max_length": 64}).data
    adapted = make_adapted(device="cpu", rank=32, alpha=64, targets="all-linear")
    tokenizer = open_model("random:tiny-llama").tokenizer

    def tokenize(documents: Sequence[Document]) -> TokenBlocks:
        return tokenize_documents(documents, tokenizer, data)

    canaries = make_canaries(b"key", tokenize, max_length=64)
    assert canaries is not None
    assert len(canaries.planted) == sum(COPIES)
    assert len(canaries.blocks) == len(COPIES) + REFERENCES
    assert canaries.blocks.counted_NT.sum(1).tolist() == [8] * len(canaries.blocks), "the digits alone count"
    before = adapted.read()
    sent = train(adapted, tokenize(canaries.planted), epochs=60, batch_size=20, learning_rate=3e-3)
    after = type(before)(before.layout, before.weights_P + sent.change_P)
    found = seek_canaries(adapted, canaries, before, after, None, 1)
    assert found.word == YES
    assert found.found["remembered"] >= 4
    other = make_canaries(b"another key", tokenize, max_length=64)
    assert other is not None
    assert seek_canaries(adapted, other, before, after, None, 1).word != YES
    assert make_canaries(b"key", tokenize, max_length=20) is None


def test_secrets_whose_losses_fell_more_than_the_others_are_remembered() -> None:
    gains = np.random.default_rng(0).normal(size=len(COPIES) + REFERENCES)
    gains[: len(COPIES)][np.array(COPIES) > 1] += 5
    found = judge_canaries(gains, None, 1)
    assert (found.word, found.found["remembered"], found.found["remembered_of_once"]) == (YES, 4, 0)


def test_secrets_that_were_never_planted_are_hardly_ever_called_remembered() -> None:
    drawn = np.random.default_rng(0)
    found = [judge_canaries(drawn.normal(size=len(COPIES) + REFERENCES), None, 1) for _ in range(300)]
    assert [attack.word for attack in found].count(YES) <= 6, "of 300"
    # As rare as it says, though it is the rarer of two looks.
    told = [float(attack.found["chance"]) for attack in found]  # type: ignore[arg-type]
    for chance in (0.05, 0.1, 0.2):
        assert np.mean([one < chance for one in told]) <= chance + 0.05
    exposures = [one for attack in found for one in attack.found["exposures"]]  # type: ignore[union-attr]
    assert np.mean(exposures) == pytest.approx(np.log2(np.e), abs=0.1), "of what was not planted"


def repeated(epochs: int) -> Attack:
    adapted, document = make_adapted(device="cpu", rank=16, alpha=32, targets="all-linear"), random_blocks(1, 48)
    sent = train(adapted, document, epochs=epochs, batch_size=1)
    after = type(sent.start)(sent.start.layout, sent.start.weights_P + sent.change_P)
    return repeat_verbatim(adapted, sent.start, after, document, random_blocks(8, 48, seed=4))


def test_a_document_that_was_learnt_by_heart_is_repeated() -> None:
    found = repeated(epochs=30)
    assert found.word == YES
    assert (found.found["repeated"], found.found["repeated_others"]) == (1, 0)


def test_a_document_that_was_seen_once_is_not_repeated() -> None:
    found = repeated(epochs=1)
    assert (found.word, found.found["repeated"]) == (TOO_FEW, 0)


def test_what_is_written_of_others_too_was_not_learnt_from_members() -> None:
    adapted = make_adapted(device="cpu", rank=16, alpha=32, targets="all-linear")
    document = random_blocks(1, 48)
    sent = train(adapted, document, epochs=30, batch_size=1)
    after = type(sent.start)(sent.start.layout, sent.start.weights_P + sent.change_P)
    found = repeat_verbatim(adapted, sent.start, after, document, join_blocks([document, document]))
    assert found.word == TOO_FEW
    members, others = (join_blocks([document, random_blocks(number, 48, seed=4)]) for number in (1, 2))
    found = repeat_verbatim(adapted, sent.start, after, members, others)
    assert (found.found["repeated"], found.found["repeated_others"]) == (1, 1)
    assert found.word == TOO_FEW, "of 2 members is no more than of 3 others, but by chance"


def test_enough_documents_of_which_none_is_repeated_are_a_no() -> None:
    adapted, documents = make_adapted(device="cpu"), random_blocks(100, 40)
    nothing_P: Tensor = torch.zeros(adapted.layout.size)
    start = adapted.read()
    after = type(start)(start.layout, start.weights_P + nothing_P)
    assert repeat_verbatim(adapted, start, after, documents, documents).word == NO
