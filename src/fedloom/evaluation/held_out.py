"""Loss, perplexity and next-token accuracy of adapters on held-out blocks: one alone, or many in one pass.

Letters: L adapters of a batch, B blocks, T tokens, M positions that count, P adapter parameters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.stacked_lora import Stack
from fedloom.data.tokens import Batch, TokenBlocks
from fedloom.evaluation.batches import in_lanes, targets_of, tokens_at_once, widest_of, width_for
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
    of a GPU than PEFT's layers.

    Raises:
        ModelError: memory runs out with a single block.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "most_tokens": most_tokens, "watch": watch, "lower": lower}
    if batched and (min(at_once, len(asked)) > 1 or Stack.rounds_to(adapted, adapted.device) is not None):
        return evaluate_together(adapted, asked, at_once=at_once, **how)
    return [evaluate(adapted, *one, **how) for one in asked]


def evaluate(
    adapted: AdaptedModel,
    adapter: Adapter,
    blocks: TokenBlocks,
    *,
    batch_size: int,
    most_tokens: int | None = None,
    watch: Watch = ignore,
    lower: Callable[[int], object] = int,
) -> Score:
    """Score an adapter on every block, in the model's dtype, without gradients or dropout; the model keeps the adapter.

    Neither the order of the blocks nor the size of batches changes the sums beyond rounding. A batch has as many tokens
    as `batch_size` blocks of full width, and on a GPU as many as fill it, but at most `most_tokens`. Where memory runs
    out in a batch, it and those after it are halved; `lower` is told their tokens.

    Raises:
        ModelError: memory runs out with a single block.
    """
    adapted.load(adapter)
    (score,) = _score_lanes(adapted, [blocks], lambda _: nullcontext(), batch_size, most_tokens, 1, watch, lower)
    return score


def evaluate_together(
    adapted: AdaptedModel,
    asked: Sequence[Asked],
    *,
    batch_size: int,
    at_once: int,
    most_tokens: int | None = None,
    watch: Watch = ignore,
    lower: Callable[[int], object] = int,
) -> list[Score]:
    """Score plain LoRA's adapters, each on blocks of its own, up to `at_once` in one pass over the base model.

    All of them share a batch's tokens, of which there are as many as in `evaluate`, so that it takes no more memory
    than one adapter alone, but for their weights. The scores are those of `evaluate` up to rounding, which of a base in
    bfloat16 on a GPU is that of its training (`rounded_product`). The model keeps its adapter, but for the residual.

    Raises:
        ModelError: memory runs out with a single block.
    """
    assert all(adapter.layout == adapted.layout for adapter, _ in asked), "an adapter of another model"
    alike: dict[int, list[int]] = defaultdict(list)
    for number, (adapter, _) in enumerate(asked):
        alike[id(adapter.residual)].append(number)
    found: dict[int, Score] = {}
    # A residual belongs to the model, which has one at a time.
    for numbers in alike.values():
        adapters = [asked[number][0] for number in numbers]
        adapted.load_residual(adapters[0])
        lanes = [asked[number][1] for number in numbers]
        having = _Stacked(adapted, adapters).having
        scores = _score_lanes(adapted, lanes, having, batch_size, most_tokens, at_once, watch, lower)
        found |= zip(numbers, scores, strict=True)
    return [found[number] for number in range(len(asked))]


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
    lanes: Sequence[TokenBlocks],
    having: HavingLanes,
    batch_size: int,
    most_tokens: int | None,
    at_once: int,
    watch: Watch,
    lower: Callable[[int], object],
) -> list[Score]:
    """Score each lane's blocks with its adapter."""
    width = widest_of(lanes)
    most = tokens_at_once(batch_size, width, adapted.device)
    most = most if most_tokens is None else min(most, most_tokens)

    def score(taken: Mapping[int, Tensor], batches: Sequence[Batch]) -> tuple[Tensor, list[int]]:
        with torch.inference_mode(), having([*taken]):
            found = _score_batch(adapted, batches, width)
        failpoint("evaluation.scored")
        return found

    parts = list(in_lanes(adapted, lanes, score, most, at_once=at_once, watch=watch, lower=lower))
    scores = [NOTHING] * len(lanes)
    if not parts:
        return scores
    # Reading numbers waits for a GPU: once, at the end.
    sums = iter(torch.cat([sums_L2 for _, (sums_L2, _) in parts]).tolist())
    for taken, (_, counts) in parts:
        for lane, num_targets in zip(taken, counts, strict=True):
            loss, correct = next(sums)
            scores[lane] += Score(loss, int(correct), num_targets)
    return scores


def _score_batch(adapted: AdaptedModel, batches: Sequence[Batch], widest: int) -> tuple[Tensor, list[int]]:
    """Return each lane's loss and right answers, [L, 2] in float64 and still on the device, and its targets' number."""
    device = adapted.device
    width = width_for(max(batch.tokens_BT.shape[1] for batch in batches), widest, device)
    tokens_LBT, labels_LBT, mask_LBT = pad_together(batches, [(len(batch.tokens_BT), width) for batch in batches])
    masked = any(batch.mask_BT is not None for batch in batches)
    batch = Batch(tokens_LBT.flatten(0, 1), labels_LBT.flatten(0, 1), mask_LBT.flatten(0, 1) if masked else None, 0)
    counted_M, targets_M = targets_of(batch)
    counts = torch.bincount(counted_M // labels_LBT[0].numel(), minlength=len(batches)).tolist()
    # A GPU would be asked, and waited for, how long each text is.
    unpads = adapted.unpads and device.type == "cpu"
    real_R = find_real(next_token_targets(batch.labels_BT)) if unpads else None
    rows_M = counted_M if real_R is None else torch.searchsorted(real_R, counted_M)
    told = batch.to(device)
    with without_padding(real_R, told.tokens_BT.shape, told.mask_BT):
        read = adapted.loss_head.read_rows(told.tokens_BT, rows_M.to(device), targets_M.to(device), told.mask_BT)
    facts_M2 = torch.stack([values_M.double() for values_M in read], dim=1)
    return torch.stack([part.sum(0) for part in facts_M2.split(counts)]), counts
