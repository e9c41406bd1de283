"""Loss, perplexity and next-token accuracy of adapters on held-out blocks: one alone, or many in one pass.

Letters: L adapters of a batch, B blocks, T tokens, M positions that count, P adapter parameters, Q questions, each of
an adapter on blocks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.stacked_lora import Stack
from fedloom.data.tokens import Batch, TokenBlocks, join_blocks
from fedloom.evaluation.batches import in_lanes, send, targets_of, tokens_at_once, widest_of, width_for
from fedloom.host.failpoints import failpoint
from fedloom.model.attention import without_padding
from fedloom.progress import Watch, ignore
from fedloom.training.client_slots import pad_together
from fedloom.training.objective import find_real, next_token_targets

Asked = tuple[Adapter, TokenBlocks]
"""An adapter, and the blocks that it is to be scored on."""
WEIGHTS_BYTES = 2**29
"""Memory that the weights of adapters may take which are scored in one pass."""
HavingLanes = Callable[[Sequence[int]], AbstractContextManager[None]]
"""A context in which the model has the adapters of these lanes, in their order."""


class How(TypedDict, total=False):
    """Keywords of whoever scores, as `score_adapters` explains them."""

    most_tokens: int | None
    watch: Watch
    lower: Callable[[int], object]


@dataclass(frozen=True)
class Score:
    """Sums over counted tokens; the sum of two scores is the score of both sets of blocks together."""

    loss_sum: float
    """Negative log-likelihood of all targets, in nats."""
    correct: int
    """Number of targets that the model thought the likeliest token."""
    num_targets: int

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.num_targets + other.num_targets)

    @property
    def loss(self) -> float:
        """Return the mean negative log-likelihood, in nats per token."""
        return self.loss_sum / self.num_targets

    @property
    def perplexity(self) -> float:
        """Return exp(loss), or infinity if that is more than a float can hold."""
        # exp(709.8) is the largest that a float holds; beyond, math.exp raises.
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def accuracy(self) -> float:
        """Return the share of next tokens that the model thought likeliest, 0 to 1."""
        return self.correct / self.num_targets


NOTHING = Score(0.0, 0, 0)
Found = dict[int, Score]
"""Scores by the numbers of what was asked."""


@dataclass(frozen=True)
class _Lane:
    """An adapter, and blocks on which it is scored, each with the number of the question that it is of."""

    adapter: Adapter
    blocks: TokenBlocks
    numbers_N: Tensor


def _to_lanes(asked: Sequence[Asked], *, joined: bool) -> list[_Lane]:
    """Return a lane for each question, or if they are `joined` one for all that ask of one adapter."""
    alike: dict[Any, list[int]] = {}
    for number, (adapter, blocks) in enumerate(asked):
        kind = id(adapter), blocks.tokens_NT.shape[1], blocks.texts_NT is None, blocks.pad_counts
        alike.setdefault(kind if joined else number, []).append(number)
    lanes = []
    for numbers in alike.values():
        parts = [asked[number][1] for number in numbers]
        numbers_N = torch.tensor(numbers).repeat_interleave(torch.tensor([len(part) for part in parts]))
        lanes.append(_Lane(asked[numbers[0]][0], join_blocks(parts) if len(parts) > 1 else parts[0], numbers_N))
    return lanes


def adapters_at_once(weights: int) -> int:
    """Return how many adapters of so many weights may be scored in one pass: the same for a run that goes on."""
    return max(1, WEIGHTS_BYTES // (4 * weights))


def score_adapters(
    adapted: AdaptedModel,
    asked: Sequence[Asked],
    *,
    batched: bool,
    batch_size: int,
    at_once: int = 1,
    most_tokens: int | None = None,
    watch: Watch = ignore,
    lower: Callable[[int], object] = int,
) -> list[Score]:
    """Score adapters, each on blocks of its own, by the products that they are trained with.

    `batched` says that the engine trains in one pass, and so that layers of its kind stand for the model's: then up to
    `at_once` adapters are scored so, and where a device rounds weights for products, a single one too, as it takes less
    of a GPU than PEFT's layers. What is asked of one adapter is scored together then. A batch has at most `most_tokens`
    tokens; `watch` is told of each, and `lower` where memory runs out.

    Raises:
        ModelError: memory runs out with a single block.
    """
    how: How = {"most_tokens": most_tokens, "watch": watch, "lower": lower}
    lanes = _to_lanes(asked, joined=batched)
    if batched and (min(at_once, len(lanes)) > 1 or Stack.rounds_to(adapted, adapted.device) is not None):
        found = _score_together(adapted, lanes, batch_size, at_once, **how)
    else:
        alone = (_score_alone(adapted, lane, batch_size, **how) for lane in lanes)
        found = {number: score for scores in alone for number, score in scores.items()}
    return [found.get(number, NOTHING) for number in range(len(asked))]


def evaluate(
    adapted: AdaptedModel, adapter: Adapter, blocks: TokenBlocks, *, batch_size: int, **how: Unpack[How]
) -> Score:
    """Score an adapter on every block, in the model's dtype, without gradients or dropout; the model keeps the adapter.

    Neither the order of the blocks nor the size of batches changes the sums beyond rounding. A batch has as many tokens
    as `batch_size` blocks of full width, and on a GPU as many as fill it, but at most `most_tokens`. Where memory runs
    out in a batch, it and those after it are halved; `lower` is told their tokens. `how` is as in `score_adapters`.

    Raises:
        ModelError: memory runs out with a single block.
    """
    (lane,) = _to_lanes([(adapter, blocks)], joined=False)
    return _score_alone(adapted, lane, batch_size, **how).get(0, NOTHING)


def evaluate_together(
    adapted: AdaptedModel, asked: Sequence[Asked], *, batch_size: int, at_once: int, **how: Unpack[How]
) -> list[Score]:
    """Score plain LoRA's adapters, each on blocks of its own, up to `at_once` in one pass over the base model.

    All of them share a batch's tokens, of which there are as many as in `evaluate`, so that it takes no more memory
    than one adapter alone, but for their weights; what is asked of one adapter is scored as if it were asked at once.
    The scores are those of `evaluate` up to rounding, which of a base in bfloat16 on a GPU is that of its training
    (`rounded_product`). The model keeps its adapter, but for the residual. `how` is as in `score_adapters`.

    Raises:
        ModelError: memory runs out with a single block.
    """
    lanes = _to_lanes(asked, joined=True)
    found = _score_together(adapted, lanes, batch_size, at_once, **how)
    return [found.get(number, NOTHING) for number in range(len(asked))]


def _score_alone(adapted: AdaptedModel, lane: _Lane, batch_size: int, **how: Unpack[How]) -> Found:
    adapted.load(lane.adapter)
    return _score_lanes(adapted, [lane], lambda _: nullcontext(), batch_size, 1, **how)


def _score_together(
    adapted: AdaptedModel, lanes: Sequence[_Lane], batch_size: int, at_once: int, **how: Unpack[How]
) -> Found:
    assert all(lane.adapter.layout == adapted.layout for lane in lanes), "an adapter of another model"
    alike: dict[int, list[_Lane]] = defaultdict(list)
    for lane in lanes:
        alike[id(lane.adapter.residual)].append(lane)
    found: Found = {}
    # A residual belongs to the model, which has one at a time.
    for group in alike.values():
        adapted.load_residual(group[0].adapter)
        stacked = _Stacked(adapted, [lane.adapter for lane in group])
        found |= _score_lanes(adapted, group, stacked.having, batch_size, at_once, **how)
    return found


class _Stacked:
    """Adapters of which a model can have several at once."""

    def __init__(self, adapted: AdaptedModel, adapters: Sequence[Adapter]) -> None:
        self._adapted, self._adapters = adapted, adapters
        self._stack = Stack(adapted)
        self._stack.leave_out_dropout()
        self._bound: Sequence[int] = ()

    @contextmanager
    def having(self, lanes: Sequence[int]) -> Iterator[None]:
        # Batch after batch has the same lanes, until one of them ends.
        if lanes != self._bound:
            self._stack.let_go()
            self._bound = ()
            weights_LP = torch.stack([self._adapters[lane].weights_P for lane in lanes]).to(self._adapted.weights_P)
            rounded = self._stack.rounded_like(weights_LP)
            if rounded is not None:
                rounded.write(weights_LP)
            self._stack.bind(weights_LP, rounded=rounded)
            self._bound = lanes
        with self._stack.installed():
            yield


def _score_lanes(
    adapted: AdaptedModel,
    lanes: Sequence[_Lane],
    having: HavingLanes,
    batch_size: int,
    at_once: int,
    *,
    most_tokens: int | None = None,
    watch: Watch = ignore,
    lower: Callable[[int], object] = int,
) -> Found:
    """Score each lane's blocks with its adapter."""
    if not lanes:
        return {}
    blocks = [lane.blocks for lane in lanes]
    width = widest_of(blocks)
    most = tokens_at_once(batch_size, width, adapted.device)
    most = most if most_tokens is None else min(most, most_tokens)

    def score(taken: Mapping[int, Tensor], batches: Sequence[Batch]) -> _Sums:
        numbers = [lanes[lane].numbers_N[rows] for lane, rows in taken.items()]
        with torch.inference_mode(), having([*taken]):
            found = _score_batch(adapted, batches, numbers, width)
        failpoint("evaluation.scored")
        return found

    parts = [part for _, part in in_lanes(adapted, blocks, score, most, at_once=at_once, watch=watch, lower=lower)]
    found: Found = {}
    if not parts:
        return found
    # Reading numbers waits for a GPU: once, at the end.
    sums = iter(torch.cat([part.sums_Q2 for part in parts]).tolist())
    for part in parts:
        for number, num_targets in zip(part.numbers, part.counts, strict=True):
            loss, correct = next(sums)
            found[number] = found.get(number, NOTHING) + Score(loss, int(correct), num_targets)
    return found


