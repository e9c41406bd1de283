"""Write what the pages say of the code: the recipe's keys, methods, strategies, commands and rooms.

Each such part stands in a page between `<!-- generated: NAME -->` and `<!-- end of NAME -->`, is made from the code by
a function here, and is never written by hand. `scripts/write_pages.py --check` writes nothing, and exits with 1 where
a page is out of date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer

from fedloom.cli import app
from fedloom.deployment.client import policy
from fedloom.deployment.message_fields import describe_answers, describe_questions, describe_refusals
from fedloom.federation.aggregation import describe_strategies
from fedloom.federation.lora_rules import describe_lora_rules
from fedloom.recipe.loading import describe_keys, load_recipe, shipped_recipes
from fedloom.recipe.methods import describe_methods
from fedloom.recipe.task_files import load_tasks, shipped_tasks
from fedloom.recipe.task_section import Task

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "fedloom"
STRUCTURE = ROOT / "tests" / "test_structure.py"


def describe_recipes() -> str:
    """Return the recipes that ship, each with its own description, as a Markdown table; those for a GPU last."""
    told = {name: escape(load_recipe(name).description) for name in shipped_recipes()}
    rows = [f"| `{name}` | {told[name]} |" for name in sorted(told, key=lambda name: "for a GPU" in told[name])]
    return "\n".join(["| recipe | what it is |", "|---|---|", *rows]) + "\n"


def describe_tasks() -> str:
    """Return the files of tasks that ship, each with its tasks, as a Markdown table."""
    rows = [
        f"| `{name}` | {', '.join(f'`{task.name}` ({task.kind})' for task in load_tasks([name]).tasks)} |"
        for name in shipped_tasks()
    ]
    return "\n".join(["| file | its tasks |", "|---|---|", *rows]) + "\n"


def describe_commands() -> str:
    """Return every command with its arguments and options, as the command line itself knows them."""
    commands = list(list_commands(typer.main.get_command(app), "fedloom"))
    lines = ["| command | what it does |", "|---|---|"]
    lines += [
        f"| [`{name}`](#{name.replace(' ', '-')}) | {escape(first_paragraph(command.help))} |"
        for name, command in commands
    ]
    for name, command in commands:
        lines += ["", f"## {name}", "", escape(command.help), "", "```", " ".join([name, *map(usage, command.params)])]
        lines += ["```"]
        told = [(option, option.help) for option in command.params if option.help]
        if told:
            lines += ["", "| argument or option | meaning |", "|---|---|"]
            lines += [f"| `{label(option)}` | {escape(words)}{default(option)} |" for option, words in told]
    return "\n".join(lines) + "\n"


def list_commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield each command by its full name, those of groups too."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from list_commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def label(option: Any) -> str:
    """Return an argument's placeholder, or an option as it is typed, with a word for its value."""
    if not option.opts[0].startswith("-"):
        return str(option.metavar or f"[{option.name.upper()}]" if not option.required else option.make_metavar(None))
    return option.opts[0] if option.is_flag else f"{option.opts[0]} {option.name.upper()}"


def usage(option: Any) -> str:
    """Return an argument or option as the usage line shows it: in brackets where it may be left out."""
    shown = label(option)
    return shown if option.required or shown.startswith("[") else f"[{shown}]"


def default(option: Any) -> str:
    """Return what an option is where it is left out, if it is anything."""
    no_value = option.default in (None, False) or getattr(option, "is_flag", False)  # an argument is never a flag
    return "" if no_value else f" Left out: `{option.default}`."


def escape(text: str) -> str:
    """Return text that stands in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def describe_rooms(title: str, layers: str, folder: Path) -> str:
    """Return the rooms of a folder from the ground up, each with the first words of its docstring, as a table."""
    lines = [f"| {title} | floor | what it is for |", "|---|---|---|"]
    for floor, rooms in enumerate(read_layers(layers), start=1):
        lines += [f"| `{room}` | {floor} | {escape(first_words(folder, room))} |" for room in rooms]
    return "\n".join(lines) + "\n"


def read_layers(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the floors that `tests/test_structure.py` holds the package to."""
    for node in ast.parse(STRUCTURE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            layers: tuple[tuple[str, ...], ...] = ast.literal_eval(node.value)
            return layers
    raise LookupError(f"{STRUCTURE} has no {name}")


def first_words(folder: Path, room: str) -> str:
    """Return the first paragraph of a package's or a module's docstring."""
    path = folder / room / "__init__.py" if (folder / room).is_dir() else folder / f"{room}.py"
    return first_paragraph(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def first_paragraph(text: str) -> str:
    """Return what stands before the first empty line of a text."""
    return text.partition("\n\n")[0]


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/recipe.md": {"recipes": describe_recipes, "keys": describe_keys},
    "docs/tasks.md": {"tasks": describe_tasks, "task keys": partial(describe_keys, Task)},
    "docs/methods.md": {"methods": describe_methods},
    "docs/strategies.md": {"strategies": describe_strategies, "lora rules": describe_lora_rules},
    "docs/commands.md": {"commands": describe_commands},
    "docs/messages.md": {
        "questions": describe_questions,
        "answers": describe_answers,
        "refusals": describe_refusals,
    },
    "docs/deploy.md": {"policy": policy.describe_keys},
    "docs/architecture.md": {
        "rooms": partial(describe_rooms, "room", "LAYERS", SOURCE),
        "deployment": partial(describe_rooms, "inside `deployment`", "DEPLOYMENT", SOURCE / "deployment"),
    },
}
"""Page -> the parts of it that are generated, by name."""


def renew(page: str) -> str:
    """Return a page's text with its generated parts as the code has them now.

    Raises:
        LookupError: the page has no place for one of them.
    """
    return fill(page, {name: describe() for name, describe in PARTS[page].items()})


def fill(page: str, parts: Mapping[str, str]) -> str:
    """Return a page's text with these parts of it, by name, in the place of what stands there.

    Raises:
        LookupError: the page has no place for one of them.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, told in parts.items():
        begin, end = f"<!-- generated: {name} -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise LookupError(f"{page} has no place for {name}: {begin.strip()} … {end.strip()}")
        text = f"{before}{begin}\n{told.strip()}\n\n{end}{after}"
    return text


def main() -> int:
    """Write every page that is out of date, or name those that are."""
    check, stale = "--check" in sys.argv[1:], []
    for page in PARTS:
        renewed = renew(page)
        if renewed != (ROOT / page).read_text(encoding="utf-8"):
            stale.append(page)
            if not check:
                (ROOT / page).write_text(renewed, encoding="utf-8")
    for page in stale:
        print(f"{page} {'is out of date: run make pages' if check else 'is written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
