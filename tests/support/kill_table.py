"""`python tests/support/kill_table.py FILE`: what test_faults.py saw with FEDLOOM_KILL_TABLE=FILE, as a table."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any


def render(trials: list[dict[str, Any]]) -> str:
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for trial in trials:
        cells.setdefault((trial["victim"], trial["when"]), []).append(trial)
    whole = {victim: len(found) for (victim, when), found in cells.items() if when == "never"}
    lines = [
        "| killed | when | kills | went on | seconds to the next round: median, most | runs with the same result |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for (victim, when), found in cells.items():
        if when == "never":
            continue
        seconds = [trial["seconds"] for trial in found if trial["seconds"] is not None]
        took = f"{median(seconds):.0f}, {max(seconds):.0f}" if seconds else ""
        lines.append(f"| {victim} | {when} | {len(found)} | {len(seconds)} | {took} | {whole.get(victim, 0)} |")
    usual = [trial["seconds"] for trial in trials if trial["when"] == "never"]
    return "\n".join([*lines, "", f"A round without a kill: {median(usual):.0f} s, of {len(usual)}." if usual else ""])


if __name__ == "__main__":
    print(render([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
