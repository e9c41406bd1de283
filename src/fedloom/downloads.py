"""Downloads from the hub that have an end: where hardly any data comes for minutes, they are given up.

The hub's client limits the time of an answer, not that of a download: a server that sends a byte now and then holds it
for ever, and a thread that waits for it can't be stopped. So files are fetched in a process of their own, and rows of a
stream are waited for by whoever reads them. No torch here.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedloom.errors import ModelError
from fedloom.text import format_bytes

STALL_SECONDS = 120.0
"""Time in which at least LEAST_BYTES, or a row, must come."""
LEAST_BYTES = 2**17
"""A kibibyte a second: less comes from a connection that nobody would wait for."""
TELL_SECONDS = 10.0
"""Time between two words about a download."""
ROWS_AHEAD = 64
"""Rows of a stream that are read before they are asked for."""

FIRST_ROW_SECONDS = 600.0
"""Time for the first row of a stream, before which thousands are read to be shuffled."""

DESCRIPTION = ("*.json", "*.txt", "*.model", "*.jinja")
"""Names of what describes a model: its configuration, its tokenizer and the index of its weights."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

FETCH = """
import json, sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 2**14  # written down as it comes; by ten million bytes, a slow download would look idle
"""
FETCH_FILES = f"{FETCH}import huggingface_hub; huggingface_hub.snapshot_download(**json.loads(sys.argv[1]))"
FETCH_ROWS = f"{FETCH}import datasets; datasets.load_dataset(**json.loads(sys.argv[1]))"
"""Programs that download, with their arguments as JSON."""

Row = TypeVar("Row")
Say = Callable[[str], object]


class StalledError(Exception):
    """A download of which nothing more came."""


def fetch_description(name: str, commit: str, say: Say = str) -> None:
    """Download what describes a hub's model at a commit, unless it is in the hub's own cache.

    A download that fails for another reason than a stall is left to whoever opens the files: it says why. `say` is told
    how much has come. The same holds for the other functions here.

    Raises:
        ModelError: nothing more came.
    """
    if not _find(name, commit, "config.json"):
        _fetch(name, commit, DESCRIPTION, say)


def fetch_weights(name: str, commit: str, say: Say = str) -> None:
    """Download the safetensors weights of a hub's model at a commit, in one file or several.

    Raises:
        ModelError: nothing more came.
    """
    if _find(name, commit, WEIGHTS):
        return
    index = _find(name, commit, INDEX)
    try:
        if index and all(_find(name, commit, part) for part in parts_of(index)):
            return
    except ValueError:  # it is fetched again, and then refused
        pass
    _fetch(name, commit, (WEIGHTS, "model-*.safetensors", INDEX), say)


def fetch_files(name: str, commit: str, files: Sequence[str], say: Say = str) -> None:
    """Download some files of a hub's model at a commit.

    Raises:
        ModelError: nothing more came.
    """
    if not all(_find(name, commit, file) for file in files):
        _fetch(name, commit, files, say)


def parts_of(index: Path) -> list[str]:
    """Return the names of the files that weights are spread over, by their index.

    Raises:
        ValueError: the index is damaged.
    """
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index.name} is damaged") from None


def fetch_rows(arguments: Mapping[str, Any], folders: Sequence[Path], say: Say = str) -> None:
    """Download a data set whole into the cache of `datasets`; `folders` are those that grow by it.

    Raises:
        StalledError: nothing more came.
    """
    _run(FETCH_ROWS, arguments, folders, lambda came: say(f"downloading {arguments['path']}: {came}"))


def wait_for_rows(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows of a stream, each of which has a time to come, the first a longer one.

    Raises:
        StalledError: the next one did not come.
        Exception: whatever reading them raises.
    """
    came: queue.Queue[tuple[bool, Any]] = queue.Queue(ROWS_AHEAD)
    ended = threading.Event()

    def put(*what: Any) -> bool:
        while not ended.is_set():
            try:
                came.put(what, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for row in rows:
                if not put(True, row):
                    return
            put(False, None)
        except BaseException as error:  # the reader's, which raises it
            put(False, error)

    # Nobody waits for it at the end: it may hang in an answer.
    threading.Thread(target=read, daemon=True).start()
    seconds = FIRST_ROW_SECONDS
    try:
        while True:
            try:
                more, what = came.get(timeout=seconds)
            except queue.Empty:
                raise StalledError(f"no row came in {seconds:.0f} s") from None
            seconds = STALL_SECONDS
            if more:
                yield what
            elif what is None:
                return
            else:
                raise what
    finally:
        ended.set()


def wait_for(work: Callable[[], Row]) -> Row:
    """Return what a function returns that asks the hub, within the time of a first row.

    Raises:
        StalledError: it did not return.
        Exception: whatever it raises.
    """
    return next(wait_for_rows(work() for _ in range(1)))


def _find(name: str, commit: str, file: str) -> Path | None:
    """Return a file of a model's commit in the hub's own cache, None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _fetch(name: str, commit: str, patterns: Sequence[str], say: Say) -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if constants.HF_HUB_OFFLINE:
        return
    arguments = {
        "repo_id": name,
        "revision": commit,
        "allow_patterns": list(patterns),
        "ignore_patterns": ["*/*"],
        "endpoint": constants.ENDPOINT,
        "cache_dir": constants.HF_HUB_CACHE,
    }
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    try:
        _run(FETCH_FILES, arguments, [folder], lambda came: say(f"downloading {name}: {came}"))
    except StalledError as error:
        raise ModelError(
            f"the download stopped: {error}",
            where=f'model.source = "{name}"',
            mend="check the network and the hub, and try again",
        ) from None


def _run(code: str, arguments: Mapping[str, Any], folders: Sequence[Path], say: Say) -> None:
    """Run a program that fills folders until it ends, or until they hardly grow any more.

    Raises:
        StalledError
    """
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    # Whether the hub may be asked was decided by whoever calls.
    around = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    began = told = since = time.monotonic()
    before = size = _count_bytes(folders)
    nothing = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, env=around) as process:
        try:
            while True:
                try:
                    process.wait(timeout=min(1.0, STALL_SECONDS / 4))
                    return
                except subprocess.TimeoutExpired:
                    now, here = time.monotonic(), _count_bytes(folders)
                came = format_bytes(here - before)
                if here - size >= LEAST_BYTES:
                    size, since = here, now
                elif now - since > STALL_SECONDS:
                    raise StalledError(f"nothing more came in {STALL_SECONDS:.0f} s, after {came}")
                if now - told > TELL_SECONDS:
                    told = now
                    say(f"{came}, {format_bytes((here - before) / (now - began))}/s")
        finally:
            process.kill()


def _count_bytes(folders: Sequence[Path]) -> int:
    """Return the bytes of all files below folders, links not followed."""
    total = 0
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(where, name)).st_size
                except OSError:  # it was renamed meanwhile
                    continue
    return total
