"""Each formula against its definition."""

import math

import pytest
import torch
from support.tiny import make_recipe
from torch.nn import functional

from fedloom.data.tokens import IGNORED
from fedloom.errors import TrainingError
from fedloom.training.objective import (
    add_proximal_gradient,
    check_finite,
    check_proximal,
    clip_gradient,
    learning_rate,
    mean_token_loss,
    next_token_targets,
    proximal_loss,
)


def test_proximal_gradient_is_that_of_its_loss() -> None:
    mu = 0.3
    global_P = torch.randn(50, dtype=torch.float64)
    weights_P = torch.randn(50, dtype=torch.float64, requires_grad=True)
    # The definition, differentiated by autograd: the norm is squared, and halved.
    (0.5 * mu * ((weights_P - global_P) ** 2).sum()).backward()
    gradient_P = torch.zeros(50, dtype=torch.float64)
    with torch.no_grad():
        add_proximal_gradient(gradient_P, weights_P - global_P, mu)
    torch.testing.assert_close(gradient_P, weights_P.grad)
    torch.testing.assert_close(gradient_P, mu * (weights_P.detach() - global_P))


def test_proximal_loss_is_half_mu_times_the_squared_norm() -> None:
    offset_P = torch.tensor([3.0, 4.0])
    assert proximal_loss(offset_P.norm().item(), mu=0.1) == pytest.approx(0.5 * 0.1 * 25)


def test_token_loss_is_the_mean_over_next_tokens_by_hand() -> None:
    logits_BTV = torch.randn(2, 4, 11, dtype=torch.float64)
    labels_BT = torch.tensor([[1, 2, 3, 4], [5, 6, IGNORED, IGNORED]])
    log_p = logits_BTV.log_softmax(-1)
    by_hand = [-log_p[0, 0, 2], -log_p[0, 1, 3], -log_p[0, 2, 4], -log_p[1, 0, 6]]
    torch.testing.assert_close(mean_token_loss(logits_BTV, labels_BT), sum(by_hand) / 4)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits_BTV = torch.randn(1, 8, 300).bfloat16()
    labels_BT = torch.randint(0, 300, (1, 8))
    loss = mean_token_loss(logits_BTV, labels_BT)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mean_token_loss(logits_BTV.float(), labels_BT))


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_clipping_equals_torchs(max_norm: float) -> None:
    gradient_P = torch.randn(1000)
    other = torch.nn.Parameter(torch.zeros(1000))
    other.grad = gradient_P.clone()
    torch.nn.utils.clip_grad_norm_([other], max_norm)
    clip_gradient(gradient_P, max_norm)
    torch.testing.assert_close(gradient_P, other.grad)


def test_no_clipping_leaves_the_gradient_alone() -> None:
    gradient_P = torch.randn(10) * 1e6
    before = gradient_P.clone()
    clip_gradient(gradient_P, None)
    assert torch.equal(gradient_P, before)


@pytest.mark.parametrize(
    ("schedule", "scope", "expected"),
    [
        ("constant", "round", [1, 1, 1, 1, 1, 1]),
        ("linear", "round", [1, 2 / 3, 1 / 3, 1, 2 / 3, 1 / 3]),
        ("linear", "run", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", "run", [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
    ],
)
def test_schedules_over_two_rounds_of_three_steps(schedule: str, scope: str, expected: list[float]) -> None:
    training = make_recipe(training={"schedule": schedule, "schedule_scope": scope, "learning_rate": 2.0}).training
    rates = [learning_rate(training, step, 3, round, 2) for round in (1, 2) for step in range(3)]
    assert rates == pytest.approx([2.0 * factor for factor in expected])


def test_linear_schedule_of_a_round_is_that_of_transformers() -> None:
    from transformers import get_linear_schedule_with_warmup

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=5)
    training = make_recipe(training={"schedule": "linear", "learning_rate": 1e-3}).training
    for step in range(5):
        assert learning_rate(training, step, 5, 1, 1) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("warmup", "warm"), [(0, 0), (1, 1), (3, 3), (0.25, 3), (0.3, 4), (12, 12), (40, 40)])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("scope", ["round", "run"])
def test_every_step_of_a_warm_up_has_the_rate_of_transformers(name: str, scope: str, warmup: float, warm: int) -> None:
    import transformers

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    build = getattr(transformers, f"get_{name}_schedule_with_warmup")
    scheduler = build(optimizer, warm, **({} if name == "constant" else {"num_training_steps": 12}))
    training = make_recipe(
        training={"schedule": name, "schedule_scope": scope, "warmup": warmup, "learning_rate": 1e-3}
    ).training
    rounds, steps = (1, 12) if scope == "round" else (3, 4)
    for round in range(1, rounds + 1):
        for step in range(steps):
            found = learning_rate(training, step, steps, round, rounds)
            assert found == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_schedule_falls_to_its_end_as_transformers_does(warmup: int) -> None:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, 9, min_lr=1e-4)
    training = make_recipe(
        training={"schedule": "cosine", "learning_rate": 1e-3, "learning_rate_end": 1e-4, "warmup": warmup}
    ).training
    for step in range(9):
        assert learning_rate(training, step, 9, 1, 1) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_over_rounds_the_rate_is_flowertunes() -> None:
    training = make_recipe(
        training={
            "schedule": "cosine", "schedule_scope": "rounds", "learning_rate": 5e-5, "learning_rate_end": 1e-6,
        }
    ).training  # fmt: skip
    for round in range(1, 201):
        expected = 1e-6 + 0.5 * (5e-5 - 1e-6) * (1 + math.cos(math.pi * round / 200))
        for step in range(10):
            assert learning_rate(training, step, 10, round, 200) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_round_client_and_step(loss: float) -> None:
    with pytest.raises(TrainingError, match="round 3, client 1, step 9: the loss is") as raised:
        check_finite("the loss", loss, round=3, client=1, step=9)
    assert str(raised.value).endswith("where the model is in 16 bits, model.dtype float32 may help"), (
        "it may be float32"
    )
    check_finite("the loss", 1e300, round=3, client=1, step=9)


def test_a_proximal_term_that_never_was_is_refused() -> None:
    with pytest.raises(TrainingError, match="proximal term is zero after 2 steps"):
        check_proximal([0.0, 0.0], mu=0.1, round=1, client=0)
    check_proximal([0.0, 0.0], mu=0.0, round=1, client=0)
    check_proximal([0.0, 1e-30], mu=0.1, round=1, client=0)
    check_proximal([0.0], mu=0.1, round=1, client=0)


def test_targets_are_the_right_neighbours() -> None:
    labels_BT = torch.tensor([[7, 8, 9], [4, 5, IGNORED]])
    assert next_token_targets(labels_BT).tolist() == [[8, 9, IGNORED], [5, IGNORED, IGNORED]]
    assert functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).equal(next_token_targets(labels_BT))
