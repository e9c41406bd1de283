"""Formulas of a client's training, each once, for every engine.

A client minimises F_k(w) + μ/2 ‖w − w_global‖² (FedProx, Li et al. 2020, arXiv 1812.06127, equation 2), with F_k the
mean token loss of the batch. The proximal gradient μ(w − w_global) is added once a step, before clipping, over the
trained weights.

Letters: B sequences, N sequences of all clients, T tokens, V vocabulary, P adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from fedloom.data.tokens import IGNORED
from fedloom.errors import TrainingError

if TYPE_CHECKING:
    from fedloom.recipe.training_section import Training


WORTH_LEAVING = 0.95
"""Share of a batch's tokens up to which they are computed alone: to spread and gather them costs some hundredths."""


def next_token_targets(labels_BT: Tensor) -> Tensor:
    """Return the label that each position predicts, [B, T]: its right neighbour's, and `IGNORED` at the end."""
    return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def mean_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean loss over a batch's counted tokens, in nats, in float32 or wider; padding has no share in it."""
    logits = logits_BTV.float() if logits_BTV.dtype in (torch.bfloat16, torch.float16) else logits_BTV
    targets_BT = next_token_targets(labels_BT)
    return functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)


def count_needed(targets_NT: Tensor) -> Tensor:
    """Return how many tokens of each sequence, [N], are needed for what counts in it.

    That is up to the last one that predicts one that counts.
    """
    places_T = torch.arange(1, targets_NT.shape[1] + 1)
    return ((targets_NT != IGNORED) * places_T).amax(1)


def is_needed(targets_NT: Tensor) -> Tensor:
    """Return which tokens are needed for what counts, bool [N, T]."""
    return torch.arange(targets_NT.shape[1]) < count_needed(targets_NT)[:, None]


def find_real(targets_NT: Tensor, multiple: int = 1) -> Tensor | None:
    """Return the places in the flattened tokens, [R], of all that is needed for what counts, in order.

    With a `multiple`, R is one as far as there are others, of which the first are taken. None where leaving out the
    rest would save less than finding it costs, or where nothing counts.
    """
    needed_M = is_needed(targets_NT).flatten()
    if lacking := -int(needed_M.sum()) % multiple:
        needed_M[(~needed_M).nonzero()[:lacking, 0]] = True
    real_R = needed_M.nonzero()[:, 0]
    return real_R if 0 < len(real_R) <= WORTH_LEAVING * targets_NT.numel() else None


def count_targets(labels_BT: Tensor) -> int:
    """Return how many tokens of a batch count in its mean loss."""
    return int((next_token_targets(labels_BT) != IGNORED).sum())


def proximal_loss(drift: float, mu: float) -> float:
    """Return μ/2 ‖w − w_global‖², where `drift` is the norm."""
    return 0.5 * mu * drift**2


def add_proximal_gradient(gradient_P: Tensor, offset_P: Tensor, mu: float | Tensor) -> None:
    """Add μ(w − w_global) to the gradient in place; `offset_P` is w − w_global. Takes [P], or [K, P] with μ [K, 1]."""
    # `alpha` takes a number alone, and to fetch one would wait for the GPU.
    gradient_P.addcmul_(offset_P, mu) if isinstance(mu, Tensor) else gradient_P.add_(offset_P, alpha=mu)


@torch.no_grad()
def hold_still(weights_P: Tensor, start_P: Tensor, trains_P: Tensor) -> None:
    """Undo in place what a step changed where `trains_P` is false: weight decay changes weights without a gradient."""
    weights_P.copy_(torch.where(trains_P, weights_P, start_P))


