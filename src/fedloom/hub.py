"""The model hub: which commit a name stands for, asked once and with a time limit, so that it can be recorded.

A download may try again and again. A hub that does not answer this short question is not asked for one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

TIMEOUT_SECONDS = 10.0
"""Time that the hub has to name a commit."""
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit of the hub; revisions of other sources (a Python version, a count of files) never match it."""


def find_commit(kind: Literal["model", "dataset"], name: str, revision: str | None) -> str | None:
    """Ask the hub for the present commit of a model or data set; return None if HF_HUB_OFFLINE is set.

    Raises:
        Exception: the hub can't be reached, has no such name, or wants permission; its client has a dozen kinds.
    """
    from huggingface_hub import HfApi, constants

    # Read from the module at each call: `without_hub` changes it while the program runs.
    if constants.HF_HUB_OFFLINE:
        return None
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    return ask(name, revision=revision, timeout=TIMEOUT_SECONDS).sha


@contextmanager
def without_hub() -> Iterator[None]:
    """Make the hub's client and `datasets` use their local caches alone, without waiting for the hub."""
    import datasets.config
    from huggingface_hub import constants

    # Both read HF_HUB_OFFLINE once, when they are imported, and `datasets` keeps a copy of its own: setting the
    # environment variable now would change nothing.
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_address() -> str:
    """Return the hub's address as error messages show it."""
    return os.environ.get("HF_ENDPOINT", "the hub")
