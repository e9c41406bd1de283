"""Coalitions and Shapley values, against games whose values are known."""

import math
from itertools import combinations, permutations

import pytest

from fedloom.federation.coalitions import (
    MOST_CLIENTS,
    ORDERS,
    Coalition,
    coalitions_to_train,
    draw_orders,
    shapley_values,
    without_each,
)


def every_coalition(clients: range) -> list[Coalition]:
    return [frozenset(some) for size in range(len(clients) + 1) for some in combinations(clients, size)]


def test_without_each_stand_all_others() -> None:
    assert without_each([1, 4, 6]) == {1: {4, 6}, 4: {1, 6}, 6: {1, 4}}


@pytest.mark.parametrize("number", [2, 3, 4])
def test_of_few_clients_every_coalition_is_trained_but_nobody_and_everybody(number: int) -> None:
    orders = draw_orders(range(number), seed=3)
    assert len(orders) == math.factorial(number)
    found = coalitions_to_train(range(number), orders)
    assert len(found) == len({*found}) == 2**number - 2


def test_of_more_clients_some_orders_are_drawn_and_of_many_none() -> None:
    clients = range(MOST_CLIENTS)
    orders = draw_orders(clients, seed=3)
    assert len({*orders}) == ORDERS
    assert all(sorted(order) == [*clients] for order in orders)
    assert draw_orders(clients, seed=3) == orders != draw_orders(clients, seed=4)
    found = coalitions_to_train(clients, orders)
    assert {*without_each(clients).values()} <= {*found}
    assert len(found) <= MOST_CLIENTS + ORDERS * (MOST_CLIENTS - 1)
    assert not draw_orders(range(MOST_CLIENTS + 1), seed=3)
    assert len(coalitions_to_train(range(MOST_CLIENTS + 1), [])) == MOST_CLIENTS + 1
    assert not coalitions_to_train(range(1), draw_orders(range(1), seed=3))


def test_one_left_glove_and_two_right_ones() -> None:
    """A pair is worth 1: the left one has 2/3 of it, each right one 1/6 (the textbook's game)."""
    clients = range(3)
    losses = {some: -float(0 in some and len(some) > 1) for some in every_coalition(clients)}
    found = shapley_values(losses, draw_orders(clients, seed=0))
    assert [found[client].value for client in clients] == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert all(one.standard_error == 0 for one in found.values())


def test_where_clients_do_not_touch_each_other_each_has_what_it_adds() -> None:
    adds = [0.5, 0.0, -0.25, 1.0, 0.125, 2.0]
    losses = {some: 9.0 - sum(adds[client] for client in some) for some in every_coalition(range(6))}
    found = shapley_values(losses, draw_orders(range(6), seed=1))
    assert [found[client].value for client in range(6)] == pytest.approx(adds)
    assert all(one.standard_error == pytest.approx(0, abs=1e-12) for one in found.values())


def test_drawn_values_add_up_and_are_as_uncertain_as_they_say() -> None:
    """Over many seeds, values lie about the true ones as far as their standard errors tell."""
    clients = range(6)
    losses = {some: -float(sum(client + 1 for client in some) ** 2) for some in every_coalition(clients)}
    # All orders of six clients: what the drawn ones estimate.
    true = shapley_values(losses, [*permutations(clients)])
    away = []
    for seed in range(200):
        found = shapley_values(losses, draw_orders(clients, seed))
        assert sum(one.value for one in found.values()) == pytest.approx(21**2)
        away.append((found[5].value - true[5].value) / found[5].standard_error)
    assert true[5].standard_error == 0
    assert 0.8 < math.sqrt(sum(one**2 for one in away) / len(away)) < 1.6
    assert abs(sum(away) / len(away)) < 0.3