def clip_gradient(gradient_P: Tensor, max_norm: float | None) -> None:
    """Scale the gradient in place so that its norm is at most `max_norm`; None leaves it alone.

    The rule is that of torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013, arXiv 1211.5063, algorithm 1). In [K, P]
    each row is clipped by its own norm.
    """
    if max_norm is not None:
        norm = gradient_P.norm(dim=-1, keepdim=True)
        # 1e-6 as in torch; and a clamp, because an `if` would wait for the GPU.
        gradient_P.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def sum_clipped(gradients_GP: Tensor, max_norm: float, clients: int) -> Tensor:
    """Return each client's sum, [K, P], of its documents' gradients, each scaled to a norm of at most `max_norm`.

    The G rows are K clients' documents, equally many of each. A gradient that is not finite counts as 0, in place: it
    would be its document's sign otherwise (Abadi et al. 2016, arXiv 1607.00133, algorithm 1). So does one that is too
    large to be scaled: its factor would be a number of few digits, up to twice as large as it may be.
    """
    norm_G = torch.linalg.vector_norm(gradients_GP, dim=1, dtype=torch.float64)
    lost_G = ~(norm_G * torch.finfo(gradients_GP.dtype).tiny < max_norm / 2)
    gradients_GP.masked_fill_(lost_G[:, None], 0.0)
    # A millionth less, so that rounding makes none longer than it may be.
    factor_G = ((1 - 1e-6) * max_norm / norm_G.masked_fill(lost_G, 1.0).clamp(min=1e-12)).clamp(max=1.0)
    factor_K1B = factor_G.to(gradients_GP.dtype).view(clients, 1, -1)
    return torch.bmm(factor_K1B, gradients_GP.view(clients, -1, gradients_GP.shape[1]))[:, 0]


@torch.no_grad()
def noised_mean(sum_KP: Tensor, noise_KP: Tensor, batch_K: Tensor) -> Tensor:
    """Return (sum + noise) / B for each client, [K, P], in the sum's dtype; B is the expected number, not the drawn."""
    return ((sum_KP.double() + noise_KP) / batch_K[:, None]).to(sum_KP.dtype)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Factor of the learning rate at a progress in [0, 1]: what is left of the way from the peak to the end."""


def learning_rate(training: Training, step: int, steps: int, round: int, rounds: int) -> float:
    """Return the learning rate of a step (from 0) of a round's steps, in a round (from 1) of the run's rounds.

    The rate is η_end + (η − η_end) f(progress). Over `rounds` the progress of a whole round r of R is r/R. A warm-up
    of W steps is transformers': η s/W in step s of its span, and from W on the schedule over what is left.
    """
    progress = {"round": step / steps, "run": (round - 1 + step / steps) / rounds, "rounds": round / rounds}
    reached = progress[training.schedule_scope]
    if training.warmup:
        place, span = (
            ((round - 1) * steps + step, rounds * steps) if training.schedule_scope == "run" else (step, steps)
        )
        warm = warmup_steps(training, span)
        if place < warm:
            return training.learning_rate * place / warm
        reached = (place - warm) / (span - warm)
    peak, end = training.learning_rate, training.learning_rate_end
    return end + (peak - end) * SCHEDULES[training.schedule](reached)


def warmup_steps(training: Training, span: int) -> int:
    """Return the steps of a warm-up within a span of so many."""
    return math.ceil(training.warmup * span if training.warmup < 1 else training.warmup)


MEND_INFINITE = (
    "lower training.learning_rate, or set training.max_gradient_norm; where the model is in 16 bits, model.dtype"
    " float32 may help"
)
"""Way to mend a training that comes to no finite number."""


def check_finite(what: str, value: float, **where: Any) -> None:
    """Stop training if a loss or a distance is no finite number.

    `what` names the value, and `where` is for TrainingError: round, client, step, stage.

    Raises:
        TrainingError: the value is infinite or NaN.
    """
    if not math.isfinite(value):
        raise TrainingError(f"{what} is {value}", mend=MEND_INFINITE, **where)


def check_proximal(proximal_losses: list[float], *, mu: float, round: int, client: int) -> None:
    """Stop training if μ > 0 and the proximal term was always zero: the mistake of the published experiment.

    In a client's first step the weights are the global ones and the term is zero; after that it must not be.

    Raises:
        TrainingError: the term was zero in each of two or more steps.
    """
    steps = len(proximal_losses)
    if mu > 0 and steps > 1 and not any(proximal_losses):
        raise TrainingError(
            f"training.proximal_mu is {mu} and the proximal term is zero after {steps} steps",
            round=round,
            client=client,
            mend="the weights did not move: raise training.learning_rate",
        )
