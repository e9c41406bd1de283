"""Hostile updates are refused by name, and the rest make the model that they would have made alone."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import make_recipe, make_update, run_of

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.federation.admission import Admission, ClientSize
from fedloom.federation.aggregation import STRATEGIES
from fedloom.federation.rounds import RoundResult, run_rounds
from fedloom.training.jobs import ClientFailure, ClientResult, ClientTask, ClientUpdate

LAYOUT = Layout(("layer.a", "layer.b"), (torch.Size((2, 3)), torch.Size((4,))))
SENT = Adapter(LAYOUT, torch.linspace(-1, 1, 10))
SIZES = {client: ClientSize(examples=100, tokens=1000) for client in range(5)}
HOSTILE = 2


def honest(client: int, round: int = 1, sent: Adapter = SENT) -> ClientUpdate:
    """Client k moves every weight by (k+1)/100 and has 10 (k+1) examples."""
    moved = replace(sent, weights_P=sent.weights_P + (client + 1) / 100)
    return make_update(moved, client, round=round, examples=10 * (client + 1), tokens=100)


class Fleet:
    """Five clients that answer as a test says, in its order."""

    clients: Sequence[int] = range(5)
    away: Mapping[int, float] = MappingProxyType({})

    def __init__(self, answer: Callable[[list[ClientTask]], list[ClientResult]]) -> None:
        self.answer = answer

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        return iter(self.answer(list(tasks)))

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        return {0: Score(1.0, 0, 1)}


def one_round(
    answers: list[ClientResult], strategy: str = "fedavg", *, rounds: int = 1, max_lost: int = 1
) -> RoundResult:
    recipe = make_recipe(
        data={"clients": 5},
        federation={"rounds": rounds, "max_lost_clients": max_lost, "strategy": {"kind": strategy}},
    )
    fleet = Fleet(lambda tasks: answers)
    aggregate = STRATEGIES[strategy](recipe.federation.strategy)
    *_, last = run_rounds(run_of(recipe, fleet, aggregate, lambda a: None, SENT, sizes=SIZES), fleet)
    return last


def weights(values: torch.Tensor, layout: Layout = LAYOUT) -> ClientUpdate:
    return replace(honest(HOSTILE), adapter=Adapter(layout, values))


def entry(value: float) -> ClientUpdate:
    changed = honest(HOSTILE).adapter.weights_P.clone()
    changed[7] = value
    return weights(changed)


def said(**changes: Any) -> ClientUpdate:
    update = honest(HOSTILE)
    return replace(update, report=replace(update.report, **changes))


def laid_out(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> ClientUpdate:
    layout = Layout(tuple(names), tuple(torch.Size(shape) for shape in shapes))
    return weights(torch.zeros(layout.size), layout)


MOVED = honest(HOSTILE).adapter.weights_P
REFUSED: dict[str, tuple[ClientUpdate, str]] = {
    "NaN in an entry": (entry(math.nan), r"layer\.b has a weight that is not finite"),
    "infinity in an entry": (entry(math.inf), r"layer\.b has a weight that is not finite"),
    "1e30": (entry(1e30), "the change is too large"),
    "a million times too large": (weights(SENT.weights_P + 1e6 * (MOVED - SENT.weights_P)), "the change is too large"),
    "a shape that broadcasts": (laid_out(["layer.a", "layer.b"], [(2, 3), (1,)]), r"layer\.b is \(1,\), not \(4,\)"),
    "another shape": (laid_out(["layer.a", "layer.b"], [(2, 3), (5,)]), r"layer\.b is \(5,\)"),
    "transposed": (laid_out(["layer.a", "layer.b"], [(3, 2), (4,)]), r"layer\.a is \(3, 2\)"),
    "one weight for all": (weights(torch.zeros(1)), r"the weights are \(1,\), not \(10,\)"),
    "int64": (weights(torch.ones(10, dtype=torch.int64)), "torch.int64, not torch.float32"),
    "float16": (weights(MOVED.half()), "torch.float16, not"),
    "float64": (weights(MOVED.double()), "torch.float64, not"),
    "complex": (weights(MOVED.to(torch.complex64)), "torch.complex64, not"),
    "a tensor is missing": (laid_out(["layer.a"], [(2, 3)]), "1 tensors came, and 2 were sent"),
    "one too many": (laid_out(["layer.a", "layer.b", "x"], [(2, 3), (4,), (1,)]), "3 tensors came"),
    "renamed": (laid_out(["layer.a", "../../x"], [(2, 3), (4,)]), r"\.\./\.\./x stands where layer\.b must be"),
    "no examples": (said(examples=0), "examples is 0"),
    "-15 examples": (said(examples=-15), "examples is -15"),
    "NaN examples": (said(examples=math.nan), "examples is nan"),
    "1.5 examples": (said(examples=1.5), "examples is 1.5"),
    "1e18 examples": (said(examples=10**18), "and the client has 100"),
    "10^400 examples": (said(examples=10**400), "examples is no possible number"),
    "1e18 tokens": (said(tokens=10**18), "and the client has 1000 to train on"),
    "no tokens": (said(tokens=0), "tokens is 0"),
    "more steps than examples": (said(steps=31), "steps is 31, and 30 are possible"),
    "a loss that is no number": (said(loss_mean=math.nan), "loss_mean is nan"),
    "a loss that is a word": (said(loss_last="low"), "loss_last is no number but a str"),
    "no loss": (said(loss_first=None), "loss_first is no number but a NoneType"),
    "an infinite hold-out loss": (said(holdout_loss_after=math.inf), "evaluation after training: the loss is inf"),
}
"""What one client's only answer may be, and what is said of it."""

