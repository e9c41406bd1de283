"""Each sentence has a run that calls for it and one in which it stays silent."""
# ruff: noqa: E501 - a case is a line

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run

from fedloom.records.run import Run
from fedloom.report import observations as o

FALLING = [3.0, 2.5, 2.2, 2.0]
SLOWER = [3.0, 2.79, 2.775, 2.765, 2.759, 2.754, 2.7493, 2.7445]
"""Its last round brings 2 % of the whole fall, and forty more rounds as much again."""
FLAT = [3.0, 2.5, 2.3, 2.25, 2.24, 2.2399, 2.2398, 2.2397]
OVERFIT = [3.0, 2.0, 1.9, 2.1, 2.3]
FALLS_AGAIN = [3.0, 2.0, 1.9, 2.1, 2.3, 2.2]
LEARNT = [2.9, 1.9, 1.7, 1.5, 1.3]
"""Training losses of its rounds, which fall on."""
ALTERNATE = {1: {"shares": {"0": 1.0}}, 2: {"shares": {"1": 0.6, "2": 0.4}}}
SLOW_EVALUATION = {"train": [0, 1, 1, 1], "evaluate": [9, 9, 9, 9]}
SHARES = {"0": 0.1, "1": 0.1, "2": 0.8}
ALONE = {"local": {"0": {"losses": [3.0, 2.3], "tokens": 9}}}
QUIZ = {"task": "quiz", "kind": "choice", "digest": "d"}
RIGHT = {"accuracy": {"value": 0.5, "low": 0.2, "high": 0.8, "interval": "Wilson, 95 %", "of": 4, "right": 2}}
EVEN = {"train": [0, 1.33, 1.33, 1.33], "evaluate": [1, 1, 1, 1]}

