"""Many adapters, each on blocks of its own, scored in one pass: the scores are those of one after another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.marks import first
from support.tiny import (
    SIZES,
    count_answers,
    count_padding,
    draw_asked,
    make_adapted,
    make_blocks,
    make_job,
    make_recipe,
    make_scorer,
    updates_of,
)
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.lora import A_SUFFIX, Residual
from fedloom.data.packing import pack_blocks
from fedloom.data.tokens import Batch, ClientBlocks, TokenBlocks
from fedloom.errors import ModelError, TrainingError
from fedloom.evaluation.batches import in_lanes, width_for
from fedloom.evaluation.held_out import Asked, Score, adapters_at_once, evaluate, evaluate_together
from fedloom.federation.fleet import LocalFleet, Scorer
from fedloom.federation.own_parts import OwnParts
from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientFailure, ClientJob, ClientResult, ClientTask, ClientUpdate


def alone(adapted: AdaptedModel, asked: Sequence[Asked], **changes: Any) -> list[Score]:
    return [evaluate(adapted, *one, batch_size=3, **changes) for one in asked]


def agree(ours: Sequence[Score], theirs: Sequence[Score], tolerance: float = 1e-12) -> bool:
    return all(
        one.loss_sum == pytest.approx(other.loss_sum, rel=tolerance)
        and (one.correct, one.num_targets) == (other.correct, other.num_targets)
        for one, other in zip(ours, theirs, strict=True)
    )


def pack(blocks: TokenBlocks) -> TokenBlocks:
    """Blocks of twice the width, with two texts in most."""
    room = torch.zeros_like(blocks.tokens_NT)
    return pack_blocks(
        TokenBlocks(
            torch.cat([blocks.tokens_NT, room], 1),
            blocks.lengths_N,
            torch.cat([count_answers(blocks).counted_NT, room.bool()], 1),
        )
    )


KINDS: dict[str, tuple[dict[str, Any], Callable[[TokenBlocks], TokenBlocks]]] = {
    "texts": ({}, lambda blocks: blocks),
    "answers": ({}, count_answers),
    "packed": ({}, pack),
    "padding that counts": ({"attention": "sdpa"}, count_padding),
    "masks": ({"attention": "sdpa"}, count_answers),
    "a frozen A": ({"freeze_a": True}, count_answers),
    "a head that is adapted": ({"targets": ["lm_head"]}, count_answers),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_one_after_another(shape: str, kind: str) -> None:
    settings, change = KINDS[kind]
    adapted = make_adapted(shape, "float64", dropout=0.9, **settings)
    asked = draw_asked(adapted, change)
    expected = alone(adapted, asked)
    assert len({score.loss for score in expected}) == len(asked)
    for batch_size, at_once in ((3, 2), (8, 8), (1, 8), (100, 8)):
        found = evaluate_together(adapted, asked, batch_size=batch_size, at_once=at_once)
        assert agree(found, expected), (batch_size, at_once)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.01)])
def test_in_other_dtypes_they_are_up_to_rounding(shape: str, dtype: str, tolerance: float) -> None:
    adapted = make_adapted(shape, dtype)
    asked = draw_asked(adapted)
    found = evaluate_together(adapted, asked, batch_size=8, at_once=8)
    for one, other in zip(found, alone(adapted, asked), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=tolerance)


def test_each_adapter_is_scored_with_its_own_residual() -> None:
    adapted = make_adapted(dtype="float64", residuals=True)
    layers = [name.removesuffix(A_SUFFIX) for name in adapted.layout.names if name.endswith(A_SUFFIX)]
    shapes = dict(zip(adapted.layout.names, adapted.layout.shapes, strict=True))
    generator = torch.Generator().manual_seed(2)

    def draw() -> Residual:
        def factor(*size: int) -> Tensor:
            return 0.1 * torch.randn(*size, generator=generator, dtype=torch.float64)

        sizes = {layer: (shapes[layer + ".lora_B.weight"][0], shapes[layer + A_SUFFIX][1]) for layer in layers}
        return Residual({layer: (factor(rows, 3), factor(3, columns)) for layer, (rows, columns) in sizes.items()})

    shared = draw()
    residuals = [shared, None, shared, draw(), None]
    drawn = draw_asked(adapted)
    asked = [
        (replace(adapter, residual=residual), blocks)
        for (adapter, blocks), residual in zip(drawn, residuals, strict=True)
    ]
    expected = alone(adapted, asked)
    assert not agree(expected, alone(adapted, drawn)), "a residual that is left out would be seen"
    assert agree(evaluate_together(adapted, asked, batch_size=8, at_once=8), expected)


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_asked_of_one_adapter_is_scored_together(mixed: bool) -> None:
    adapted = make_adapted(dtype="float64")
    drawn = draw_asked(adapted)
    first, other = drawn[0][0], drawn[1][0]
    asked = [(other if mixed and number % 2 else first, blocks) for number, (_, blocks) in enumerate(drawn)]
    asked += [(first, make_blocks(0)), (first, pack(make_blocks(5))), (first, count_padding(make_blocks(3)))]
    expected = alone(adapted, asked)
    sizes: list[int] = []
    found = evaluate_together(adapted, asked, batch_size=4, at_once=8, watch=lambda step: sizes.append(step.samples))
    assert agree(found, expected)
    apart: list[int] = []
    for adapter, blocks in asked:
        evaluate(adapted, adapter, blocks, batch_size=4, watch=lambda step: apart.append(step.samples))
    assert sum(sizes) == sum(apart)
    assert len(sizes) < len(apart), "batches are filled up with blocks of the next"


def test_adapters_that_are_alike_and_not_one_are_not_taken_for_one() -> None:
    adapted = make_adapted()
    adapter, blocks = adapted.read(), make_blocks(4)
    changed = replace(adapter, weights_P=adapter.weights_P + 0.5)
    one, other = evaluate_together(adapted, [(adapter, blocks), (changed, blocks)], batch_size=4, at_once=8)
    assert one.loss != other.loss


def test_of_no_adapters_there_are_no_scores_and_of_no_blocks_they_are_nothing() -> None:
    adapted = make_adapted()
    assert evaluate_together(adapted, [], batch_size=8, at_once=8) == []
    nothing = make_blocks(0)
    asked = [*draw_asked(adapted)[:1], (adapted.read(), nothing)]
    assert evaluate_together(adapted, asked, batch_size=8, at_once=8)[1] == Score(0.0, 0, 0)


@pytest.mark.parametrize(("most", "at_once"), first([(48, 8), (24, 8), (1, 3), (200, 3), (10_000, 8)], keep=3))
def test_a_batch_has_no_more_tokens_than_may_be_and_every_block_is_in_one(most: int, at_once: int) -> None:
    adapted, lanes = make_adapted(), [make_blocks(size, 24, seed=size) for size in SIZES]
    seen: list[list[int]] = [[] for _ in lanes]
    sizes = []

    def note(taken: Any, batches: Sequence[Batch]) -> None:
        width = max(batch.tokens_BT.shape[1] for batch in batches)
        rows = max(len(batch.tokens_BT) for batch in batches)
        sizes.append((len(batches), rows, width))
        for lane, own in taken.items():
            seen[lane] += own.tolist()

    assert [*in_lanes(adapted, lanes, note, most, at_once=at_once)]
    assert all(count <= at_once for count, _, _ in sizes)
    assert all(count * rows * width <= most or (count, rows) == (1, 1) for count, rows, width in sizes)
    assert [sorted(rows) for rows in seen] == [[*range(size)] for size in SIZES]
    for lane, rows in zip(lanes, seen, strict=True):
        widths = lane.widths[torch.tensor(rows)].tolist()
        assert widths == sorted(widths, reverse=True), "the widest first"


def test_lanes_that_have_ended_are_not_looked_at_again() -> None:
    """A look at all lanes for each batch is hundreds of millions of looks with ten thousand clients."""
    looks = 0

    class Lanes(list[TokenBlocks]):
        def __iter__(self) -> Iterator[TokenBlocks]:
            nonlocal looks
            looks += 1
            return super().__iter__()

    lanes = Lanes(make_blocks(1, 8, seed=lane) for lane in range(100))
    assert len([*in_lanes(make_adapted(), lanes, lambda taken, batches: True, 16, at_once=8)]) >= 30
    assert looks <= 3, "whole"


def test_what_a_gpu_is_given_to_fill_up_its_widths_is_counted() -> None:
    # Texts of a few tokens beside one long one: each would take 32 tokens' memory, of which two or three were counted.
    lane = make_blocks(400, 100, seed=1)
    lane = replace(lane, lengths_N=torch.where(torch.arange(400) == 7, lane.lengths_N, lane.lengths_N.clamp(max=3)))
    on_gpu = SimpleNamespace(model=make_adapted().model, device=torch.device("cuda"))
    sizes: list[tuple[int, int]] = []
    for _ in in_lanes(
        cast(AdaptedModel, on_gpu), [lane], lambda _, batches: sizes.append(batches[0].tokens_BT.shape), 960
    ):
        pass
    assert sum(rows for rows, _ in sizes) == 400
    assert max(rows * width_for(width, 100, on_gpu.device) for rows, width in sizes) <= 960


def test_one_pass_is_fewer_batches_of_the_same_tokens() -> None:
    adapted, counted = make_adapted(), []
    asked = draw_asked(adapted)
    for _ in alone(adapted, asked, watch=counted.append):
        pass
    one_by_one, counted = counted, []
    evaluate_together(adapted, asked, batch_size=3, at_once=8, watch=counted.append)
    assert sum(step.tokens for step in counted) == sum(step.tokens for step in one_by_one)
    assert sum(step.samples for step in counted) == sum(SIZES)
    assert len(counted) < len(one_by_one)


@pytest.mark.parametrize("failing", first([[0], [0, 1, 2], [1, 3]], keep=2))
def test_memory_that_runs_out_halves_the_batches_and_changes_nothing(
    failing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make_adapted(dtype="float64")
    asked, read, passed, lowered = draw_asked(adapted), adapted.loss_head.read_rows, [], []
    expected = alone(adapted, asked)

    def run_short(*given: Any) -> tuple[Tensor, Tensor]:
        passed.append(given[0].numel())
        if len(passed) - 1 in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return read(*given)

    monkeypatch.setattr(adapted.loss_head, "read_rows", run_short)
    found = evaluate_together(adapted, asked, batch_size=10, at_once=8, most_tokens=240, lower=lowered.append)
    assert agree(found, expected)
    assert len(lowered) == len(failing)
    assert all(after <= passed[number] / 2 for number, after in zip(failing, lowered, strict=True))
    assert max(passed[failing[-1] + 1 :]) <= max(lowered[-1], 24)


def test_memory_for_not_even_one_block_is_an_error_that_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()

    def run_short(*given: Any) -> tuple[Tensor, Tensor]:
        raise MemoryError

    monkeypatch.setattr(adapted.loss_head, "read_rows", run_short)
    with pytest.raises(ModelError, match=r"not enough memory to score a single block; lower data\.max_length"):
        evaluate_together(adapted, draw_asked(adapted), batch_size=8, at_once=8)


def test_so_many_adapters_are_scored_at_once_as_their_weights_leave_room_for() -> None:
    assert adapters_at_once(1_572_864) == 85, "OPT-350M's queries and values, rank 16"
    assert adapters_at_once(10**9) == 1


# ---- The fleet of clients in this process.

HELD = [ClientBlocks(make_blocks(3 + 2 * k, seed=k), make_blocks(SIZES[k], seed=20 + k)) for k in range(4)]


def tasks_from(start: Adapter, clients_at_once: int | None) -> list[ClientTask]:
    told = {"epochs": 1, "batch_size": 2, "proximal_mu": 0.0, "clients_at_once": clients_at_once}
    training = make_recipe(training=told).training
    return [
        ClientTask(round=1, client=client, adapter=start, training=training, rounds=1, seed=7) for client in range(4)
    ]


def open_fleet(adapted: AdaptedModel, at_once: int, engine: Any = None) -> tuple[LocalFleet, list[int]]:
    """A fleet over the engine `batched`, and how many adapters were asked about each time."""
    scorer, groups = make_scorer(adapted, at_once), list[int]()

    def score(asked: Sequence[Asked]) -> Sequence[Score]:
        groups.append(len(asked))
        return scorer.score(asked)

    return LocalFleet(HELD, engine or BatchedEngine(adapted).train, Scorer(score, at_once)), groups


def test_clients_that_train_at_once_are_scored_in_one_pass_and_training_goes_on_as_without() -> None:
    """Two at a time of four that end at different steps, with dropout: scores are made while others are under way."""
    adapted = make_adapted(dtype="float64", dropout=0.3)
    start, found = adapted.read(), {}
    for at_once in (1, 8):
        fleet, groups = open_fleet(adapted, at_once)
        before = fleet.evaluate(start)
        results = {result.client: result for result in updates_of(fleet.train(tasks_from(start, 2)))}
        assert groups == ([1] * 8 if at_once == 1 else [4, 2, 2])
        assert all(results[client].report.holdout_loss_before == before[client].loss for client in range(4))
        found[at_once] = results
    jobs = [ClientJob(**vars(task), blocks=HELD[task.client].train) for task in tasks_from(start, 2)]
    unscored = {update.client: update for update in updates_of(BatchedEngine(adapted).train(jobs))}
    for client, update in unscored.items():
        plain, together = found[1][client], found[8][client]
        assert torch.equal(update.adapter.weights_P, plain.adapter.weights_P)
        assert torch.equal(update.adapter.weights_P, together.adapter.weights_P)
        assert together.report.holdout_loss_after == pytest.approx(plain.report.holdout_loss_after, rel=1e-12)
        assert together.report.evaluate_seconds > 0


def test_without_scores_no_update_waits_for_another() -> None:
    adapted = make_adapted()
    fleet, groups = open_fleet(adapted, 8)
    asked_of_engine = []
    engine = BatchedEngine(adapted).train

    def train(jobs: Sequence[ClientJob]) -> Any:
        for result in engine(jobs):
            asked_of_engine.append(result.client)
            yield result

    fleet._train_clients = train
    first_one = next(iter(fleet.train(tasks_from(adapted.read(), 1))))
    assert asked_of_engine == [first_one.client]
    assert groups == []


def test_a_client_that_fails_is_told_of_in_its_place() -> None:
    adapted = make_adapted()
    engine = BatchedEngine(adapted).train
    lost: list[ClientResult] = []

    def train(jobs: Sequence[ClientJob]) -> Any:
        for result in engine(jobs):
            if result.client == 1:
                lost.append(ClientFailure(1, TrainingError("the loss is nan", round=1, client=1)))
                yield lost[0]
            else:
                yield result

    fleet, groups = open_fleet(adapted, 8, train)
    fleet.evaluate(adapted.read())
    results = list(fleet.train(tasks_from(adapted.read(), None)))
    assert [result for result in results if isinstance(result, ClientFailure)] == lost
    scored = [result for result in results if isinstance(result, ClientUpdate)]
    assert all(update.report.holdout_loss_after is not None for update in scored)
    assert groups == [4, 3]


def test_each_client_is_scored_with_its_own_part() -> None:
    adapted = make_adapted(dtype="float64", targets=["k_proj", "q_proj"])
    asked = draw_asked(adapted)[:4]
    start = adapted.read()
    shared_P = torch.arange(start.layout.size) % 2 == 0
    losses = []
    for at_once in (1, 8):
        own = OwnParts(start, shared_P)
        for client, (adapter, _) in enumerate(asked[:3]):
            own.keep(client, adapter)
        fleet = LocalFleet(HELD, lambda jobs: iter(()), make_scorer(adapted, at_once), own=own)
        losses.append([score.loss for score in fleet.evaluate(asked[3][0]).values()])
    assert len(set(losses[0])) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_the_model_has_the_adapter_that_it_had() -> None:
    adapted = make_adapted()
    asked = draw_asked(adapted)
    adapted.load(asked[0][0])
    evaluate_together(adapted, asked[1:], batch_size=4, at_once=8)
    assert torch.equal(adapted.read().weights_P, asked[0][0].weights_P)
    job = make_job(make_blocks(), adapted.read(), epochs=1)
    assert len([*updates_of(BatchedEngine(adapted).train([job]))]) == 1
