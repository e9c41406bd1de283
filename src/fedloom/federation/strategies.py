"""Choice of a strategy by its name: one of fedloom's, or one that an installed package offers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from fedloom.errors import FedloomError, RecipeError
from fedloom.federation.aggregation import STRATEGIES, Aggregate, count_trimmed
from fedloom.recipe.sections import STRATEGY_DEFAULTS

if TYPE_CHECKING:
    from fedloom.recipe.sections import Strategy

ENTRY_POINTS = "fedloom.strategies"
"""Group of entry points in which an installed package offers strategies, each a function like those of `STRATEGIES`."""


def build_strategy(strategy: Strategy) -> Aggregate:
    """Return the strategy that a recipe names: one of `STRATEGIES`, or `package:name` of an installed package.

    Raises:
        RecipeError: no such package is installed, or it offers no such strategy.
    """
    if strategy.kind in STRATEGIES:
        return STRATEGIES[strategy.kind](strategy)
    package, _, name = strategy.kind.partition(":")
    points = entry_points(group=ENTRY_POINTS)
    offered = [point for point in points if point.dist and _normal(point.dist.name) == _normal(package)]
    for point in offered:
        if point.name == name:
            return _build_offered(point, strategy)
    known = ", ".join(f"{package}:{point.name}" for point in offered)
    raise RecipeError(
        f'no installed package offers the strategy "{strategy.kind}"',
        where="federation.strategy.kind",
        mend=f"it offers: {known}" if known else f"install {package}, or name another strategy",
    )


def _build_offered(point: EntryPoint, strategy: Strategy) -> Aggregate:
    try:
        built = point.load()(strategy)
    except FedloomError:
        raise
    except Exception as error:  # of any kind: it is another package's code
        built, why = None, f"{type(error).__name__}: {error}"
    else:
        why = f"it is a {type(built).__name__}, not an Aggregate"
    if not isinstance(built, Aggregate):
        raise RecipeError(
            f'the strategy "{strategy.kind}" can\'t be built ({why[:200]})',
            where="federation.strategy",
            mend="look at its options, or ask whoever made the package",
        )
    return built


def _normal(name: str) -> str:
    """Return a package's name as PEP 503 has it: case and the kind of dash make no difference."""
    return re.sub(r"[-_.]+", "-", name).lower()


LEAST_CLIENTS: dict[str, Callable[[Strategy], int]] = {
    "krum": lambda strategy: int(2 * strategy.setting("malicious") + 3),
    "multi_krum": lambda strategy: int(max(2 * strategy.setting("malicious") + 3, strategy.setting("keep"))),
    "bulyan": lambda strategy: int(4 * strategy.setting("malicious") + 3),
    "trimmed_mean": lambda strategy: least_to_trim(strategy.setting("trim")),
}
"""Number of clients that a round must have for the papers' proofs to hold, or for the rule to have an effect."""


def least_to_trim(trim: float) -> int:
    """Return how many clients there must be for a share of them to be one client or more."""
    least = math.ceil(1 / trim) if trim else 1
    # 100 times 0.01 could be a hair less than 1.
    return least if not trim or count_trimmed(trim, least) else least + 1


def least_clients(strategy: Strategy) -> int:
    """Return how many clients a round of a strategy must have."""
    return LEAST_CLIENTS[strategy.kind](strategy) if strategy.kind in LEAST_CLIENTS else 1


def check_strategy(strategy: Strategy, clients: int) -> None:
    """Refuse a strategy that needs more clients in a round than take part.

    Raises:
        RecipeError: there are too few clients.
    """
    build_strategy(strategy)
    least = least_clients(strategy)
    if clients < least:
        raise RecipeError(
            f'"{strategy.kind}" needs {least} clients in a round, and {clients} take part',
            where="federation.strategy",
            mend="raise data.clients or federation.fraction, lower federation.max_lost_clients, or change the"
            f" strategy's {' or '.join(STRATEGY_DEFAULTS[strategy.kind])}",
        )
