"""Measures of answers: how each is counted, and the interval in which the figure would lie with other questions."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.errors import DataError
from fedloom.text import count

Z_95 = 1.959963984540054
"""Standard deviations that 95 % of a normal distribution lie within, on both sides."""
RESAMPLES = 1000
SEARCH = Path(__file__).with_name("pattern_search.py")
SEARCH_SECONDS, SECONDS_A_TEXT = 30.0, 0.1
"""Time that a pattern has, and more for each text that it is looked for in."""
WILSON = "Wilson, 95 %"
BOOTSTRAP = f"bootstrap of {RESAMPLES:,} resamples with seed 0, 95 %"
OF_BOTH = f"{BOOTSTRAP}, and Wilson's of tasks whose answers all count the same"


@dataclass(frozen=True)
class Measure:
    """A figure with its interval: a share of questions, or a mean over them."""

    value: float
    low: float
    high: float
    interval: str
    """Name of the interval."""
    of: int
    """Questions that it is made of."""
    right: int | None = None
    """Questions that count, of a share."""

    def to_json(self) -> dict[str, Any]:
        """Return it as a record has it."""
        told = {"value": self.value, "low": self.low, "high": self.high, "interval": self.interval, "of": self.of}
        return told if self.right is None else {**told, "right": self.right}


def share(values: Sequence[float]) -> Measure:
    """Return the share of values that are 1, where all are 0 or 1, with Wilson's interval (1927)."""
    return count_share(int(sum(values)), len(values))


def count_share(right: int, of: int) -> Measure:
    """Return the share of so many questions that so many are, with Wilson's interval (1927)."""
    low, high = wilson(right, of)
    return Measure(right / of, low, high, WILSON, of, right)


def mean(*groups: Sequence[float]) -> Measure:
    """Return the mean of the groups' means, with a bootstrap within each (Efron 1979): percentiles of resamples.

    Resamples of values that are all the same tell nothing of others; there, the interval is Wilson's. No mean of values
    from 0 to 1 varies more than a share does, so it is rather too wide. Where some groups alone are so, each has its
    own interval, and those are joined.
    """
    value = sum(sum(values) / len(values) for values in groups) / len(groups)
    same = sum(min(values) == max(values) for values in groups)
    if 0 < same < len(groups):
        (low, high), interval = _join_intervals(groups), OF_BOTH
    elif same:
        weight = len(groups) ** 2 / sum(1 / len(values) for values in groups)
        (low, high), interval = wilson(value * weight, weight), WILSON
    else:
        (low, high), interval = bootstrap(*groups), BOOTSTRAP
    return Measure(value, low, high, interval, sum(map(len, groups)))


def wilson(right: float, of: float) -> tuple[float, float]:
    """Return the 95 % interval of a share: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    p, square = right / of, Z_95**2 / of
    middle, reach = p + square / 2, Z_95 * math.sqrt(p * (1 - p) / of + square / (4 * of))
    return max(0.0, (middle - reach) / (1 + square)), min(1.0, (middle + reach) / (1 + square))


def bootstrap(*groups: Sequence[float]) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of the mean of the groups' means over resamples of each."""
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    for values in groups:
        told = torch.tensor(values, dtype=torch.float64)
        drawn = [told[torch.randint(len(told), (len(told),), generator=generator)].mean() for _ in range(RESAMPLES)]
        means += torch.stack(drawn) / len(groups)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _join_intervals(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the interval of the mean of k groups' means mᵢ from each one's own (Zou and Donner 2008): its low end is
    m − √(Σ (mᵢ − lᵢ)²) / k.
    """
    means = [sum(values) / len(values) for values in groups]
    ends = [wilson(sum(values), len(values)) if min(values) == max(values) else bootstrap(values) for values in groups]
    below, above = (math.hypot(*(mean - of[end] for mean, of in zip(means, ends, strict=True))) for end in (0, 1))
    middle = sum(means) / len(means)
    return middle - below / len(means), middle + above / len(means)


def is_same(said: str, answers: Sequence[str]) -> float:
    """Return 1 where a text is one of the answers, but for white space at its ends."""
    return float(said.strip() in [answer.strip() for answer in answers])


def find_answers(pattern: str, said: Sequence[str], *, where: str) -> list[str | None]:
    """Return what a pattern finds first in each text: its group, or the whole match; None where it finds nothing.

    It looks in a process of its own, which is ended after a while: a pattern may go through more ways to match than
    anybody can wait for, and nothing else stops it.

    Raises:
        DataError: it came to no end; `where` says whose pattern it is.
    """
    seconds = SEARCH_SECONDS + len(said) * SECONDS_A_TEXT
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(SEARCH)],
            input=json.dumps({"pattern": pattern, "said": list(said)}).encode(),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=seconds, check=True,
        )  # fmt: skip
    # Its own words would quote what was written.
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise DataError(
            f"its pattern came to no end on {count(len(said), 'answer')} within {seconds:.0f} seconds",
            where=where,
            mend="give it one way to match: no repetition inside of a repetition, as in (a+)+",
        ) from None
    found: list[str | None] = json.loads(done.stdout)
    return found


def token_f1(said: str, answers: Sequence[str]) -> float:
    """Return the best F1 of the words of a text and of an answer, as SQuAD counts them (Rajpurkar et al. 2016)."""
    return max(_f1(_squad_words(said), _squad_words(answer)) for answer in answers)


def _f1(said: Sequence[str], answer: Sequence[str]) -> float:
    common = (Counter(said) & Counter(answer)).total()
    if not said or not answer:
        return float(said == answer)
    return 2 * common / (len(said) + len(answer))


def _squad_words(text: str) -> list[str]:
    # In SQuAD's order: lower case, without punctuation of ASCII, without articles.
    plain = re.sub(r"[!-/:-@\[-`{-~]", "", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def rouge_l(said: str, answers: Sequence[str]) -> float:
    """Return the best ROUGE-L of a text and an answer: the F1 of their longest common subsequence of words (Lin 2004).

    Words are runs of letters and digits in lower case, without stemming.
    """
    return max(_rouge_l(_words(said), _words(answer)) for answer in answers)


def _rouge_l(said: Sequence[str], answer: Sequence[str]) -> float:
    if not said or not answer:
        return 0.0
    # The last row of the table of common subsequences is all that the next one needs.
    row = [0] * (len(answer) + 1)
    for word in said:
        last = row
        row = [0]
        for place, other in enumerate(answer):
            row.append(last[place] + 1 if word == other else max(last[place + 1], row[place]))
    return 2 * row[-1] / (len(said) + len(answer))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
