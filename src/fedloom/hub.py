"""The model hub: which commit a name stands for, asked once and with a time limit, so that it can be recorded.

A download may try again and again. A hub that does not answer this short question is not asked for one.

A model that has only pickles may have been converted to safetensors by the hub's own bot, in a pull request. Anybody
can open one, so `find_conversion` believes the hub's word on who made it, and not its title.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 10.0
"""Time that the hub has to name a commit."""
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit of the hub; revisions of other sources (a Python version, a count of files) never match it."""
MODEL_ID = re.compile(r"(?!.*(?:--|\.\.))([A-Za-z0-9_][\w.-]{0,94}/)?[A-Za-z0-9_][\w.-]{0,94}(?<![.-])", re.ASCII)
"""A model's name on the hub, NAME or OWNER/NAME, by the hub's own rule; no absolute path and none that begins with `~`
or `.` matches it."""

BOT = "SFconvertbot"
"""User of the Hugging Face hub that opens pull requests with a model's weights as safetensors."""
PER_PAGE = 100
"""Pull requests and commits that are looked at, the newest first."""


@dataclass(frozen=True)
class Snapshot:
    """A model's repository at a commit."""

    commit: str
    files: Mapping[str, str]
    """Hash of each file by its name, as the hub tells it; an empty text where only the local cache was asked."""


def find_commit(name: str, revision: str | None) -> str | None:
    """Ask the hub for the present commit of a data set; return None if HF_HUB_OFFLINE is set.

    Raises:
        Exception: the hub can't be reached, has no such name, or wants permission; its client has a dozen kinds.
    """
    from huggingface_hub import HfApi

    return None if is_offline() else HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_SECONDS).sha


def find_model(name: str, revision: str | None) -> Snapshot | None:
    """Ask the hub for a model's present commit and its files; return None if HF_HUB_OFFLINE is set.

    Raises:
        Exception: as `find_commit`.
    """
    from huggingface_hub import HfApi

    if is_offline():
        return None
    told = HfApi().model_info(name, revision=revision, timeout=TIMEOUT_SECONDS, files_metadata=True)
    files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id or "" for file in told.siblings or ()}
    assert told.sha is not None, "a hub that names no commit"
    return Snapshot(told.sha, files)


def find_cached(name: str, commit: str) -> Snapshot:
    """Return what the local cache holds of a model at a commit."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=commit)
    folder = Path(config).parent if isinstance(config, str) else None
    # The cache's folder of a commit is named by it.
    return Snapshot(folder.name, {path.name: "" for path in folder.iterdir()}) if folder else Snapshot(commit, {})


def find_conversion(name: str, model: Snapshot, pickles: list[str]) -> str | None:
    """Return the commit of the hub's own conversion of a model's pickles to safetensors; None if there is none.

    It is a pull request that the hub's bot opened and the owner has not closed. The bot made its only commit, on top
    of one of the model's own, and the pickles beside the safetensors are the model's, by their hashes.

    Raises:
        Exception: as `find_commit`.
    """
    asked = _ask(name, "discussions", author=BOT, type="pull_request")
    requests = [
        request
        for request in asked["discussions"]
        # The hub filters by author; whether it did is looked at all the same.
        if request["isPullRequest"]
        and (request.get("author") or {}).get("name") == BOT
        and request["status"] in ("open", "merged")
    ]
    own = {commit["id"] for commit in _ask(name, f"commits/{model.commit}", limit=PER_PAGE)} if requests else set()
    for request in requests:
        newest, *before = _ask(name, f"commits/refs%2Fpr%2F{request['num']}", limit=PER_PAGE)
        # Somebody else may push to the bot's pull request.
        if [author["user"] for author in newest["authors"]] != [BOT] or not before or before[0]["id"] not in own:
            continue
        converted = find_model(name, newest["id"])
        if (
            converted
            and has_safetensors(converted.files)
            and all(converted.files.get(pickle) == model.files[pickle] for pickle in pickles)
        ):
            return converted.commit
    return None


def has_safetensors(names: Iterable[str]) -> bool:
    """Return whether a repository has weights that are safetensors, by the names of its files."""
    return not {"model.safetensors", "model.safetensors.index.json"}.isdisjoint(names)


def _ask(name: str, path: str, **parameters: Any) -> Any:
    """Ask the hub something about a model that its client would ask without a time limit."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    address = f"{constants.ENDPOINT}/api/models/{name}/{path}"
    answer = get_session().get(address, headers=build_hf_headers(), params=parameters, timeout=TIMEOUT_SECONDS)
    hf_raise_for_status(answer)
    return answer.json()


def is_offline() -> bool:
    """Return whether the hub is not to be asked."""
    from huggingface_hub import constants

    # Read from the module at each call: `without_hub` changes it while the program runs.
    return bool(constants.HF_HUB_OFFLINE)


def mend_for(error: BaseException | None) -> str:
    """Return what to do where the hub wants permission or has no such revision; an empty text for other errors."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    while error:
        # `datasets` drops the error of the hub's client, and keeps its words.
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
            return "it is gated: ask for access on its page, then hf auth login, or set HF_TOKEN"
        if isinstance(error, RevisionNotFoundError):
            return "the hub has no such revision: name a branch, a tag or a whole commit"
        error = error.__cause__ or error.__context__
    return ""


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
