"""Shares of the clients in a round's weight, before any round: what a plan shows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedloom.federation.admission import ClientSize
from fedloom.federation.aggregation import WEIGHTS
from fedloom.federation.shares import cap_weights, to_shares

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation
    from fedloom.records.plan import Plan


def plan_shares(plan: Plan, section: Federation, names: Sequence[str] = ()) -> Plan:
    """Return the plan with each client's share were all in a round; as it is where the strategy weighs nobody.

    Clients have numbers where `names` is empty.
    """
    if not section.strategy.weighs or plan.strategy:
        return plan
    weigh, tokens = WEIGHTS[section.strategy.weight_by], plan.tokens_of_each
    told = {
        number: weigh(ClientSize(client.blocks, round(tokens[number])))
        for number, client in enumerate(plan.clients)
        if client.steps
    }
    capped = cap_weights(told, section.max_share)

    def name(shares: dict[int, float], only: Sequence[int]) -> dict[str, float]:
        return {names[number] if names else f"client {number}": shares[number] for number in only}

    lowered = [number for number in told if capped[number] < told[number]]
    return replace(plan, shares=name(to_shares(capped), list(told)), capped=name(to_shares(told), lowered))
