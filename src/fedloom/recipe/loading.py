"""Reading recipes: TOML and overrides become a frozen, validated Recipe. No torch here.

A key left out has its default; an unknown key or a bad value is an error that names the nearest valid key, the file
and the line. Nothing is silently corrected.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import tomlkit
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedloom.errors import RecipeError
from fedloom.progress import Say
from fedloom.recipe.choices import CHOICES, settle
from fedloom.recipe.data_section import TOKENIZERS, Data
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.section import IN_WORDS
from fedloom.text import nearest

SWEEP_TABLE = "sweep"
"""Table of a recipe with the axes of its sweep: no part of any one run."""
SCHEME = re.compile(r"[a-z]+:")
"""Beginning of a source that is no path: `random:tiny-opt`, say."""


def load_recipe(
    source: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    complete: Callable[[Data], Mapping[str, str]] | None = None,
    say: Say | None = None,
) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name, with `section.key=value` overrides on top.

    A relative path is found beside the recipe's file, one of an override in the working folder; both become absolute.
    `complete` returns keys of `data` that its section has not, before it is looked at what can be combined. Where an
    override chooses another method, strategy or the like, keys that the recipe has for its own are left out, and `say`
    is told; with nobody to tell, they are refused. A `[sweep]` table is left to `fedloom sweep`.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key, or a bad value.
    """
    text, where = find_recipe(source)
    values = read_toml(text, where)
    if values.pop(SWEEP_TABLE, None) is not None and say is not None:
        say(SWEEP_TABLE, f"the axes in [{SWEEP_TABLE}] are for `fedloom sweep`: one run has none")
    chosen = [choice.chosen(values) for choice in CHOICES]
    beside = Path(where).expanduser().parent
    make_absolute(values, beside)
    overridden = [_apply_override(values, override) for override in overrides]
    if say is not None:
        for sentence in settle(values, chosen, overridden):
            say("choice", sentence)
    make_absolute(values, Path.cwd())
    read_chat_template(values, Path.cwd() if "data.chat_template" in overridden else beside)
    if complete is not None:
        with suppress(KeyError, ValidationError):  # what is wrong with the section is said of the whole recipe
            values["data"] |= complete(Data.model_validate(values["data"]))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _recipe_error(error, text, where, overridden) from None


