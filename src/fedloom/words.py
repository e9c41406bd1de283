"""Numbers and names as people read them."""

from __future__ import annotations

import difflib


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
