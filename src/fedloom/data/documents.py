"""Documents from a data set of the hub, from files, or from Python's own standard library.

A row without a usable text is skipped and counted; it ends the run if the recipe asks for that, or if too many are bad.
Messages name its place and what is wrong, never its content.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data.formats import EMPTY, Form, RowFormat
from fedloom.data.hub_rows import open_hub
from fedloom.data.rows import (
    PACKED,
    READERS,
    Row,
    Rows,
    Source,
    UnreadableError,
    columns_of,
    format_of,
    mend_rows,
    name_keys,
    read_rows,
    refuse,
)
from fedloom.data.standard_library import (
    FILES,
    FUNCTIONS,
    describe_python,
    find_library_files,
    functions_of,
    package_of,
)
from fedloom.errors import DataError
from fedloom.seeds import derive_seed
from fedloom.text import count, list_reasons

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data

LINKED = "linked from outside"
"""Reason why a file is left out: what a link leads to may be anybody's, and the folder is what its owner gave."""
ABOUT_THE_DATA = {"readme.md", "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
"""Files at the top of a folder that a hub's or a library's data sets have beside their rows."""
TEXT = {None, ".txt"}
"""Formats of files that are text as it stands, without columns."""


@dataclass(frozen=True)
class Document:
    """One text with its origin (a path or a row, for people), and its label if the split needs one."""

    text: str
    origin: str
    label: str | None = None
    form: Form | None = None
    """The text with what of it counts, where that is not all of it."""
    row: Row | None = None
    """The columns that the text was made of, where it is not a column itself."""
    unit: str | None = None
    """Value of the column whose values are protected whole, where one is; normalised as texts are that are compared."""

    @property
    def prompt(self) -> str:
        """Return what stands before the answer; an empty text where there is none."""
        return self.form.prompt if self.form else ""


@dataclass(frozen=True)
class Documents:
    """Usable documents in the seeded order, and the number of skipped rows by reason."""

    documents: tuple[Document, ...]
    skipped: Mapping[str, int]
    source: str
    revision: str
    rows: int | None = None
    """Rows that the source has, with those that were not needed; None where not all were looked at."""
    files_left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of a folder's files that nobody meant as documents, by reason."""
    has_columns: bool = True
    """False where every file is text as it stands, so that `data.text` names nothing."""
    other_columns: tuple[str, ...] = ()
    """Columns of the rows that no template uses, in the order of their names."""
    units: frozenset[str] = frozenset()
    """Values of the column whose values are protected whole, those of rows that give no document among them."""
    nobodys: str = ""
    """Place of the first row that could not be opened, and why, where there is such a column: whose it is, it does not
    say."""

    def explain_skipped(self) -> str:
        """Describe the skipped rows as `skipped 3: 2 empty, 1 not UTF-8 text`; return an empty text for none."""
        return f"skipped {sum(self.skipped.values())}: {list_reasons(self.skipped)}" if self.skipped else ""


def load_documents(
    data: Data,
    seed: int | None,
    at_most: int | None = None,
    *,
    hidden: bool = False,
    open_tokenizer: Callable[[], Any] | None = None,
    or_none: bool = False,
) -> Documents:
    """Load up to `at_most` usable documents, in an order drawn from the seed; without a seed, in their files' order.

    With `hidden`, files of a folder whose names begin with a dot are read as well. `open_tokenizer` is asked where
    there are conversations, for the chat template and its tokens. With `or_none`, there may be no usable one.

    Raises:
        DataError: the source can't be found or reached, lacks a column, or has no usable document; or more rows are bad
            than the recipe allows.
    """
    order_seed = derive_seed(seed or 0, "documents")
    source = open_rows(data, order_seed, at_most, hidden)
    rows = source.open_rows
    if not source.ordered and seed is not None:
        # A folder's text files are not read here: their places are shuffled, with the functions that open them.
        rows = list(rows)
        random.Random(order_seed).shuffle(rows)
    total = len(rows) if isinstance(rows, list) else None
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    first_bad = ""
    columns: set[str] = set()
    units: set[str] = set()
    nobodys = ""
    with closing(RowFormat(data, open_tokenizer)) as form:
        for origin, open_row in rows:
            if at_most is not None and len(documents) == at_most:
                break
            whose = None
            try:
                row = open_row()
                columns.update(row)
                # Before its text is looked at: whose a row is hangs on nothing else that it says.
                if (whose := _unit_of(row, origin, data)) is not None:
                    units.add(whose)
                documents.append(_to_document(row, origin, data, form, whose))
            except UnreadableError as reason:
                if data.unit is not None and whose is None:
                    nobodys = nobodys or f"{origin}: {reason}"
                skipped[str(reason)] += 1
                if str(reason) != EMPTY:
                    first_bad = first_bad or f"{origin}: {reason}"
                    if data.on_bad_row == "error":
                        break
    _check_bad_rows(data, len(documents), skipped, first_bad, source)
    if total is None and at_most is None:
        total = len(documents) + skipped.total()
    used = {name for column in columns_of(data).values() for name in (column, column.partition(".")[0])}
    others = () if data.is_plain else tuple(sorted(columns - used))
    about = source.revision, total, source.files_left_out, source.has_columns, others, frozenset(units), nobodys
    found = Documents(tuple(documents), dict(skipped), data.source, *about)
    if not documents and not or_none:
        raise DataError(
            f"no usable document ({found.explain_skipped() or 'nothing there'})",
            where=f'data.source = "{data.source}"',
            mend=mend_rows(skipped, data, columns, is_folder=source.is_folder),
        )
    return found


def _check_bad_rows(data: Data, usable: int, skipped: Counter[str], first_bad: str, source: Source) -> None:
    """Refuse a source with more bad rows than the recipe allows, which may be none.

    Raises:
        DataError: there are too many; names the first.
    """
    bad, read = skipped.total() - skipped[EMPTY], usable + skipped.total()
    if bad and data.on_bad_row == "error":
        raise DataError(
            f"a bad row, {first_bad}",
            where=f'data.source = "{data.source}"',
            mend='correct or remove it, or let such rows be skipped: data.on_bad_row = "skip"',
        )
    if usable and bad > data.max_bad_fraction * read:
        raise DataError(
            f"{bad:,} of {read:,} rows are bad ({100 * bad / read:.2g} %), one of them {first_bad}",
            where=f'data.source = "{data.source}"',
            mend=f"correct them, check {name_keys(data, is_folder=source.is_folder)}, or raise data.max_bad_fraction"
            f" (now {data.max_bad_fraction:g})",
        )


def _unit_of(row: Row, origin: str, data: Data) -> str | None:
    """Return whose a row is, normalised; None where no column says it of any.

    Raises:
        DataError: the column says nothing of this one.
        UnreadableError: it says nothing that can be written.
    """
    if data.unit is None:
        return None
    if (unit := _value_in(row, data.unit)) is None:
        # Skipped and counted, it would be lost in silence; as a unit of its own, whose it is would not be protected.
        raise DataError(
            f"{origin}: without a value in column {data.unit}",
            where="privacy.unit",
            mend="say of each row whose it is, or take out those of nobody",
        )
    _check_encoding(unit)
    return normalise(unit)


def _check_encoding(text: str) -> None:
    """Refuse a text that can't be written as UTF-8: JSON can escape half of a surrogate pair, a str in Python.

    Raises:
        UnreadableError
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnreadableError("not valid Unicode") from None


def _to_document(row: Row, origin: str, data: Data, form: RowFormat, unit: str | None) -> Document:
    found = form(row)
    text, label = found.text, None
    if data.partition.by is not None and (label := _value_in(row, data.partition.by)) is None:
        raise UnreadableError(f"without a value in column {data.partition.by}")
    _check_encoding(f"{text}{label}")
    if data.is_plain and not found.ends:
        return Document(text, origin, label, unit=unit)
    named = {column if column in row else column.partition(".")[0] for _, column in data.columns}
    return Document(text, origin, label, found, {name: row[name] for name in named if name in row}, unit)


def _value_in(row: Row, column: str) -> str | None:
    """Return a column's value as text; None where it is missing: null, an empty cell, or a number that is none."""
    value = row.get(column)
    return None if value is None or value != value or not str(value).strip() else str(value)


def normalise(text: str) -> str:
    """Return a text in Unicode NFC and with white space folded, in which form equal ones are the same."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def open_rows(data: Data, seed: int, at_most: int | None, hidden: bool = False) -> Source:
    """Open what a recipe names as its source; the seed is for the order of a stream, of which `at_most` are read.

    Raises:
        DataError: it can't be found or reached, lacks a column, or a key is set that has no effect on it.
    """
    if data.source == FILES:
        _refuse_spare(data, "revision", "subset", "split", "files", "text")
        return Source(_rows_of_folder(find_library_files(), data), describe_python())
    if data.source == FUNCTIONS:
        _refuse_spare(data, "revision", "subset", "split", "files")
        return Source(functions_of(find_library_files()), describe_python())
    try:
        path = Path(data.source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no home folder for ~, a NUL in the path
        raise DataError("not a valid path", where=f'data.source = "{data.source[:80]}"') from error
    if is_folder:
        _refuse_spare(data, "revision", "subset", "split")
        paths, reasons = find_files(path, data.files, hidden=hidden)
        left_out = dict(Counter(reasons.values()))
        if not paths:
            told = f", but for {list_reasons(left_out)}" if left_out else ""
            mend = "put documents in it" if not any(path.iterdir()) else "change data.files"
            raise DataError(f'no file matches "{data.files}"{told}', where=str(path), mend=mend)
        rows, has_columns = _rows_of_folder(_relative(paths, path), data), not {*map(format_of, paths)} <= TEXT
        return Source(rows, describe_files(paths), files_left_out=left_out, has_columns=has_columns, is_folder=True)
    if is_file:
        _refuse_spare(data, "revision", "subset", "split", "files")
        if format_of(path) is None:
            raise DataError(
                f'unknown type of file: "{path.suffix or path.name}"',
                where=str(path),
                mend=f"use one of {', '.join(READERS)}, or one of them packed ({', '.join(PACKED)})",
            )
        return Source(read_rows(path, path.name, data), describe_files([path]), has_columns=format_of(path) not in TEXT)
    # The hub's names are NAME or OWNER/NAME: anything else was meant as a path, and the hub is not asked for it.
    if format_of(path) or path.is_absolute() or data.source.startswith((".", "~")) or data.source.count("/") > 1:
        raise DataError(
            "no such file or folder",
            where=f'data.source = "{data.source}"',
            mend="check it: a relative path starts beside the recipe, or in the working folder",
        )
    _refuse_spare(data, "files")
    return open_hub(data, seed, at_most)


def _refuse_spare(data: Data, *keys: str) -> None:
    """Refuse keys that the recipe sets and that have no effect on such a source: somebody expects one.

    Raises:
        DataError: one of the keys is set.
    """
    for key in keys:
        if key in data.model_fields_set:
            raise DataError(
                "this key has no effect on such a source",
                where=f"data.{key}",
                mend=f'leave it out with data.source = "{data.source}"',
            )


def find_files(folder: Path, pattern: str, *, hidden: bool = False) -> tuple[list[Path], dict[Path, str]]:
    """Return a folder's files that match, and those that are left out, each with the reason.

    Raises:
        DataError: not a pattern.
    """
    if ".." in Path(pattern).parts:
        raise DataError(
            f'"{pattern}" leads out of the folder',
            where=str(folder),
            mend="change data.files, for example to **/*.py",
        )
    try:
        # A link to a folder is no file, and is not gone into: it is named where it leads out.
        paths = sorted(file for file in folder.glob(pattern) if file.is_file() or file.is_symlink())
    except (ValueError, NotImplementedError, OSError) as error:
        raise DataError(
            f'not a valid pattern: "{pattern[:80]}" ({error})',
            where=str(folder),
            mend="change data.files, for example to **/*.py",
        ) from error
    root = folder.resolve()
    # Whoever names hidden files in the pattern means them.
    hidden = hidden or _is_hidden(Path(pattern))
    found = {path: _why_left_out(path.relative_to(folder), root, pattern, hidden) for path in paths}
    left_out = {path: reason for path, reason in found.items() if reason}
    return [path for path in paths if path not in left_out and path.is_file()], left_out


def _why_left_out(path: Path, root: Path, pattern: str, hidden: bool) -> str:
    """Return why a file of a folder is no document, or an empty text where it is one."""
    if _is_hidden(path) and not hidden:
        return "hidden"
    if path.name.lower() in ABOUT_THE_DATA and len(path.parts) == 1 and path.name not in pattern:
        return "about the data set"
    target = (root / path).resolve()
    if not target.is_relative_to(root):
        return LINKED
    # A link that is not hidden itself may lead to a file that is.
    return "hidden" if _is_hidden(target.relative_to(root)) and not hidden else ""


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _relative(paths: list[Path], root: Path) -> list[tuple[str, Path]]:
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def describe_files(paths: list[Path]) -> str:
    """Describe files by their number and size, in place of the revision that they do not have."""
    sizes = []
    for path in paths:
        with suppress(OSError):  # gone since it was listed: it is counted as unreadable when its turn comes
            sizes.append(path.stat().st_size)
    return f"{count(len(sizes), 'file')}, {sum(sizes):,} bytes"


def _rows_of_folder(paths: list[tuple[str, Path]], data: Data) -> Rows:
    """Yield a folder's rows: those of each file of rows, and any other file as one row with `path` and `package`."""
    for origin, path in paths:
        if format_of(path) not in TEXT:
            read = 0
            try:
                for row in read_rows(path, origin, data):
                    yield row
                    read += 1
            except DataError:  # one file of many: it counts as one bad row
                lost = f", the rest after {count(read, 'row')} is lost" if read else ""
                yield origin, partial(refuse, f"{path.suffix} file without such columns or damaged{lost}")
        else:
            yield origin, partial(_read_text_file, origin, path, data)


def _read_text_file(origin: str, path: Path, data: Data) -> Row:
    if path.suffix.lower() in PACKED:
        raise UnreadableError("packed text file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnreadableError("not UTF-8 text") from None
    except OSError as error:
        raise UnreadableError(f"unreadable file ({error.strerror})") from None
    return {"path": origin, "package": package_of(origin), data.text: text}