UNASKED: dict[str, tuple[ClientResult, str]] = {
    "the same again": (honest(1), "round 1, client 1: a second answer"),
    "another one for a client": (replace(honest(1), adapter=SENT), "round 1, client 1: a second answer"),
    "a failure after an update": (ClientFailure(1, TrainingError("late", round=1)), "client 1: a second answer"),
    "of the round before": (honest(1, round=0), "client 1: an update of round 0"),
    "of a round to come": (honest(1, round=7), "client 1: an update of round 7"),
    "from nobody": (honest(40), r"from a client that was not asked \(40\)"),
    "a failure of nobody's": (ClientFailure(-1, TrainingError("x", round=1)), r"not asked \(-1\)"),
}
"""What may come beside the five clients' own updates."""

RULES = ("fedavg", "trimmed_mean", "fedmedian", "krum")


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("strategy", RULES)
@pytest.mark.parametrize("what", REFUSED)
def test_a_hostile_update_is_refused_and_the_rest_make_the_model(what: str, strategy: str, place: int) -> None:
    hostile, why = REFUSED[what]
    others: list[ClientResult] = [honest(client) for client in range(5) if client != HOSTILE]
    result = one_round([*others[:place], hostile, *others[place:]], strategy)
    assert list(result.lost) == [HOSTILE]
    assert f"round 1, client {HOSTILE}, " in result.lost[HOSTILE]
    with pytest.raises(TrainingError, match=why):
        one_round([*others[:place], hostile, *others[place:]], strategy, max_lost=0)
    assert result.adapter.sha256() == one_round(others, strategy).adapter.sha256()


@pytest.mark.parametrize("strategy", RULES)
@pytest.mark.parametrize("what", UNASKED)
def test_what_nobody_asked_for_is_refused_and_costs_no_client_its_update(what: str, strategy: str) -> None:
    stray, why = UNASKED[what]
    everyone: list[ClientResult] = [honest(client) for client in range(5)]
    whole = one_round(everyone, strategy, max_lost=0)
    places = (5,) if "second" in why else (0, 3, 5)
    for place in places:
        result = one_round([*everyone[:place], stray, stray, *everyone[place:]], strategy, max_lost=0)
        assert not result.lost
        assert len(result.refused) == 2
        assert [report.client for report in result.reports] == [0, 1, 2, 3, 4]
        assert result.adapter.sha256() == whole.adapter.sha256()
        assert why.replace("\\", "") in result.refused[0]


def test_a_client_that_sends_only_an_old_update_is_lost() -> None:
    answers: list[ClientResult] = [*(honest(client) for client in range(4)), honest(4, round=0)]
    assert "an update of round 0" in one_round(answers).lost[4]
    with pytest.raises(TrainingError, match="client 4: no other update came"):
        one_round(answers, max_lost=0)


