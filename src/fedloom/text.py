"""Words and numbers as people read them, and text that others chose, shown as text and as nothing else.

A terminal obeys control characters, Markdown and rich have markup, and an address may carry a password. HTML is
escaped by its template, YAML and JSON by their writers.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a cursor, colour or erase a screen, reverse a line, or can't be written as UTF-8."""
_MARKUP = re.compile(r"([\\`*\[|])")
"""Characters that begin an escape, code, emphasis, a link or a table's cell in Markdown."""
_SECRETS = re.compile(
    r"(://)[^/\s@]+(?=@)|([?&][\w.-]*(?:token|key|password|secret|signature)=)[^&\s\"']+|\b(hf_)[A-Za-z0-9]{20,}", re.I
)
"""Secrets in addresses: a user with a password, a key or token in the query, and a token of the Hugging Face hub."""


def count(number: int, noun: str) -> str:
    """Format a number with its noun: `1 document`, `2,000 documents`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def sentence(words: str) -> str:
    """Return words as a sentence: a capital first and a full stop; a Greek letter is a symbol, and stays as it is."""
    return f"{words[:1].upper() if words[:1].isascii() else words[:1]}{words[1:]}."


def format_share(share: float) -> str:
    """Format a share as `12 %` or `0.34 %`: two digits, and never 100 written as a power of ten."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def round_down(number: float) -> str:
    """Format a positive number to one digit, never above it: for a limit that may be typed as it is read."""
    unit = 10.0 ** math.floor(math.log10(number))
    return f"{math.floor(number / unit) * unit:.1g}"


def format_bytes(size: float) -> str:
    """Format a number of bytes as `12.3 MB`: in decimal units, as networks are measured."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_seconds(seconds: float) -> str:
    """Format seconds as `1:02:03`, or as `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_number(value: float | None, form: str) -> str:
    """Format a number by a format code, a percentage as `12.3 %`; return an empty text for None."""
    return "" if value is None else format(value, form).replace("%", " %")


def format_trainable(trained: int, parameters: int) -> str:
    """Format the trained share of all parameters: `1,572,864 / 332,769,280 (0.47 %)`."""
    return f"{trained:,} / {parameters:,} ({100 * trained / parameters:.2f} %)"


def nearest(word: str, known: list[str]) -> str:
    """Suggest the known word that is closest to a mistyped one; list all known words if none is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"choose one of: {', '.join(known)}"


def show_controls(text: str) -> str:
    r"""Return the text with control characters written out, as \x1b; tabs and line ends stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def hide_secrets(text: str) -> str:
    """Return the text with an ellipsis in place of passwords and tokens in addresses."""
    return _SECRETS.sub(r"\1\2\3…", text)


def to_markdown_text(text: str) -> str:
    """Return the text on one line and escaped, so that it begins no tag, link, code or cell in Markdown."""
    one_line = " ".join(show_controls(text).split())
    # The ampersand comes first: after "<" it would escape the "&" of "&lt;" once more.
    return _MARKUP.sub(r"\\\1", one_line).replace("&", "&amp;").replace("<", "&lt;")


def to_markdown_code(text: str, language: str = "") -> str:
    """Return the text as a block of code."""
    # A fence in the text would close the block early; a longer one can't be closed by it.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{show_controls(text).rstrip()}\n{fence}"


def quote_path(path: str | Path) -> str:
    """Return a path as a shell's command takes it, which takes none that begins with `-` for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def list_some(words: Sequence[str], most: int) -> str:
    """List the first few words, and count the others: `a, b and 3 more`."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def list_numbers(numbers: Sequence[int]) -> str:
    """List numbers that rise, with what follows one upon another as a span: `0 to 2, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in spans)


def list_reasons(counts: Mapping[str, int]) -> str:
    """List reasons with their numbers, as `2 empty, 1 not UTF-8 text`."""
    return ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.items()))
