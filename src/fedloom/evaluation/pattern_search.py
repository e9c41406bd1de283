"""Search for what a pattern finds in answers; `measures` starts it by its path, in a process that can be ended.

It imports nothing of fedloom, so that `python -I -S` can run it. The pattern and the answers stand on its input, what
is found on its output, in JSON.
"""

from __future__ import annotations

import json
import re
import sys


def find_answer(pattern: str, said: str) -> str | None:
    """Return what a pattern finds first: its group, or the whole match; None where it finds nothing."""
    found = re.search(pattern, said)
    return found and (found[1] or "" if found.re.groups else found[0])


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    json.dump([find_answer(asked["pattern"], one) for one in asked["said"]], sys.stdout)