def read_toml(text: str, where: str) -> dict[str, Any]:
    """Read a text that a person wrote as TOML.

    Raises:
        RecipeError: it is none; says on which line.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # brackets in brackets, a thousand deep
        raise RecipeError(f"not valid TOML: {error}", where=where, mend=_mend_of(text, str(error))) from None


def _mend_of(text: str, error: str) -> str:
    """Return what to do about a line that is no TOML, where it is what people often write."""
    line = re.search(r"at line (\d+)", error)
    written = text.splitlines()[int(line[1]) - 1] if line and int(line[1]) <= len(text.splitlines()) else ""
    if re.search(r'"[^"]*\\[^"]*"', written):
        return "write a path with slashes, or in single quotes: a backslash in double quotes begins an escape"
    return ""


def make_absolute(values: Mapping[str, Any], folder: Path) -> None:
    """Replace relative paths in a recipe's values that lead from the folder to a file or folder by absolute ones.

    What leads nowhere stays as it is: it may be a name on a hub, or of tasks that ship.
    """
    for section in ("model", "data"):
        if isinstance(table := values.get(section), dict) and isinstance(table.get("source"), str):
            table["source"] = absolute_source(table["source"], folder)
    table = values.get("evaluation")
    if isinstance(table, dict) and isinstance(tasks := table.get("tasks"), list):
        table["tasks"] = [absolute_source(name, folder) if isinstance(name, str) else name for name in tasks]


def absolute_source(written: str, folder: Path) -> str:
    """Return the path of a file or folder, absolute where it leads from the folder to one; anything else as it is."""
    if not written or SCHEME.match(written):
        return written
    with suppress(OSError, RuntimeError, ValueError):  # a name too long, no home folder for ~, a NUL
        path = folder.resolve() / Path(written).expanduser()
        # A file without a suffix is nothing that can be read, and may have the name of a model.
        if path.is_dir() or (path.suffix and path.is_file()):
            return str(path)
    return written


def read_chat_template(values: Mapping[str, Any], folder: Path) -> None:
    """Put the words of a chat template in the place of the path that a recipe's values have, so that they travel.

    Raises:
        RecipeError: there is no such file.
    """
    table = values.get("data")
    named = table.get("chat_template") if isinstance(table, dict) else None
    # A template has braces; a path may have them and never a line's end.
    if not isinstance(table, dict) or not isinstance(named, str) or "{" in named or named == TOKENIZERS:
        return
    try:
        table["chat_template"] = (folder / Path(named).expanduser()).read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(
            f"the chat template can't be read: {why}",
            where=f'data.chat_template = "{named[:200]}"',
            mend="name a file beside the recipe, or leave it out for the tokenizer's own",
        ) from None


def recipe_to_toml(recipe: Recipe) -> str:
    """Write a recipe as TOML: only the keys that were set, so that `load_recipe` gives the same recipe again."""
    return tomlkit.dumps(recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True))


def shipped_recipes() -> dict[str, str]:
    """Return the TOML text of each recipe in the package, by its name, in alphabetical order."""
    return read_shipped("shipped")


def read_shipped(folder: str) -> dict[str, str]:
    """Return the TOML text of each file in a folder of this room, by its name, in alphabetical order."""
    return {
        item.name.removesuffix(".toml"): item.read_text(encoding="utf-8")
        for item in sorted((resources.files("fedloom.recipe") / folder).iterdir(), key=lambda item: item.name)
        if item.name.endswith(".toml")
    }


def find_recipe(source: str | Path) -> tuple[str, str]:
    """Return the text of a recipe file or a shipped recipe, and its name for messages.

    Raises:
        RecipeError: there is no such recipe, or the file can't be read.
    """
    return find_text(source, shipped_recipes(), "recipe")


def find_text(source: str | Path, shipped: Mapping[str, str], what: str) -> tuple[str, str]:
    """Return the text of a file, or of one that ships by its name, and its name for messages; `what` it is, in a word.

    Raises:
        RecipeError: there is none, or the file can't be read.
    """
    path = Path(source)
    if path.suffix == ".toml" or len(path.parts) > 1:
        try:
            return path.expanduser().read_text(encoding="utf-8-sig"), str(path)
        except UnicodeDecodeError:
            raise RecipeError(f"can't read the {what}: not UTF-8 text", where=str(path)) from None
        except (OSError, RuntimeError, ValueError) as error:  # the last two: no home folder for ~, a NUL in the path
            reason = getattr(error, "strerror", None) or "not a valid path"
            raise RecipeError(f"can't read the {what}: {reason}", where=str(path)[:200]) from None
    if str(source) not in shipped:
        raise RecipeError(
            f'no shipped {what} is named "{source}"',
            mend=f"{nearest(str(source), list(shipped))}; the path of your own file must end in .toml",
        )
    return shipped[str(source)], f"{what} {source}"


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set one `dotted.key=value` in the values and return the dotted key.

    Raises:
        RecipeError: the override has no key or no value, or its key goes on below a value.
    """
    dotted, equals, value = override.partition("=")
    *sections, key = dotted.strip().split(".")
    # Of a value with a line end in it, only the first line would be read below; the rest would be lost in silence.
    if not equals or not key or not all(sections) or "\n" in override or not override.isprintable():
        raise RecipeError(f"{override!r} is not an override", mend="write section.key=value, as in training.epochs=2")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f'"{section}" is a value, not a section', where=f"override {override}")
    try:
        table[key] = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        table[key] = value.strip()  # a bare word is a string: model.source=facebook/opt-350m
    return dotted.strip()


def _recipe_error(error: ValidationError, text: str, where: str, overridden: list[str]) -> RecipeError:
    """Turn the first of pydantic's complaints into an error of one line, with the file and line or the override."""
    first = error.errors(include_url=False)[0]
    # A location also names the member of a union or the index in a list; an unknown key is no word of the recipe.
    *above, last = map(str, first["loc"])
    words = _words_of(Recipe)
    path = [part for part in above if part in words]
    if last in words or first["type"] == "extra_forbidden":
        path.append(last)
    dotted = ".".join(path)
    if any(f"{dotted}.".startswith(f"{key}.") or key.startswith(f"{dotted}.") for key in overridden):
        where = "override"
    elif line := line_of(text, path):
        where = f"{where}:{line}"
    return explain_key(first, dotted, where, _keys_at(path[:-1]), show_value(first["input"]))


