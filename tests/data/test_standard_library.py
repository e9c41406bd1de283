"""Functions of the standard library as prompts and answers."""

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_recipe

from fedloom.data.documents import load_documents
from fedloom.data.rows import UnreadableError
from fedloom.data.splits import split_documents
from fedloom.data.standard_library import Function, find_library_files, functions_of

SOURCE = '''
class Box:
    @property
    def size(self) -> int:
        """Say how large
        it is."""
# a comment at the margin
        return max(
            1, 2)

    def text(self):
        """Has a string over lines, which would change at the margin."""
        return """one
        two"""

    def only(self):
        """Has nothing else."""

    def plain(self):
        return 1


async def wait():
    """Waits."""
    def inner():
        """Is inside of another one."""
        return 2
    return inner


def one_line(): "says"; return 3
'''


def functions_in(path: Path) -> list[dict[str, Any]]:
    return [dict(open_row()) for _, open_row in functions_of([(path.name, path)])]


def without_docstrings_margin(function: Function) -> str:
    function.body[0] = ast.Expr(ast.Constant(" ".join((ast.get_docstring(function) or "").split())))
    return ast.dump(function)


def test_prompt_and_completion_are_the_function_again() -> None:
    """In a part of the library that has methods, decorators, strings over lines and functions in functions."""
    files = [file for file in find_library_files() if file[0].startswith(("a", "j", "pathlib", "random"))]
    functions = {}
    for origin, path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                functions[f"{origin}:{node.lineno}"] = node
    rows = list(functions_of(files))
    assert len(rows) > 300
    indented = 0
    for origin, open_row in rows:
        row, original = open_row(), functions[origin]
        (again,) = ast.parse(row["prompt"] + row["completion"]).body
        indented += original.col_offset > 0
        assert isinstance(again, Function)
        assert row["name"].rpartition(".")[2] == again.name
        assert without_docstrings_margin(again) == without_docstrings_margin(original), origin
        # The docstring is the last of the prompt.
        (asked,) = ast.parse(row["prompt"]).body
        assert isinstance(asked, Function)
        assert len(asked.body) == 1
    assert indented > 100


def test_a_function_is_cut_behind_its_docstring_and_moved_to_the_margin(tmp_path: Path) -> None:
    path = tmp_path / "box.py"
    path.write_text(SOURCE)
    size, wait = functions_in(path)
    assert size == {
        "package": "box",
        "path": "box.py",
        "name": "Box.size",
        "prompt": '@property\ndef size(self) -> int:\n    """Say how large\n    it is."""\n',
        "completion": "# a comment at the margin\n    return max(\n        1, 2)\n",
        "messages": [
            {"role": "user", "content": size["prompt"]},
            {"role": "assistant", "content": size["completion"]},
        ],
    }
    assert wait["name"] == "wait"
    assert wait["completion"].endswith("    return inner\n")


@pytest.mark.parametrize("content", [b"def f(:\n", b'"\xff"', b"\x00"])
def test_a_file_that_is_no_python_is_one_bad_row(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.py"
    path.write_bytes(content)
    ((origin, open_row),) = functions_of([("bad.py", path)])
    assert origin == "bad.py"
    with pytest.raises(UnreadableError, match="not a Python file"):
        open_row()


@pytest.mark.long
def test_functions_are_documents_that_can_be_dealt_by_package() -> None:
    data = make_recipe(
        data={
            "source": "python:functions",
            "prompt": "{prompt}",
            "completion": "{completion}",
            "documents_per_client": 100,
            "central_holdout": 20,
            "partition": {"kind": "natural", "by": "package"},
        }
    ).data
    found, again = load_documents(data, 7, 320), load_documents(data, 7, 320)
    assert found == again
    assert found.revision.startswith("Python 3.")
    assert found.other_columns == ("messages", "name", "path")
    assert all(document.prompt and document.text.startswith(document.prompt) for document in found.documents)
    clients = split_documents(found, data, 7).clients
    owners = Counter(label for client in clients for label in {one.label for one in (*client.train, *client.holdout)})
    assert len(owners) > 3
    assert set(owners.values()) == {1}, "a package is whole at one client"
