"""The kinds of values that a run directory's files have: what stands there instead is damage, and is named. No torch.

A key that is not known here is of another version, or nobody reads it: it may be anything. One that lacks is no matter
of kinds. A recipe, a plan and a client's report are of the kinds that their own classes say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Required, TypedDict, Union, get_args, get_origin, get_type_hints

from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import Plan
from fedloom.training.client_report import ClientReport

MOST = 2**63
"""Number that no count of bytes, tokens or steps comes near; digits beyond it are more than a float can hold."""
Positive = Annotated[int, (1).__le__]
ClientNumber = Annotated[str, str.isdecimal]
"""A client's number as a key of JSON."""


class StatusRecord(TypedDict, total=False):
    """Content of `status.json`."""

    state: str
    started: datetime
    updated: datetime
    round: int
    rounds: int
    error: str | None
    stopped_early: str | None
    resumed: int
    paused: float
    moved: list[str]
    moved_to: dict[str, Positive | str | list[str] | None]
    clients_at_once: Positive


class AskedRecord(TypedDict):
    """Content of a sweep's `asked.json`: what it was last started with."""

    recipe: str
    axes: list[str]
    random: int | None


class EnvironmentRecord(TypedDict, total=False):
    """Content of `environment.json`: the machine, and what is installed there."""

    python: str
    platform: str
    processor: str
    cores: int | None
    threads: int
    memory_bytes: int
    gpus: list[str]
    versions: dict[str, str]


class BaselineRecord(TypedDict, total=False):
    """A baseline: its losses by round in nats per token, or why it failed."""

    losses: list[float]
    tokens: int
    own_loss: float
    error: str
    adapter_sha256: str


class BaselinesRecord(TypedDict, total=False):
    """Content of `baselines.json`."""

    round0: BaselineRecord
    pooled: BaselineRecord
    local: dict[ClientNumber, BaselineRecord]


class OwnRecord(TypedDict, total=False):
    """A client's own adapter, or why it has none."""

    tokens: int
    steps: int
    global_loss: float
    loss: float
    adapter_sha256: str
    error: str


class PersonalisedRecord(TypedDict, total=False):
    """Content of `personalised.json`."""

    round: int
    clients: dict[ClientNumber, OwnRecord]


class ShareRecord(TypedDict, total=False):
    """A Shapley value, in nats per token."""

    value: float
    standard_error: float


class CoalitionRecord(TypedDict, total=False):
    """A federation of some of the clients, or why it failed."""

    clients: list[int]
    losses: dict[str, float]
    targets: dict[str, int]
    tokens: int
    error: str


class ContributionsRecord(TypedDict, total=False):
    """Content of `contributions.json`."""

    rounds: int
    coalitions: list[CoalitionRecord]
    leave_one_out: dict[ClientNumber, float]
    shapley: dict[ClientNumber, ShareRecord]
    orders: int


class MeasureRecord(TypedDict, total=False):
    """A measure of a task: its value, and its interval where it has one."""

    value: float
    low: float
    high: float
    interval: str
    of: int
    right: int


KINDS: Mapping[str, type] = {
    "resolved.json": Recipe,
    "plan.json": Plan,
    "status.json": StatusRecord,
    "asked.json": AskedRecord,
    "environment.json": EnvironmentRecord,
    "baselines.json": BaselinesRecord,
    "personalised.json": PersonalisedRecord,
    "contributions.json": ContributionsRecord,
    "clients.jsonl": ClientReport,
}
"""Kind of each file's objects, in a run or beside the runs of a sweep, but for those whose kinds `run.py` has."""


def find_odd(value: object, kind: Any, key: str = "") -> str | None:
    """Return the dotted key of the first value that is not of its kind, or None; `key` is that of the value itself.

    A float may be written as a whole number, and must be finite; a moment is a text with its time zone.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Required:
        return find_odd(value, parts[0], key)
    if origin in (Union, UnionType):
        found = [find_odd(value, part, key) for part in parts]
        # Of a table it is said what in it is odd, and not that it is no None.
        return None if None in found else next((one for one in found if one != key), key)
    if origin is Annotated:
        return find_odd(value, parts[0], key) or next(
            (key for holds in parts[1:] if callable(holds) and not holds(value)), None
        )
    if origin is Literal:
        return None if any(type(value) is type(one) for one in parts) else key
    if origin in (list, tuple, Sequence):
        return _find_in(list(enumerate(value)), parts[0], key) if isinstance(value, list) else key
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            return key
        odd = next((name for name in value if find_odd(name, parts[0], key)), None)
        return f"{key}.{odd}" if odd is not None else _find_in(list(value.items()), parts[1], key)
    if isinstance(kind, type) and kind.__module__.startswith("fedloom.") and (hints := _hints_of(kind)):
        if not isinstance(value, dict):
            return key
        known = [(name, hints[name]) for name in value if name in hints]
        found = [find_odd(value[name], of, f"{key}.{name}".lstrip(".")) for name, of in known]
        return next((one for one in found if one), None)
    return None if _is_a(value, kind) else key


def _find_in(parts: Sequence[tuple[object, object]], kind: Any, key: str) -> str | None:
    found = (find_odd(part, kind, f"{key}.{name}".lstrip(".")) for name, part in parts)
    return next((one for one in found if one), None)


@cache  # to work them out took most of the time in which a run is read
def _hints_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _is_a(value: object, kind: Any) -> bool:
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST
        return whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    if kind is datetime:
        return isinstance(value, str) and _is_moment(value)
    if kind in (NoneType, None):
        return value is None
    return isinstance(value, kind) if kind in (bool, str, dict, list) else True


def _is_moment(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