def test_more_lost_clients_than_allowed_end_the_run() -> None:
    answers: list[ClientResult] = [
        honest(0),
        entry(math.nan),
        replace(entry(1.0), report=said(client=3, steps=0).report),
    ]
    with pytest.raises(TrainingError, match="client 3, admission: steps is 0"):
        one_round(answers, max_lost=1)
    assert set(one_round(answers, max_lost=2).lost) == {2, 3}
    with pytest.raises(TrainingError, match="not finite"):
        one_round([entry(math.nan)], max_lost=5)
    with pytest.raises(TrainingError, match="no update came"):
        one_round([], max_lost=5)


def test_what_was_to_stay_must_not_change() -> None:
    trains_P = torch.arange(10) < 6
    task = make_task(trains_P=trains_P)
    admission = Admission()
    admission.open([task])
    moved = torch.where(trains_P, SENT.weights_P + 0.1, SENT.weights_P)
    admission.check(make_update(replace(SENT, weights_P=moved)))
    moved[9] += 1e-6
    with pytest.raises(TrainingError, match=r"layer\.b has a weight that changed and was to stay"):
        admission.check(make_update(replace(SENT, weights_P=moved)))


def make_task(sent: Adapter = SENT, **changes: Any) -> ClientTask:
    training = make_recipe(training={"learning_rate": changes.pop("rate", 1e-3), "epochs": 4}).training
    values = {"round": 1, "client": 0, "rounds": 3, "seed": 0, **changes}
    return ClientTask(adapter=sent, training=training, **values)


@pytest.mark.parametrize("rate", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0])
def test_honest_skew_is_admitted_and_a_million_times_as_much_never(rate: float, scale: float) -> None:
    """As much as AdamW can move: by the learning rate in every step; as little as one step that hardly moves."""
    generator = torch.Generator().manual_seed(0)
    sent = Adapter(Layout(("w",), (torch.Size((400,)),)), scale * torch.randn(400, generator=generator))
    direction = torch.randn(400, generator=generator).sign()

    def update(size: float) -> ClientUpdate:
        return make_update(replace(sent, weights_P=sent.weights_P + size * direction))

    for first, second in [(rate, 1000 * rate), (1000 * rate, rate), (0, rate)]:
        for others in ([], [first], [first] * 5, [second, first]):
            admission = Admission()
            admission.open([make_task(sent, rate=rate)])
            for size in [*others, second]:
                admission.check(update(size))
            admission.open([make_task(sent, rate=rate)])
            admission.check(update(first))
            with pytest.raises(TrainingError, match="too large"):
                admission.check(update(1e6 * max(first, second)))
    admission = Admission()
    admission.open([make_task(sent, rate=rate)])
    with pytest.raises(TrainingError, match="too large"):
        admission.check(update(1e6 * rate))


def test_what_was_admitted_before_is_known_after_a_restore() -> None:
    tasks = [make_task(client=client) for client in range(3)]
    admission, again = Admission(max_change=2.0), Admission(max_change=2.0)
    for round in range(1, 8):
        admission.open(tasks)
        for client in range(3):
            admission.check(honest(client, round))
        assert len(admission.norms) == min(round, 5), "a run's memory does not grow with its rounds"
    again.restore(admission.norms)
    for one in (admission, again):
        one.open(tasks)
        with pytest.raises(TrainingError, match=r"and 632 is allowed"):
            one.check(weights(SENT.weights_P + 300))
        # Shown alone, a change has nothing beside it but what is remembered: 0.02 in every weight is the middle one.
        one.preview(weights(SENT.weights_P + 3))
        admitted = one.check(weights(SENT.weights_P + 3)).adapter.weights_P
        assert torch.allclose(admitted, SENT.weights_P + 0.04)
        assert one.scaled == {HOSTILE: pytest.approx(150)}


