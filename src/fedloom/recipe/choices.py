"""Choices by name: keys that a recipe has for one choice give way where another is made, and that is said.

A recipe for LoRA has a rank, which (IA)³ has no use for. Whoever asks for `adapter.method=ia3` means the recipe without
it. Only what stands in the recipe gives way: what a person types is used, or refused when the recipe is checked. No
torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomlkit

from fedloom.recipe.data_section import PARTITION_KEYS, Partition
from fedloom.recipe.methods import METHODS, own_keys
from fedloom.recipe.section import Section
from fedloom.recipe.sections import STRATEGY_DEFAULTS, UNWEIGHTED, Adapter, Federation, Strategy
from fedloom.recipe.training_section import OPTIMIZER_DEFAULTS, Optimizer, Training

RATE = "training.learning_rate"


@dataclass(frozen=True)
class Choice:
    """A key whose value says which other keys are used."""

    section: str
    """Dotted name of its section."""
    kind: type[Section]
    """Type of that section."""
    key: str
    uses: Callable[[str], Collection[str] | None]
    """Function from the choice to the keys of the section that it uses; None for a choice that nobody knows."""
    unused: Callable[[str], Sequence[str]] = lambda choice: ()
    """Function from the choice to dotted keys elsewhere that it has no use for."""

    @property
    def dotted(self) -> str:
        """Return the dotted key."""
        return f"{self.section}.{self.key}"

    def chosen(self, values: Mapping[str, Any]) -> object:
        """Return what a recipe's values choose, or the default."""
        table = _find(values, self.section)
        default = self.kind.model_fields[self.key].default
        return table.get(self.key, default) if isinstance(table, dict) else default


def _of_method(name: str) -> Collection[str] | None:
    # Options have PEFT's names, which another method has for something else.
    return {*own_keys(name).values()} if name in METHODS else None


def _of_strategy(kind: str) -> Collection[str]:
    return {*STRATEGY_DEFAULTS.get(kind, {}), *(() if kind in UNWEIGHTED else ("weight_by",))}


def _of_rule(rule: str) -> Collection[str]:
    return Federation.model_fields.keys() - ({"client_ranks"} if rule != "svd" else set())


CHOICES = (
    Choice(
        *("adapter", Adapter, "method", _of_method),
        lambda method: () if method == "lora" else ("federation.lora_rule", "federation.client_ranks"),
    ),
    Choice("federation", Federation, "lora_rule", _of_rule),
    Choice("federation.strategy", Strategy, "kind", _of_strategy),
    Choice("training.optimizer", Optimizer, "kind", lambda kind: {**OPTIMIZER_DEFAULTS}.get(kind)),  # type: ignore[call-overload]
    Choice("data.partition", Partition, "kind", PARTITION_KEYS.get),
)
"""Every key that is such a choice. A method is settled before the rule that it may leave out, with the rule's keys."""
OF_NO_CHOICE = {"federation", "federation.strategy.weight_by"}
"""Sections and keys that are the same whatever was chosen."""


def settle(values: dict[str, Any], before: Sequence[object], typed: Collection[str]) -> Iterator[str]:
    """Take from a recipe's values what a choice has no use for, and yield what to tell people, a sentence each.

    `before` has what the recipe itself chose, in the order of CHOICES; `typed` are the dotted keys that a person typed,
    which stay, as do those below them.
    """
    for choice, old in zip(CHOICES, before, strict=True):
        new = choice.chosen(values)
        if new == old or not isinstance(new, str) or (uses := choice.uses(new)) is None:
            continue
        named = f"{choice.dotted} = {_show(new)}"
        fields = [key for key in choice.kind.model_fields if key != choice.key]
        spare = [*(f"{choice.section}.{key}" for key in fields if key not in uses), *choice.unused(new)]
        if dropped := [found for key in spare for found in _drop(values, key, typed)]:
            yield f"{named} has no use for {', '.join(dropped)}: left out"
        kept = [f"{choice.section}.{key}" for key in fields if key in uses and choice.section not in OF_NO_CHOICE]
        stays = [key for key in kept if key not in OF_NO_CHOICE and not _is_typed(key, typed) and _has(values, key)]
        if stays:
            shown = ", ".join(f"{key} = {_show(_find(values, key))}" for key in stays)
            yield f"{named} takes what the recipe has for {_show(old)}: {shown}"
        if choice.key == "method" and not _is_typed(RATE, typed):
            has = _has(values, RATE)
            rate = _find(values, RATE) if has else Training.model_fields["learning_rate"].default
            whose = f"is what the recipe has for {_show(old)}" if has else "is the default, whatever the method"
            yield f"{RATE} = {_show(rate)} {whose}: name one where {_show(new)} wants another"


def _find(values: Mapping[str, Any], dotted: str) -> Any:
    found: Any = values
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _has(values: Mapping[str, Any], dotted: str) -> bool:
    return _find(values, dotted) is not None


def _is_typed(dotted: str, typed: Collection[str]) -> bool:
    return any(dotted == key or dotted.startswith(f"{key}.") for key in typed)


def _drop(values: dict[str, Any], dotted: str, typed: Collection[str]) -> Iterator[str]:
    """Take a key, or what of its table nobody typed, out of the values; yield it with its value."""
    section, _, key = dotted.rpartition(".")
    table = _find(values, section)
    if not isinstance(table, dict) or key not in table or _is_typed(dotted, typed):
        return
    if any(name.startswith(f"{dotted}.") for name in typed):
        for below in list(table[key]):
            yield from _drop(values, f"{dotted}.{below}", typed)
    else:
        yield f"{dotted} = {_show(table.pop(key))}"


def _show(value: object) -> str:
    return tomlkit.item(value).as_string()