def explain_key(first: ErrorDetails, key: str, where: str, known: list[str], shown: str = "") -> RecipeError:
    """Turn one of pydantic's complaints into an error of one line about a key; `known` are those that may be meant."""
    if first["type"] == "extra_forbidden":
        return RecipeError(f"unknown key `{key}`", where=where, mend=nearest(key.rpartition(".")[2], known))
    if first["type"] == "missing":
        return RecipeError(f"`{key}` is missing", where=where, mend="it has no default: set it")
    # TOML has lists and tables, and no tuples, dictionaries or classes.
    message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    if first["type"] == "string_pattern_mismatch":
        pattern = first["ctx"]["pattern"]
        message = f"input should be {IN_WORDS.get(pattern, pattern)}"
    message = re.sub(r"valid dictionary( or instance of \w+)?", "table", message)
    message = re.sub(r"tuple should have at least 1 item.*", "list should not be empty", message, flags=re.IGNORECASE)
    return RecipeError(f"{key and f'`{key}`: '}{message[0].lower()}{message[1:]}{shown}", where=where)


def show_value(value: object) -> str:
    """Quote a wrong value for an error; return an empty text for a whole table, or if it is too long to help."""
    if not isinstance(value, str | int | float | list):
        return ""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in a list in a list ...
        return ""
    return f", not {text}" if len(text) <= 80 else ""


def _subsections(section: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the keys of a section that are sections themselves, with their types."""
    found = {key: _section_in(field.annotation) for key, field in section.model_fields.items()}
    return {key: kind for key, kind in found.items() if kind}


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key's type is or may be: `Section | None`, or a name or a section, say."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = get_args(annotation) if get_origin(annotation) in (Annotated, UnionType, Union) else ()
    return next(filter(None, map(_section_in, parts)), None)


def _keys_at(path: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        if part not in _subsections(section):
            return []
        section = _subsections(section)[part]
    return list(section.model_fields)


def list_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a recipe."""
    nested = _subsections(section)
    for key in section.model_fields:
        if key in nested:
            yield from list_keys(nested[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _words_of(section: type[BaseModel]) -> set[str]:
    """Return every key of a section and of the sections below it."""
    return set(section.model_fields).union(*map(_words_of, _subsections(section).values()))


def line_of(text: str, path: list[str]) -> int | None:
    """Return the number of the line that sets a dotted key, or the nearest section above it; None if none does."""
    # tomllib tells no lines. The text is known to be valid TOML here, so looking at headers and equal signs is enough.
    header: list[str] = []
    best: tuple[int, int] | None = None
    inside = ""
    for number, line in enumerate(text.split("\n"), start=1):
        # A text over several lines may hold lines that look like keys.
        quotes = re.findall(r'"""|\'\'\'', line)
        if inside:
            inside = "" if inside in quotes else inside
            continue
        stripped = line.split("#", 1)[0].strip()
        here = header
        if stripped.startswith("["):
            here = header = _dotted(stripped.strip("[]"))
        elif "=" in stripped:
            here = [*header, *_dotted(stripped.split("=", 1)[0])]
        if here and here == path[: len(here)] and (best is None or len(here) > best[0]):
            best = (len(here), number)
        inside = quotes[0] if len(quotes) % 2 else ""
    return best[1] if best else None


def _dotted(key: str) -> list[str]:
    return [part.strip(" \t\"'") for part in key.split(".")]


def describe_keys(section: type[BaseModel] = Recipe) -> str:
    """Return every key with its default and meaning, as Markdown: the tables of docs/recipe.md."""
    lines: list[str] = []

    def visit(section: type[BaseModel], prefix: str) -> None:
        nested = _subsections(section)
        for key, field in section.model_fields.items():
            choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
            if key in nested and not (choices := _names_in(field.annotation)):
                continue
            default = "required" if field.is_required() else _toml_value(field.default)
            known = ", ".join(f"`{choice}`" for choice in choices)
            lines.append(f"| `{prefix}{key}` | {default} | {known and known + ': '}{field.description} |")
        for key, subsection in nested.items():
            lines.extend(["", f"{subsection.__doc__}", "", "| key | default | meaning |", "|---|---|---|"])
            visit(subsection, f"{prefix}{key}.")

    lines.extend(["| key | default | meaning |", "|---|---|---|"])
    visit(section, "")
    return "\n".join(lines) + "\n"


def _names_in(annotation: Any) -> list[str]:
    """Return the names that a key may be in place of a section."""
    return [name for part in get_args(annotation) for name in ([part] if isinstance(part, str) else _names_in(part))]


def _toml_value(value: object) -> str:
    return "" if value in (None, {}) else f"`{tomlkit.item(value).as_string()}`"
