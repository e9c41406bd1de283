"""Program that renders conversations by a chat template; `chat_renderer` runs it in a process of its own.

A template comes with a model, or from a server, and is a program as well. Jinja's sandbox keeps it from everything but
the conversation. What a sandbox does not hold, a loop without an end and a text of gigabytes, ends this process and no
other: it has a bound on its memory, and whoever asks waits for a bounded time. It has no environment, can write no
file, and imports nothing of fedloom, so that `python -I` can run it by its path.

Each line that it reads is a request, and each that it writes the answer, both in JSON.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import sys
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
LONGEST = 4_000_000
"""Characters of a text that is passed on."""


class RefusedError(TemplateError):
    """Refusal that a template itself raises, by `raise_exception`."""


class Generation(Extension):
    """The tag by which a template marks what an assistant says, as transformers knows it; marks are cut out again."""

    tags = {"generation"}  # noqa: RUF012, jinja's own way to name them

    def parse(self, parser: Any) -> Any:
        """Read a block up to its end tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        marks: Any = self.environment.globals["generation_marks"]
        # One block inside of another is no span of its own.
        inside = caller().replace(marks[0], "").replace(marks[1], "")
        return f"{marks[0]}{inside}{marks[1]}"


def build(template: str, constants: dict[str, str]) -> tuple[Any, tuple[str, str]]:
    """Compile a template in the sandbox, with the settings that transformers has, and return it with its marks."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    marks = f"\0{secrets.token_hex(8)}(", f"\0{secrets.token_hex(8)})"

    def refuse(*words: object) -> None:
        raise RefusedError

    def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)

    # No `strftime_now`: a text with today's date in it is another one tomorrow. Templates that know it have a date of
    # their own for programs that don't.
    environment.globals |= {**constants, "raise_exception": refuse, "generation_marks": marks}
    environment.filters["tojson"] = to_json
    return environment.from_string(template), marks


def render(template: Any, marks: tuple[str, str], messages: list[Any], prompts: bool) -> tuple[str, list[list[int]]]:
    """Render messages, and return the text and the places in it that the template itself marks."""
    pieces: list[str] = []
    spans: list[list[int]] = []
    length = whole = 0
    for piece in template.generate(messages=messages, add_generation_prompt=prompts, tools=None, documents=None):
        whole += len(piece)
        if whole > LONGEST:
            raise MemoryError
        pieces.append(piece)
    text, pieces = "".join(pieces), []
    while marks[0] in text:
        before, _, rest = text.partition(marks[0])
        inside, _, text = rest.partition(marks[1])
        length += len(before)
        spans.append([length, length + len(inside)])
        length += len(inside)
        pieces += [before, inside]
    return "".join([*pieces, text]), spans


def answer(template: Any, marks: tuple[str, str], request: str) -> dict[str, Any]:
    """Carry out one request: the conversation up to each number of messages, with a turn begun or without."""
    try:
        asked = json.loads(request)
        found = [render(template, marks, asked["messages"][:number], prompts) for number, prompts in asked["renders"]]
    except RefusedError:
        return {"error": "refused"}
    except MemoryError:
        return {"error": "too long"}
    except SecurityError:
        return {"error": "forbidden"}
    # A template may fail in any way on a row; its words could quote the row, so its kind alone is told.
    except Exception as error:
        return {"error": "failed", "kind": type(error).__name__}
    return {"texts": [text for text, _ in found], "spans": found[0][1] if found else []}


def main() -> int:
    """Read the template and its constants, then answer requests until there are no more."""
    os.environ.clear()
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    begin = json.loads(sys.stdin.readline())
    try:
        template, marks = build(begin["template"], begin["constants"])
    except Exception as error:  # a template that is none
        line = getattr(error, "lineno", None)
        say({"error": "not a template", "line": line, "kind": type(error).__name__})
        return 1
    say({"ready": True})
    for line in sys.stdin:
        say(answer(template, marks, line))
    return 0


def say(told: dict[str, Any]) -> None:
    """Write an answer as one line."""
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    sys.exit(main())
