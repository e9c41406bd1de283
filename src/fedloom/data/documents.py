"""Where text comes from: a data set of the hub, files, or the interpreter's own standard library.

A row without a usable text is skipped and counted, or ends the run where the recipe wants that or too many are bad;
what is said of it is a reason and a place, never its content.
"""

from __future__ import annotations

import os
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data.rows import READERS, Row, Rows, UnreadableError, as_is, check_column, read_rows
from fedloom.errors import DataError
from fedloom.hub import COMMIT, find_commit, hub_address, without_hub
from fedloom.seeds import derive_seed
from fedloom.text import count

if TYPE_CHECKING:
    from fedloom.recipe.sections import Data

STDLIB = "python:stdlib"
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
SHUFFLE_BUFFER = 10_000
"""Rows of a streamed data set that are shuffled among each other."""
EMPTY = "empty"
"""The reason that is no fault: there is nothing to learn from an empty text, and nothing wrong with it."""


@dataclass(frozen=True)
class Document:
    """One text, where it came from (a path or a row, for people), and its label where the split needs one."""

    text: str
    origin: str
    label: str | None = None


@dataclass(frozen=True)
class Documents:
    """Usable documents in the seeded order, and how many were skipped for which reason."""

    documents: tuple[Document, ...]
    skipped: Mapping[str, int]
    source: str
    revision: str

    def explain_skipped(self) -> str:
        """`skipped 3: 2 empty, 1 not UTF-8 text`, or nothing."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        return f"skipped {sum(self.skipped.values())}: {reasons}" if self.skipped else ""


@dataclass(frozen=True)
class Source:
    """Rows that are opened one by one: files of a folder are read only when they are wanted."""

    open_rows: Iterable[tuple[str, Callable[[], Row]]]
    revision: str
    ordered: bool = False
    """True where the rows already come in a seeded order (a stream)."""


def load_documents(data: Data, seed: int | None, at_most: int | None = None) -> Documents:
    """Up to `at_most` usable documents in an order drawn from the seed; without one, in the order of their files.

    Raises:
        DataError: the source can't be found or reached, has no such column, or holds no usable document; a row is bad
            where none may be, or more rows than the recipe allows.
    """
    order_seed = derive_seed(seed or 0, "documents")
    source = _open_source(data, order_seed, at_most)
    rows = source.open_rows
    if not source.ordered and seed is not None:
        rows = list(rows)
        random.Random(order_seed).shuffle(rows)
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    first_bad = ""
    for origin, open_row in rows:
        if at_most is not None and len(documents) == at_most:
            break
        try:
            documents.append(_to_document(open_row(), origin, data))
        except UnreadableError as reason:
            skipped[str(reason)] += 1
            if str(reason) != EMPTY:
                first_bad = first_bad or f"{origin}: {reason}"
                if data.on_bad_row == "error":
                    break
    _check_bad_rows(data, len(documents), skipped, first_bad)
    found = Documents(tuple(documents), dict(skipped), data.source, source.revision)
    if not documents:
        raise DataError(
            f"no usable document ({found.explain_skipped() or 'nothing there'})",
            where=f'data.source = "{data.source}"',
            mend="look at data.text (the column that holds the text), data.partition.by and data.files (the glob)",
        )
    return found


def _check_bad_rows(data: Data, usable: int, skipped: Counter[str], first_bad: str) -> None:
    """Refuse a source with a bad row where none may be, or with more of them than the recipe allows."""
    bad, read = skipped.total() - skipped[EMPTY], usable + skipped.total()
    if bad and data.on_bad_row == "error":
        raise DataError(
            f"a bad row, {first_bad}",
            where=f'data.source = "{data.source}"',
            mend='mend or remove it, or count such rows instead: data.on_bad_row = "skip"',
        )
    if usable and bad > data.max_bad_fraction * read:
        raise DataError(
            f"{bad:,} of {read:,} rows are bad ({100 * bad / read:.2g} %), one of them {first_bad}",
            where=f'data.source = "{data.source}"',
            mend="mend them, look at data.text, data.partition.by and data.files, or raise data.max_bad_fraction"
            f" (now {data.max_bad_fraction:g})",
        )


def _to_document(row: Row, origin: str, data: Data) -> Document:
    text = row.get(data.text)
    if not isinstance(text, str):
        raise UnreadableError(f"without text in column {data.text}" if text is None else "not text")
    if all(character.isspace() or character in "\ufeff\x00" for character in text):
        raise UnreadableError(EMPTY)
    label = None
    if data.partition.by is not None:
        if row.get(data.partition.by) is None:
            raise UnreadableError(f"without a value in column {data.partition.by}")
        label = str(row[data.partition.by])
    try:
        f"{text}{label}".encode()
    except UnicodeEncodeError:
        raise UnreadableError("not valid Unicode") from None
    return Document(text, origin, label)


def _open_source(data: Data, seed: int, at_most: int | None) -> Source:
    if data.source == STDLIB:
        _refuse_spare(data, "revision", "subset", "split")
        version = ".".join(map(str, sys.version_info[:3]))
        return Source(_rows_of_folder(_standard_library(), data), f"Python {version}")
    try:
        path = Path(data.source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError("not a possible path", where=f'data.source = "{data.source[:80]}"') from error
    if is_folder:
        _refuse_spare(data, "revision", "subset", "split")
        paths = _find_files(path, data.files)
        return Source(_rows_of_folder(_relative(paths, path), data), describe_files(paths))
    if is_file:
        _refuse_spare(data, "revision", "subset", "split", "files")
        if path.suffix not in READERS:
            raise DataError(
                f'can\'t tell how to read "{path.suffix or path.name}"',
                where=str(path),
                mend=f"use {', '.join(READERS)}",
            )
        return Source(read_rows(path, path.name, data), describe_files([path]))
    if path.suffix in READERS or path.is_absolute() or data.source.startswith((".", "~")) or data.source.count("/") > 1:
        raise DataError(
            "no such file or folder", where=f'data.source = "{data.source}"', mend="paths start at the working folder"
        )
    _refuse_spare(data, "files")
    return _open_hub(data, seed, at_most)


def _refuse_spare(data: Data, *keys: str) -> None:
    """A key that has no effect on such a source is a misunderstanding."""
    for key in keys:
        if key in data.model_fields_set:
            raise DataError(
                "this key has no effect on such a source", where=f"data.{key}", mend=f'leave it out for "{data.source}"'
            )


def _find_files(folder: Path, pattern: str) -> list[Path]:
    if ".." in Path(pattern).parts:
        raise DataError(f'"{pattern}" leads out of the folder', where=str(folder), mend="change data.files, as **/*.py")
    try:
        paths = sorted(file for file in folder.glob(pattern) if file.is_file())
    except (ValueError, NotImplementedError, OSError) as error:
        raise DataError(
            f'not a usable glob: "{pattern[:80]}" ({error})', where=str(folder), mend="change data.files, as **/*.py"
        ) from error
    if not paths:
        raise DataError(f'no file matches "{pattern}"', where=str(folder), mend="change data.files")
    return paths


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return _relative(sorted(paths), root)


def _relative(paths: list[Path], root: Path) -> list[tuple[str, Path]]:
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def describe_files(paths: list[Path]) -> str:
    """What stands for a revision where files have none: how many, how large."""
    sizes = []
    for path in paths:
        with suppress(OSError):  # gone since it was listed: it is counted as unreadable when its turn comes
            sizes.append(path.stat().st_size)
    return f"{count(len(sizes), 'file')}, {sum(sizes):,} bytes"


def _refuse(reason: str) -> Row:
    raise UnreadableError(reason)


def _rows_of_folder(paths: list[tuple[str, Path]], data: Data) -> Rows:
    """A file of rows gives its rows; any other file is one document with `path` and `package` columns."""
    for origin, path in paths:
        if path.suffix in (".jsonl", ".parquet", ".csv"):
            try:
                yield from read_rows(path, origin, data)
            except DataError:  # one file of many
                yield origin, partial(_refuse, f"{path.suffix} file without such columns or damaged")
        else:
            yield origin, partial(_read_text_file, origin, path, data)


def _read_text_file(origin: str, path: Path, data: Data) -> Row:
    first = Path(origin).parts[0]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnreadableError("not UTF-8 text") from None
    except OSError as error:
        raise UnreadableError(f"unreadable file ({error.strerror})") from None
    return {"path": origin, "package": Path(first).stem, data.text: text}


def _open_hub(data: Data, seed: int, at_most: int | None) -> Source:
    """A data set of the hub: streamed where only a part of it is wanted; from the local cache where no hub answers."""
    import datasets

    datasets.disable_progress_bars()
    where = f'data.source = "{data.source}"'
    unreachable: Exception | None = None
    commit = None
    try:
        commit = find_commit("dataset", data.source, data.revision)
    except Exception as error:  # of a dozen kinds; then only the local cache is left
        unreachable = error
    what: dict[str, Any] = {"path": data.source, "name": data.subset, "revision": commit or data.revision}
    try:
        with nullcontext() if commit else without_hub():
            found = commit or datasets.load_dataset_builder(**what).hash
            rows = datasets.load_dataset(**what, split=data.split, streaming=at_most is not None)
    except Exception as error:  # the hub's client raises a dozen kinds, and none of them is a bug of ours
        raise DataError(
            f"the data set can't be had: asking {hub_address()} failed ({type(unreachable or error).__name__})"
            + ("" if commit else ", and it is not in the local cache"),
            where=where,
            mend="check the name and the network, or download it and set data.source to the file or folder",
        ) from error
    revision = found if COMMIT.fullmatch(found or "") else data.revision
    # A cache holds whichever commit was asked for last.
    if data.revision and COMMIT.fullmatch(data.revision) and revision != data.revision:
        raise DataError(
            f"the local cache holds another commit, {revision}, and {hub_address()} can't be asked",
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
            for number, row in enumerate(rows):
                yield f"row {number}", partial(as_is, row)
        except Exception as error:  # as above, in the middle of a stream
            raise DataError(
                f"the data set broke off after row {number} ({type(error).__name__})", where=where, mend="try again"
            ) from error

    return Source(opened(), revision or "unknown", ordered=at_most is not None)
