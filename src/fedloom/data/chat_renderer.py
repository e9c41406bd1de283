"""Chat templates, rendered in a process of their own that can be stopped: a template is a stranger's program."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fedloom.data.rows import UnreadableError
from fedloom.errors import DataError

PROGRAM = Path(__file__).with_name("chat_program.py")
SECONDS = 10.0
"""Time that the conversation of one row may take."""
ANSWER_BYTES = 64 << 20
"""Bytes of one answer."""
CONSTANTS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Special tokens that templates write by name."""
WHERE, MEND = "data.chat_template", "name another template"


class RenderError(UnreadableError):
    """A conversation that its template does not take."""


class ChatRenderer:
    """A chat template that is ready to write conversations, to be closed when there are no more.

    Raises:
        DataError: it is no template, or the process that renders it ended or hangs.
    """

    def __init__(self, template: str, tokenizer: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            close_fds=True,
        )
        self._stop = weakref.finalize(self, _stop, self._process)
        self._rest = b""
        constants = {name: value for name in CONSTANTS if (value := getattr(tokenizer, name, None)) is not None}
        told = self._ask({"template": template, "constants": constants})
        if "error" in told:
            line = f", line {told['line']}" if told.get("line") else ""
            self.close()
            raise DataError(f"not a chat template ({told['kind']}{line})", where=WHERE, mend=MEND)

    def __enter__(self) -> ChatRenderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._stop()

    def render(
        self, messages: Sequence[dict[str, Any]], renders: Sequence[tuple[int, bool]]
    ) -> tuple[list[str], list[tuple[int, int]]]:
        """Render the first messages, as many as each of `renders` says, with the assistant's turn begun or without.

        Returns the texts, and the places in the first one that the template marks as the assistant's.

        Raises:
            RenderError: the template refuses the conversation, or fails on it.
            DataError: it does not come to an end, or ended its process.
        """
        told = self._ask({"messages": list(messages), "renders": [list(one) for one in renders]})
        match told.get("error"):
            case None:
                return told["texts"], [(begin, end) for begin, end in told["spans"]]
            case "refused":
                raise RenderError("refused by the chat template (roles, or their order)")
            case "forbidden":
                raise DataError("the chat template asks for what no template may have", where=WHERE, mend=MEND)
            case "too long":
                raise RenderError("that the chat template makes too long")
            case _:
                raise RenderError(f"that the chat template fails on ({told['kind']})")

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RenderError: it is nested too deeply, or in itself.
            DataError: the process ended, or hangs.
        """
        process = self._process
        assert process.stdin is not None
        try:
            # What a table has beside texts, a time say, is told as a text.
            line = json.dumps(request, default=str).encode() + b"\n"
        except (ValueError, RecursionError):
            raise RenderError("that can't be told to a chat template") from None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._ended() from None
        told: dict[str, Any] = json.loads(self._read_line())
        return told

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        output, pieces, size = self._process.stdout, [self._rest], len(self._rest)
        until = time.monotonic() + SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while b"\n" not in pieces[-1]:
                if size > ANSWER_BYTES or not selector.select(max(0.0, until - time.monotonic())):
                    self.close()
                    what = "writes without an end" if size > ANSWER_BYTES else f"is not done after {SECONDS:.0f} s"
                    raise DataError(f"the chat template {what}", where=WHERE, mend=MEND)
                if not (piece := os.read(output.fileno(), 1 << 20)):
                    raise self._ended()
                pieces.append(piece)
                size += len(piece)
        line, _, self._rest = b"".join(pieces).partition(b"\n")
        return line

    def _ended(self) -> DataError:
        self.close()
        return DataError("the chat template ended the process that renders it", where=WHERE, mend=MEND)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what was never read
                pipe.close()
