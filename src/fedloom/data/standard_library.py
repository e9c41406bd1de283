"""The standard library of the Python that runs, as documents that every machine has: its files, or its functions.

Nothing of it is imported: files are read, and functions are found in their syntax.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fedloom.data.rows import Rows, as_is, refuse

FILES, FUNCTIONS = "python:stdlib", "python:functions"
"""Sources: a row for each file, or for each function that has a docstring."""
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
"""Folders that differ between installations of one Python version."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def describe_python() -> str:
    """Return the Python version that runs, which is the library's revision."""
    return f"Python {'.'.join(map(str, sys.version_info[:3]))}"


def find_library_files() -> list[tuple[str, Path]]:
    """Return each file of the library, behind its path inside of it, in the order of these."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, files in os.walk(root):
        # Changed in place: os.walk goes down into those that are left.
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return [(path.relative_to(root).as_posix(), path) for path in sorted(paths)]


def package_of(path: str) -> str:
    """Return the folder at the top of a path, or the name of a file that stands at the top itself."""
    first, *deeper = Path(path).parts
    return first if deeper else Path(first).stem


def functions_of(files: list[tuple[str, Path]]) -> Rows:
    """Yield a row for each function: `package`, `path`, `name`, `prompt`, `completion`, and both as `messages`."""
    for origin, path in files:
        try:
            text = path.read_text(encoding="utf-8-sig")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in the library's own strings
                tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError):  # not UTF-8 among them
            yield origin, partial(refuse, "not a Python file")
            continue
        lines = text.split("\n")
        for name, function in _with_docstring(tree, ""):
            if cut := _cut(function, lines):
                row = {"package": package_of(origin), "path": origin, "name": name}
                yield f"{origin}:{function.lineno}", partial(as_is, {**row, **_in_both_forms(*cut)})


def _in_both_forms(prompt: str, completion: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return {"prompt": prompt, "completion": completion, "messages": messages}


def _with_docstring(node: ast.AST, inside: str) -> Iterator[tuple[str, Function]]:
    """Yield each function that has a docstring, behind its qualified name; none that stands in another one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            if ast.get_docstring(child, clean=False):
                yield f"{inside}{child.name}", child
        else:
            yield from _with_docstring(child, f"{inside}{child.name}." if isinstance(child, ast.ClassDef) else inside)


def _cut(function: Function, lines: list[str]) -> tuple[str, str] | None:
    """Return a function's signature with its docstring, and the rest of its body, from the margin on.

    None where nothing follows on a line of its own, or where a string over several lines would change at the margin.
    """
    docstring, *body = function.body
    begin = min(node.lineno for node in (function, *function.decorator_list))
    end, last, margin = docstring.end_lineno or 0, function.end_lineno or 0, function.col_offset
    if (
        not body
        or body[0].lineno <= end
        or (margin and any(_spans_lines(node) for part in body for node in ast.walk(part)))
    ):
        return None
    moved = [line[margin:] if not line[:margin].strip() else line.lstrip() for line in lines[begin - 1 : last]]
    split = end - begin + 1
    return "".join(f"{line}\n" for line in moved[:split]), "".join(f"{line}\n" for line in moved[split:])


def _spans_lines(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant | ast.JoinedStr) and node.lineno != node.end_lineno
