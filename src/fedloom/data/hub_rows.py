"""Rows of a data set of the hub, downloaded whole or streamed.

Messages name what went wrong, never a row's content.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data.rows import Rows, Source, as_is, check_column
from fedloom.downloads import StalledError, fetch_rows, wait_for, wait_for_rows
from fedloom.errors import DataError
from fedloom.hub import COMMIT, find_commit, hub_address, mend_for, without_hub

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data

SHUFFLE_BUFFER = 10_000
"""Rows of a streamed data set that are held in memory and shuffled."""


def open_hub(data: Data, seed: int, at_most: int | None) -> Source:
    """Open a data set of the hub: streamed if only a part is needed, from the local cache if the hub is silent.

    Raises:
        DataError: it is neither to be had from the hub nor in the cache, or the cache holds another commit.
    """
    import datasets
    from huggingface_hub import constants

    # Their bars would draw over the display that a run shows.
    datasets.disable_progress_bars()
    where = f'data.source = "{data.source}"'
    unreachable: Exception | None = None
    commit = None
    try:
        commit = find_commit(data.source, data.revision)
    except Exception as error:  # the hub's client raises a dozen kinds; the local cache is what is left
        unreachable = error
    refused = mend_for(unreachable)
    what: dict[str, Any] = {"path": data.source, "name": data.subset, "revision": commit or data.revision}
    try:
        # What the hub denies is not taken from the cache, which would give another revision without a word.
        if unreachable and refused:
            raise unreachable
        with nullcontext() if commit else without_hub():
            builder = datasets.load_dataset_builder(**what)
            found = commit or builder.hash
            if commit and at_most is None and not Path(builder.cache_dir).is_dir():
                caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)]
                fetch_rows({**what, "split": data.split, "cache_dir": str(caches[0])}, caches)
            load = partial(datasets.load_dataset, **what, split=data.split, streaming=at_most is not None)
            rows = load() if at_most is None else wait_for(load)
    except Exception as error:  # as above; none of them is a bug of ours
        # Its class alone is named: the client's own messages go on for several lines.
        raise DataError(
            "there is no such file or folder here, and the data set can't be loaded: asking"
            f" {hub_address()} failed ({type(unreachable or error).__name__})"
            + ("" if commit or refused else ", and it is not in the local cache"),
            where=where,
            mend=mend_for(error)
            or "check the name and the network, or download it and set data.source to the file or folder",
        ) from error
    revision = found if COMMIT.fullmatch(found or "") else data.revision
    # Without the hub, `datasets` takes whichever commit its cache holds, and does not compare it with the revision.
    if data.revision and COMMIT.fullmatch(data.revision) and revision != data.revision:
        raise DataError(
            f"the local cache holds another commit, {revision}, and {hub_address()} can't be reached",
            where="data.revision",
            mend="check the network, or set data.revision to that commit",
        )
    columns = rows.column_names
    if columns is not None:
        check_column(data, columns, where, mend=f"it has: {', '.join(columns)}")
    if at_most is not None:
        rows = rows.shuffle(seed=seed % 2**32, buffer_size=SHUFFLE_BUFFER)

    def opened() -> Rows:
        number = 0
        try:
            for number, row in enumerate(rows if at_most is None else wait_for_rows(rows)):
                yield f"row {number}", partial(as_is, row)
        except Exception as error:  # as above, in the middle of a stream
            raise DataError(
                f"reading the data set failed after row {number}"
                f" ({error if isinstance(error, StalledError) else type(error).__name__})",
                where=where,
                mend="check the network and try again",
            ) from error

    return Source(opened(), revision or "unknown", ordered=at_most is not None)