CASES: list[tuple[Callable[[Run], str | None], dict[str, Any], str, dict[str, Any]]] = [
    (o.the_fall, {"central": FALLING}, "fell by 1.0000 nats a token, from 3.0000 to 2.0000 (-33.3 %)", {"central": [3.0]}),
    (o.the_fall, {"central": [2.0, 2.5]}, "rose by 0.5000", {"central": [None, None]}),
    (o.the_fall, {"central": [2.0, 2.5, 2.00001]}, "The central loss stayed at 2.0000 nats a token, in 2 rounds.", {"central": [3.0]}),
    (o.its_pace, {"central": [3.0, 3.1, 2.8, 2.6]}, "In the first round it rose by 0.1000 and the last round brought 0.2000: the", {"central": FALLING[:3]}),
    (o.its_pace, {"central": FALLING}, "first round brought 0.5000 of it and the last round 0.2000: the central loss was lower in round 3 than ever, and so few rounds can't tell", {"central": FALLING[:3]}),
    (o.its_pace, {"central": SLOWER[:6]}, "the last round 0.0050: the central loss was lower in round 5 than ever", {"central": [2.0, 2.5, 2.6, 2.7]}),
    (o.its_pace, {"central": SLOWER}, "of it, each of the last 3 0.0048 on average: the central loss was still falling in round 7", {"central": [3.0, 2.0, 1.9, 2.4]}),
    (o.its_pace, {"central": FLAT}, "each of the last 3 0.0001 on average: the central loss had levelled off", {"central": [*FLAT, 2.24]}),
    (o.the_best_round, {"central": OVERFIT}, "best round is 2 (1.9000), not the last: the central loss was 0.4000 higher", {"central": FALLING}),
    (o.overfitting, {"central": OVERFIT, "train": LEARNT}, "Overfitting sets in at round 3: from there the central loss stays above its best while the training loss falls.", {"central": [3.0, 2.0, 1.9, 2.1, 2.0]}),
    (o.overfitting, {"central": FALLS_AGAIN, "train": [*LEARNT[:3], 2.0, 2.1]}, "From round 3 on the central loss stays above its best, and the training loss did not fall either: it diverges", {"central": FALLING}),
    (o.overfitting, {"central": OVERFIT, "train": [None] * 4}, "From round 3 on the central loss stays above its best.", {"central": FALLING}),
    (o.the_gap, {"central": FALLING, "train": [2.0, 1.8, 1.5]}, "In round 3 the training loss is 0.5000 below the central loss", {"central": FALLING}),
    (o.the_gap, {"central": [*FALLING, None], "train": [2.0, 1.8, 1.5, 1.0]}, "In round 3 the training loss is 0.5000 below", {"central": [*FALLING, None], "train": [2.5, 2.2, 2.0, 1.0]}),
    (o.the_clients, {"central": [3, 2], "clients": [[3, 2.0], [3, 2.1], [3, 2.6]]}, "client 0 ends at 2.0000 and client 2 at 2.6000, 27 %", {"central": [3, 2], "clients": [[3, 2.0], [3, 2.05]]}),
    (o.the_unscored, {"central": FALLING, "clients": [FALLING, FALLING], "more": {2: {"client_losses": {"0": 2.2}}, 3: {"client_losses": {"0": 2.0}}}}, "not always scored (client 1's in 2 of 4 rounds): the clients' hold-out loss of those rounds is over the others'", {"central": FALLING, "clients": [FALLING, FALLING], "more": {2: {"client_losses": {}}}}),
    (o.the_unscored, {"central": FALLING, "clients": [FALLING], "plan": {"clients": [{"holdout_tokens": 9}] * 2}}, "(client 1's in 4 of 4 rounds)", {"central": FALLING, "plan": {"clients": [{"holdout_tokens": 9}] * 2}}),
    (o.the_proximal_term, {"central": FALLING}, "With μ = 0.1 the proximal gradient was 6 %", {"central": FALLING, "training": {"proximal_mu": 0.0}}),
    (o.the_proximal_term, {"central": FALLING, "more": {3: {"proximal_ratio": 16.3}}}, "was 16 times the loss gradient in the last round (at most 16 times it in any round). With more", {"central": [3.0]}),
    (o.the_time, {"central": FALLING, "seconds": SLOW_EVALUATION}, "Evaluation took 92 % of the time in rounds.", {"central": FALLING, "seconds": EVEN}),
    (o.the_absent, {"central": FALLING, "more": {2: {"away": {"1": 57.6}}, 3: {"away": {"2": 130.0}}}}, "Rounds waited for clients that were away: round 3 for client 2, 2:10; round 2 for client 1, 0:58.", {"central": FALLING}),
    (o.the_lost, {"central": FALLING, "lost": {2: [1]}}, "lost in 1 of 3 rounds (round 2: 1)", {"central": FALLING}),
    (o.the_refused, {"central": FALLING, "refused": {2: ["late"], 3: ["second"]}}, "2 updates that nobody had asked for were refused, the last: second", {"central": FALLING}),
    (o.the_weight, {"central": FALLING, "more": {1: {"shares": SHARES}, 2: {"shares": {"0": 0.5, "2": 0.5}}}}, "Client 2 had up to 80 % of a round's weight, more than all others together.", {"central": FALLING, "more": {1: {"shares": {"0": 0.5, "2": 0.5}}}}),
    (o.the_weight, {"central": FALLING, "more": ALTERNATE}, "In some round, each of these had more of the weight than all others together: client 0 (up to 100 %), client 1 (up to 60 %).", {"central": FALLING}),
    (o.the_weight, {"central": FALLING, "more": {2: {"shares": SHARES, "capped": [2]}}, "federation": {"max_share": 0.8}}, "Capped at 80 % of the weight (federation.max_share): client 2.", {"central": FALLING}),
    (o.the_scaled, {"central": FALLING, "more": {1: {"scaled": {"1": 12.0}}, 3: {"scaled": {"1": 1234.5}}}}, "scaled down: client 1 (up to 1,234 times)", {"central": FALLING}),
    (o.the_memory, {"central": FALLING, "at_once": {2: 4}}, "not enough in round 2: 4 clients at once from then on", {"central": FALLING}),
    (o.the_payload, {"central": FALLING}, "18.0 kB of adapters were exchanged in training; the whole model would have been 399 times", {"central": [3.0]}),
    (o.tell_tasks, {"central": FALLING, "evaluations": [{**QUIZ, "measures": RIGHT}, {**QUIZ, "round": 3, "measures": RIGHT}]}, "can't tell the adapter from the base model: quiz (50.0 to 50.0 %, accuracy)", {"central": FALLING, "evaluations": [{**QUIZ, "measures": RIGHT}]}),
    (o.did_it_help, {"central": FALLING, "baselines": ALONE}, "Judged by the central hold-out (24 documents), federation helped: its best loss is 0.3000 nats", {"central": FALLING}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "triggers", "says", "silent"), CASES)
def test_a_sentence_is_said_where_it_holds_and_only_there(
    rule: Callable[[Run], str | None], triggers: dict[str, Any], says: str, silent: dict[str, Any], tmp_path: Path
) -> None:
    said = rule(make_run(tmp_path / "says", triggers.pop("central"), **triggers))
    assert said is not None
    assert says in said
    assert rule(make_run(tmp_path / "silent", silent.pop("central"), **silent)) is None


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, *_ in CASES} == set(o.RULES)
