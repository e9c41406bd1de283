"""Words and numbers as people read them, and text that others chose, shown as text and as nothing else.

A terminal obeys control characters, Markdown and rich have markup, and an address may carry a password. HTML is
escaped by its template, YAML and JSON by their writers.
"""

from __future__ import annotations

import difflib
import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, colours or erases a screen, turns a line round, or can't be written as UTF-8."""
_MARKUP = re.compile(r"([\\`*\[|])")
_SECRETS = re.compile(
    r"(://)[^/\s@]+(?=@)|([?&][\w.-]*(?:token|key|password|secret|signature)=)[^&\s\"']+|\b(hf_)[A-Za-z0-9]{20,}", re.I
)
"""Who asks, in an address; what it is asked with; a hub's token."""


def count(number: int, noun: str) -> str:
    """1 document, 2,000 documents."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def format_bytes(size: float) -> str:
    """12.3 MB: decimal units, as networks have them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_seconds(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_number(value: float | None, form: str) -> str:
    """Nothing for what is not known; 12.3 % with its space."""
    return "" if value is None else format(value, form).replace("%", " %")


def format_trainable(trained: int, parameters: int) -> str:
    """1,572,864 / 332,769,280 (0.47 %)."""
    return f"{trained:,} / {parameters:,} ({100 * trained / parameters:.2f} %)"


def nearest(word: str, known: list[str]) -> str:
    """`did you mean X?` where one of the known words is close; all of them otherwise."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"


def show_controls(text: str) -> str:
    """The text with control characters written out, as \\x1b; tabs and line ends stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def hide_secrets(text: str) -> str:
    """The text without passwords and tokens in addresses."""
    return _SECRETS.sub(r"\1\2\3…", text)


def to_markdown_text(text: str) -> str:
    """The text on one line, without a meaning as Markdown: no tags, links, code or cells."""
    one_line = " ".join(show_controls(text).split())
    return _MARKUP.sub(r"\\\1", one_line).replace("&", "&amp;").replace("<", "&lt;")


def to_markdown_code(text: str, language: str = "") -> str:
    """The text as a block of code, whose fence is longer than any that the text has."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{show_controls(text).rstrip()}\n{fence}"
