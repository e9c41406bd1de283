"""Text that others chose (names, paths, descriptions, what a library said), shown as text and as nothing else.

A terminal obeys control characters, Markdown and rich have markup, and an address may carry a password. HTML is
escaped by its template, YAML and JSON by their writers.
"""

from __future__ import annotations

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, colours or erases a screen, turns a line round, or can't be written as UTF-8."""
_MARKUP = re.compile(r"([\\`*\[|])")
_SECRETS = re.compile(
    r"(://)[^/\s@]+(?=@)|([?&][\w.-]*(?:token|key|password|secret|signature)=)[^&\s\"']+|\b(hf_)[A-Za-z0-9]{20,}", re.I
)
"""Who asks, in an address; what it is asked with; a hub's token."""


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