class _Sums(NamedTuple):
    """Sums of a batch for each of the questions that it has blocks of."""

    numbers: list[int]
    counts: list[int]
    """Targets of each."""
    sums_Q2: Tensor
    """Loss and right answers of each, in float64 and still on the device."""


def _score_batch(adapted: AdaptedModel, batches: Sequence[Batch], numbers: Sequence[Tensor], widest: int) -> _Sums:
    """Score a batch of each lane, in which every block is of the question with its number."""
    device = adapted.device
    width = width_for(max(batch.tokens_BT.shape[1] for batch in batches), widest, device)
    tokens_LBT, labels_LBT, mask_LBT = pad_together(batches, [(len(batch.tokens_BT), width) for batch in batches])
    masked = any(batch.mask_BT is not None for batch in batches)
    batch = Batch(tokens_LBT.flatten(0, 1), labels_LBT.flatten(0, 1), mask_LBT.flatten(0, 1) if masked else None, 0)
    counted_M, targets_M = targets_of(batch)
    of_each_B = pad_sequence([*numbers], batch_first=True).flatten()
    found, question_M, counts = of_each_B[counted_M // width].unique(return_inverse=True, return_counts=True)
    # A GPU would be asked, and waited for, how long each text is.
    unpads = adapted.unpads and device.type == "cpu"
    real_R = find_real(next_token_targets(batch.labels_BT), adapted.row_multiple) if unpads else None
    rows_M = counted_M if real_R is None else torch.searchsorted(real_R, counted_M)
    tokens_BT, mask_BT = send(batch.tokens_BT, device), None if batch.mask_BT is None else send(batch.mask_BT, device)
    with without_padding(real_R, tokens_BT.shape, mask_BT):
        read = adapted.loss_head.read_rows(tokens_BT, send(rows_M, device), send(targets_M, device), mask_BT)
    facts_M2 = torch.stack([values_M.double() for values_M in read], dim=1)
    if bool((question_M.diff() < 0).any()):  # blocks of several stand among each other
        facts_M2 = facts_M2[send(question_M.argsort(stable=True), device)]
    sums_Q2 = torch.stack([part.sum(0) for part in facts_M2.split(counts.tolist())])
    return _Sums(found.tolist(), counts.tolist(), sums_Q2)
