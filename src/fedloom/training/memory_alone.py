"""Memory that the engine `reference` needs, which trains one client after another: traced as that of a batched step is.

Of a whole model the vectors of its size are the most of it: weights, gradient, the optimizer's state and what a step of
it makes beside that, and the weights that the round began with.

Letters: P adapter parameters.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import Batch
from fedloom.training.memory import HELD_BESIDE, HELD_BY_ALLOCATOR, LiveBytes, StepMemory, base_bytes, of_all_layers
from fedloom.training.optimizers import open_optimizer
from fedloom.training.reference import finish_gradient, put_gradient

if TYPE_CHECKING:
    from fedloom.recipe.training_section import Training

GIVEN_BACK_FROM = 32 * 2**20
"""Size from which on glibc gives a piece back as soon as it is free, and holds exactly what is alive of such: 32 MiB is
the most that it raises the limit to by itself (mallopt(3), M_MMAP_THRESHOLD)."""


def predict_alone(
    build: Callable[[int], AdaptedModel],
    layers: int,
    training: Training,
    *,
    length: int,
    device: torch.device,
    scored_tokens: int = 0,
    alike: bool = True,
    packed: bool = False,
) -> StepMemory:
    """Predict what it takes to train a client alone, or to score `scored_tokens` at once, where that is more.

    Arguments are those of `predict_step`. The first step is left out: it has no optimizer's state before it.
    """

    def deep(trace: Callable[[AdaptedModel], tuple[int, ...]]) -> int:
        """Return the most of several moments, each told by itself: what adds the most differs by depth."""
        return max(of_all_layers(lambda count: trace(build(count)), layers, alike=alike))

    step = deep(partial(trace_alone, training=training, length=length, device=device, packed=packed))
    scoring = 0
    if scored_tokens:
        scoring = deep(lambda adapted: (trace_scoring_alone(adapted, scored_tokens, length, device),))
    return StepMemory(base_bytes(build(layers)), HELD_BESIDE[device.type], step, scoring)


def trace_alone(
    adapted: AdaptedModel, training: Training, length: int, device: torch.device, *, packed: bool = False
) -> tuple[int, int]:
    """Return the most bytes held beside the model while a gradient is found, and while the optimizer takes its step.

    `adapted`, on the meta device, is used up.
    """
    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        adapted.to_empty(device)
        with HeldBytes([*adapted.model.parameters(), *adapted.model.buffers()], device) as live:
            # On a processor it is the server's own, and beside the model all the same.
            global_P = torch.zeros_like(adapted.weights_P)
            tokens_BT = torch.zeros(training.batch_size, length, dtype=torch.int64, device=device)
            part = Batch(tokens_BT, tokens_BT.clone(), tokens_BT.clone() if packed else None, 1)
            keys_B = torch.zeros(training.batch_size, dtype=torch.int64, device=device)
            optimizer = open_optimizer(training, adapted.weights_P, adapted.gradient_P, adapted.layout)
            adapted.model.train()

            def find_gradient() -> None:
                put_gradient(adapted, training, [part], keys_B)
                finish_gradient(adapted, training, global_P, None)

            find_gradient()
            optimizer.step()
            gradient = live.peak_of(find_gradient)
            step = live.peak_of(optimizer.step)
    return gradient, step


def trace_scoring_alone(adapted: AdaptedModel, tokens: int, length: int, device: torch.device) -> int:
    """Return the most bytes held beside the model while so many tokens are scored; `adapted` is used up.

    Its gradient and the global weights stay where they are meanwhile.
    """
    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        adapted.to_empty(device)
        with HeldBytes([*adapted.model.parameters(), *adapted.model.buffers()], device) as live:
            others = torch.zeros_like(adapted.weights_P), adapted.gradient_P.zero_()
            places = torch.arange(max(1, tokens // length) * length, device=device)
            adapted.model.eval()
            adapted.loss_head.read_rows(places.view(-1, length), places, places)
            del others
    return int(live.peak)


class HeldBytes(LiveBytes):
    """Bytes that a process holds of what operations make, which is more than is alive, those of `others` left out.

    Of pieces that glibc does not give back it holds as much as there were at any time. Numbers of tensors without
    memory, as the loss', are 1 where they are read.
    """

    def __init__(self, others: list[Tensor], device: torch.device) -> None:
        super().__init__(others)
        self._factor, self._exact_from = HELD_BY_ALLOCATOR[device.type], sys.maxsize
        if device.type == "cpu":
            self._exact_from = GIVEN_BACK_FROM
        self._small = self._most_small = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, size: int) -> None:
        if abs(size) < self._exact_from:
            self._small += size
            self._most_small = max(self._most_small, self._small)
        else:
            self.now += size
        self.peak = max(self.peak, self._holding())

    def _holding(self) -> int:
        return int(self.now + round(self._factor * self._most_small))

    def peak_of(self, work: Callable[[], object]) -> int:
        """Return the most bytes that are held while something is done."""
        self.peak = self._holding()
        work()
        return int(self.peak)
