"""An audit of our own mechanism in one run, and broken twins that it must find (Steinke, Nasr, Jagielski 2023,
arXiv 2305.08846): each of 1,000 planted gradients takes part by a coin, and is guessed from what comes out.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedloom.privacy.accounting import epsilon
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.training.objective import noised_mean, sum_clipped

CANARIES, STEPS, RATE, NOISE, MAX_NORM, DELTA = 1000, 4, 0.5, 4.0, 0.3, 1e-5
GUESSES = 300
CLAIMED = epsilon(RATE, NOISE, STEPS, DELTA)

Sum = Callable[[Tensor, float, int], Tensor]
Mean = Callable[[Tensor, Tensor, Tensor], Tensor]
Draw = Callable[[Ration, int], Tensor]
ROWS_N = torch.arange(CANARIES).repeat_interleave(4)
"""Units of four rows each, as of a person with four documents."""


def outcome(
    seed: int,
    total: Sum = sum_clipped,
    mean: Mean = noised_mean,
    noise: Callable[[Ration, int], Tensor] | None = None,
    draw: Draw = Ration.draw,
) -> tuple[Tensor, Tensor]:
    """Who took part, and what came out at each canary's place, over all steps. `draw` gives the canary of each row."""
    terms = Terms(NOISE, MAX_NORM, int(RATE * CANARIES), CANARIES, STEPS, DELTA)
    ration = Ration(terms, derive_key(b"audit", str(seed)))
    member = torch.rand(CANARIES, generator=torch.Generator().manual_seed(seed)) < 0.5
    score = torch.zeros(CANARIES, dtype=torch.float64)
    for step in range(STEPS):
        drawn = draw(ration, step)
        drawn = drawn[member[drawn]]
        # A direction for each: gradients of ten times the norm that they are scaled down to.
        gradients_GP = torch.zeros(len(drawn), CANARIES, dtype=torch.float64)
        gradients_GP[torch.arange(len(drawn)), drawn] = 10 * MAX_NORM
        noise_P = noise(ration, step) if noise else ration.noise(step, CANARIES)
        score += mean(total(gradients_GP, MAX_NORM, 1), noise_P[None], torch.tensor([terms.batch]))[0]
    return member, score


def told(member: Tensor, score: Tensor) -> float:
    """Return the ε that the guesses prove, at 95 % (theorem 5.2)."""
    order = score.argsort()
    right = int(member[order[-GUESSES // 2 :]].sum() + (~member[order[: GUESSES // 2]]).sum())
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(right, middle) < 0.05 else (low, middle)
    return low


def _p_value(right: int, tried: float) -> float:
    rate = 1 / (1 + math.exp(-tried))
    k = np.arange(GUESSES + 1)
    logs = np.array([math.lgamma(GUESSES + 1) - math.lgamma(i + 1) - math.lgamma(GUESSES - i + 1) for i in k])
    mass = np.exp(logs + k * math.log(rate) + (GUESSES - k) * math.log1p(-rate))
    tail = np.append(np.cumsum(mass[::-1])[::-1], 0.0)  # of at least so many
    beta = tail[right]
    i = np.arange(1, right + 1)
    alpha = max(0.0, float(np.max((tail[right - i] - beta) / i, initial=0.0)))
    return min(1.0, float(beta) + alpha * DELTA * 2 * CANARIES)


def distance(member: Tensor, score: Tensor) -> float:
    """Return how far apart those in and those out are, in standard deviations (Dong, Roth, Su 2022: μ)."""
    spread = (score[member].var() + score[~member].var()) / 2
    return float((score[member].mean() - score[~member].mean()) / spread.sqrt())


IN_THEORY = STEPS * RATE / math.sqrt(STEPS * NOISE**2 + STEPS * RATE * (1 - RATE) / 2)


def one_clip_for_all(gradients_GP: Tensor, max_norm: float, clients: int) -> Tensor:
    mean_P = gradients_GP.mean(0)
    return (len(gradients_GP) * mean_P * min(1.0, max_norm / float(mean_P.norm())))[None]


def half_a_norm(gradients_GP: Tensor, max_norm: float, clients: int) -> Tensor:
    """As if the norm were that of one of LoRA's factors: of every other direction nothing is seen."""
    seen = gradients_GP.clone()
    seen[:, ::2] = 0
    factor_G1 = (max_norm / seen.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return (factor_G1 * gradients_GP).sum(0)[None]


TWINS = {
    "no noise": {"noise": lambda ration, step: torch.zeros(CANARIES, dtype=torch.float64)},
    "a tenth of the noise": {"noise": lambda ration, step: ration.noise(step, CANARIES) / 10},
    "noise divided twice": {"mean": lambda sums, noise, batch: noised_mean(sums, noise / batch[:, None], batch)},
    "clipped as a batch": {"total": one_clip_for_all},
    "not clipped": {"total": lambda gradients_GP, max_norm, clients: gradients_GP.sum(0)[None]},
    "the norm of one factor": {"total": half_a_norm},
    "every row of a unit": {"draw": lambda ration, step: ration.draw(step).repeat_interleave(4)},
}


def test_the_mechanism_tells_no_more_than_it_claims() -> None:
    found = [outcome(seed) for seed in range(12)]
    assert max(told(*one) for one in found) < CLAIMED
    assert np.mean([distance(*one) for one in found]) == pytest.approx(IN_THEORY, abs=4 * 0.063 / math.sqrt(12))


def test_a_unit_of_several_rows_tells_no_more_than_one_of_one() -> None:
    found = [outcome(seed, draw=lambda ration, step: ROWS_N[ration.draw_rows(step, ROWS_N)]) for seed in range(6)]
    assert max(told(*one) for one in found) < CLAIMED
    assert np.mean([distance(*one) for one in found]) == pytest.approx(IN_THEORY, abs=4 * 0.063 / math.sqrt(6))


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_twin_is_found_by_what_is_guessed(twin: str) -> None:
    assert min(told(*outcome(seed, **TWINS[twin])) for seed in range(3)) > CLAIMED  # type: ignore[arg-type]


def test_half_the_noise_is_found_by_the_distance() -> None:
    found = [
        distance(*outcome(seed, noise=lambda ration, step: ration.noise(step, CANARIES) / 2)) for seed in range(12)
    ]
    assert np.mean(found) > IN_THEORY + 4 * 0.063 / math.sqrt(12)


def test_the_same_noise_in_each_step_is_found_by_its_spread() -> None:
    """It tells less of each canary, and two answers of one step apart tell all: the noise has to be new."""

    def spread(again: bool) -> float:
        _, score = outcome(0, noise=lambda ration, step: ration.noise(0 if again else step, CANARIES))
        return float(score.std() * RATE * CANARIES)

    expected = MAX_NORM * math.sqrt(STEPS) * NOISE
    assert spread(again=False) == pytest.approx(expected, rel=0.1)
    assert spread(again=True) > 1.5 * expected