def test_no_copy_of_a_whole_model_is_made() -> None:
    import tracemalloc

    from torch.utils._python_dispatch import TorchDispatchMode

    size = 2**23
    layout = Layout(("w",), (torch.Size((size,)),))
    sent = Adapter(layout, torch.ones(size))
    trains_P = torch.ones(size, dtype=torch.bool)

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != args[0].data_ptr():
                self.bytes = max(self.bytes, result.numel() * result.element_size())
            return result

    tracemalloc.start()
    admission = Admission()
    admission.open([make_task(sent, trains_P=trains_P)])
    update = make_update(replace(sent, weights_P=sent.weights_P * 1.01))
    with Largest() as largest:
        admission.check(update)
    assert 0 < largest.bytes <= 2**23, "8 bytes for each weight of a chunk, whatever the model's size"
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


ANY_NUMBER = st.one_of(
    st.integers(), st.floats(), st.integers(1, 100), st.sampled_from([0, -1, 10**400, "1", None, True, math.nan])
)
FIELDS = ("round", "client", "examples", "tokens", "steps", "loss_mean", "drift", "seconds", "holdout_loss_after")


@st.composite
def any_updates(draw: st.DrawFn) -> ClientUpdate:
    """An honest update with its report, its layout, its dtype or its values altered."""
    update = honest(draw(st.integers(0, 4)))
    if draw(st.booleans()):
        fields = draw(st.dictionaries(st.sampled_from(FIELDS), ANY_NUMBER, max_size=2))
        if draw(st.booleans()):
            update = replace(update, report=replace(update.report, **fields))
    layout, values = LAYOUT, update.adapter.weights_P.clone()
    if draw(st.booleans()):
        shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=3))
        names = [draw(st.sampled_from(["layer.a", "layer.b", "", "x\x1b[31m"])) for _ in shapes]
        layout = Layout(tuple(names), tuple(torch.Size(shape) for shape in shapes))
        values = torch.zeros(draw(st.sampled_from([layout.size, 10, 0, 1])))
    elif draw(st.booleans()):
        place = draw(st.integers(0, 9))
        values[place] = draw(st.one_of(st.floats(width=32), st.sampled_from([math.nan, math.inf, -3e38, 1e30])))
    dtype = draw(st.sampled_from([torch.float32] * 4 + [torch.float64, torch.float16, torch.int64, torch.bool]))
    return replace(update, adapter=Adapter(layout, values.to(dtype)))


@pytest.mark.long
@settings(max_examples=300, deadline=None, derandomize=True)
@given(updates=st.lists(any_updates(), max_size=8), strategy=st.sampled_from(RULES))
def test_any_updates_make_a_finite_model_or_are_refused(updates: list[ClientUpdate], strategy: str) -> None:
    check_any(updates, strategy)


def check_any(updates: list[ClientUpdate], strategy: str) -> None:
    try:
        result = one_round([*updates], strategy, max_lost=5)
    except TrainingError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\x1b" not in refusal
    if refusal:
        return
    assert result.adapter.layout == LAYOUT
    assert result.adapter.weights_P.dtype == torch.float32
    assert result.adapter.weights_P.isfinite().all()
    assert (result.adapter.weights_P - SENT.weights_P).abs().max() < 10_000


def test_a_server_without_the_gate_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that these tests must not let through: whatever comes is aggregated."""
    monkeypatch.setattr(Admission, "check", lambda self, update: update)
    monkeypatch.setattr(Admission, "unexpected", lambda self, result: None)
    others: list[ClientResult] = [honest(client) for client in range(5) if client != HOSTILE]
    right = one_round(others).adapter.weights_P
    corrupted, ended = [], []
    for what, (hostile, _) in REFUSED.items():
        try:
            found = one_round([*others, hostile]).adapter
        except Exception:  # of any kind: nothing is checked
            ended.append(what)
        else:
            if found.weights_P.shape != right.shape or not torch.equal(found.weights_P, right):
                corrupted.append(what)
    print(f"without the admission {len(corrupted)} of {len(REFUSED)} corrupt the model, {len(ended)} end the run")
    assert set(corrupted) | set(ended) == set(REFUSED) - {"no examples"}, "which weighs nothing"
    assert {"1e30", "-15 examples", "1e18 examples"} <= set(corrupted)
    assert "NaN in an entry" in ended, "the round looks at what the strategy made"
