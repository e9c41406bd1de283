"""Asks the model hub which commit a name stands for: once, with a time limit, so that what is loaded is on record.

What is asked later may try again and again; a hub that does not answer this will not answer that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

TIMEOUT_SECONDS = 10.0
COMMIT = re.compile(r"[0-9a-f]{40}")
"""What a hub calls a revision; nothing else that a source has for one looks so."""


def find_commit(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str | None:
    """The commit of a model or data set now; None where HF_HUB_OFFLINE forbids to ask.

    Raises:
        Exception: the hub's client has a dozen kinds for a hub out of reach, a missing name, a name behind a gate.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    return ask(name, revision=revision, timeout=TIMEOUT_SECONDS).sha


@contextmanager
def without_hub() -> Iterator[None]:
    """Have the hub's client and `datasets` look into their local caches alone, at once, and not wait for a hub."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_address() -> str:
    """Where the hub is asked for, for error messages."""
    return os.environ.get("HF_ENDPOINT", "the hub")
