"""Files of rows (`.jsonl`, `.csv`, `.parquet` and others), read row by row: a row that can't be read spoils no other.

Messages say what is wrong with a row, and never quote it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import DataError
from fedloom.text import list_some

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]
"""Each row's place, for people, and the function that opens it."""


@dataclass(frozen=True)
class Source:
    """Rows that are opened one by one, so that a folder's files are read only when they are needed."""

    open_rows: Iterable[tuple[str, Callable[[], Row]]]
    """Each row's place, for people, and the function that opens it."""
    revision: str
    """The hub's commit, or for files their number and size."""
    ordered: bool = False
    """True if the rows already come in a seeded order, as those of a stream do."""
    files_left_out: Mapping[str, int] = field(default_factory=dict)
    has_columns: bool = True
    is_folder: bool = False
    """True where `data.files` says which files are read."""


class UnreadableError(Exception):
    """A row that gives no document; its message is a reason of a few words, without any of the row's content."""


def find_value(row: Row, name: str) -> Any:
    """Return the value of a column, or with dots in its name the one inside of it; None where there is none."""
    value: Any = row
    if name in row:
        return row[name]
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def as_is(row: Row) -> Row:
    """Open a row that is already in memory: return it unchanged."""
    return row


def refuse(reason: str) -> Row:
    """Open a row that can't be read: say why.

    Raises:
        UnreadableError
    """
    raise UnreadableError(reason)


def _open(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes, unpacked where its name says that it is packed.

    Raises:
        DataError: it is in UTF-16, as some editors and spreadsheets write.
    """
    packed = path.suffix.lower()
    if packed == ".zst":
        import pyarrow

        raw: Any = pyarrow.input_stream(path, compression="zstd")
    else:
        raw = gzip.GzipFile(path) if packed == ".gz" else path.open("rb", buffering=0)
    file = io.BufferedReader(raw)
    if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        raise DataError("the file is in UTF-16", where=str(path), mend="save it as UTF-8")
    return file


def _rows_of_lines(path: Path, origin: str, parse: Callable[[str], Row]) -> Rows:
    def parse_line(line: bytes) -> Row:
        try:
            return parse(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise UnreadableError("not UTF-8 text") from None

    # Opened as bytes, so that a byte that is not UTF-8 spoils its own line and no other.
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{origin}:{number}", partial(parse_line, line)


def _read_jsonl(path: Path, origin: str, data: Data) -> Rows:
    def parse(line: str) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UnreadableError(NOT_JSON) from None
        if isinstance(row, list):
            raise UnreadableError(NO_ROW)
        return _as_object(row)

    return _rows_of_lines(path, origin, parse)


def _read_json(path: Path, origin: str, data: Data) -> Rows:
    with _open(path) as file:
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError):  # not UTF-8 among them
            mend = "write it as one list of rows, or name it .jsonl if each line is a row"
            raise DataError("not valid JSON", where=str(path), mend=mend) from None
    if not isinstance(rows, list):
        raise DataError(
            "not a list of rows", where=str(path), mend='write it as [{"text": "..."}, ...], or as .jsonl, a row a line'
        )
    for number, row in enumerate(rows, start=1):
        yield f"{origin}:{number}", partial(_as_object, row)


def _as_object(row: object) -> Row:
    if not isinstance(row, dict):
        raise UnreadableError("not a JSON object")
    return row


def _read_txt(path: Path, origin: str, data: Data) -> Rows:
    return _rows_of_lines(path, origin, lambda line: {data.text: line.rstrip("\r\n")})


def _read_csv(path: Path, origin: str, data: Data, *, separator: str = ",") -> Rows:
    # The csv module refuses fields over 128 kB unless told otherwise; more than a C long would not be taken everywhere.
    csv.field_size_limit(2**31 - 1)
    # A byte that is not UTF-8 becomes half a surrogate pair here, which makes its own row a bad one and no other.
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        # Strict: as it is by default, a quote that is never closed swallows the rows behind it without a word.
        rows = csv.reader(lines, delimiter=separator, strict=True)
        begins = 1
        try:
            header = next(rows, [])
            _check_header(data, header, path, separator)
            begins = rows.line_num + 1
            for cells in rows:
                if cells:  # nothing for an empty line
                    yield f"{origin}:{rows.line_num}", partial(_match, header, cells)
                begins = rows.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"a quotation mark is not closed or not written twice, in the row that begins on line {begins}",
                where=str(path),
                mend="close each quoted text, and write a quotation mark inside of it twice",
            ) from error


def _match(header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        raise UnreadableError(f"with {'more' if len(cells) > len(header) else 'fewer'} fields than the header")
    return dict(zip(header, cells, strict=True))


def _check_header(data: Data, header: list[str], path: Path, separator: str) -> None:
    """Refuse a first line without the columns that the recipe names, and say what it looks like instead.

    Raises:
        DataError: a column is not there, or is there twice.
    """
    mend = "name a column of the file's first line, the header"
    if data.is_plain and "text" not in data.model_fields_set:
        mend = f"name columns of the file's first line, the header: {CHOICES}"
    wanted = columns_of(data)
    # Without one that is named, no column is listed: in a file without a header, the first line is a document's text.
    if not {*wanted.values()}.isdisjoint(header):
        mend += f"; there are {_name(header)}"
    for column in set(wanted.values()) & {name.strip() for name in header} - set(header):
        mend = f'take the blanks around "{column}" out of the file\'s first line'
    first = next(iter(wanted.values()))
    others = [other for other in SEPARATORS if other != separator and first in "".join(header).split(other)]
    if others:
        shown = {"\t": "tabs"}.get(others[0], f'"{others[0]}"')
        mend = f"the first line is separated by {shown}: {SEPARATORS[others[0]]}"
    check_column(data, header, path, mend=mend)
    for column in wanted.values():
        if header.count(column) > 1:
            raise DataError(f'the column "{column}" is there twice', where=str(path), mend="rename one of them")


def _read_parquet(path: Path, origin: str, data: Data) -> Rows:
    import pyarrow
    from pyarrow import parquet

    def read_row(batch: pyarrow.RecordBatch, index: int) -> Row:
        try:
            return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
        except UnicodeDecodeError:
            raise UnreadableError("not UTF-8 text") from None

    number = 0
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        check_column(data, names, path, mend=f"it has: {', '.join(names)}")
        wanted = {name if name in names else name.partition(".")[0] for name in columns_of(data).values()}
        for batch in table.iter_batches(columns=[name for name in names if name in wanted]):
            for index in range(batch.num_rows):
                number += 1
                yield f"{origin}:{number}", partial(read_row, batch, index)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file: damaged after row {number}", where=str(path), mend="create the file again"
        ) from error


def columns_of(data: Data) -> dict[str, str]:
    """Return the columns that are read, by keys that name them: the text's, and the label's and the unit's if any."""
    keys: dict[str, str] = {}
    for key, column in data.columns:
        keys[f"{key}: {column}" if key in keys else key] = column
    others = {"data.partition.by": data.partition.by, "privacy.unit": data.unit}
    return {**keys, **{key: column for key, column in others.items() if column is not None}}


def check_column(data: Data, columns: Iterable[str], where: Path | str, *, mend: str) -> None:
    """Refuse a file or data set that has no column for a part of the text, or none for the label.

    Raises:
        DataError: names the column and the recipe's key.
    """
    names = set(columns)
    for key, column in columns_of(data).items():
        if column not in names and column.partition(".")[0] not in names:
            key = key.partition(":")[0]
            raise DataError(f'there is no column "{column}", which {key} names', where=str(where), mend=mend)


SEPARATORS = {",": "name the file .csv", "\t": "name the file .tsv", ";": "separate its fields by commas"}
"""Separators of fields that people's files have, each with what to do about it."""
READERS: dict[str, Callable[[Path, str, Data], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, separator="\t"),
    ".txt": _read_txt,
}
"""Readers of single files by suffix; in `.jsonl`, `.ndjson` and `.txt` each line is a row."""
PACKED = (".gz", ".zst")
"""Suffixes behind those: the file is unpacked while it is read."""


def format_of(path: Path) -> str | None:
    """Return the suffix that says how a file of rows is read, as READERS has it; None if it is no such file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in PACKED:
        suffixes.pop()
        return suffixes[-1] if suffixes[-1] in READERS and suffixes[-1] != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_rows(path: Path, origin: str, data: Data) -> Rows:
    """Yield the rows of a file that `format_of` knows.

    Raises:
        DataError: the file can't be read, or lacks a column that the recipe names.
    """
    try:
        yield from READERS[format_of(path) or ""](path, origin, data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("a damaged packed file", where=str(path), mend="create the file again") from error
    except OSError as error:
        raise DataError(
            f"can't be read: {error.strerror or 'damaged'}", where=str(path), mend="check it and its permissions"
        ) from error


NOT_KEPT = "whose earlier text the chat template changes as a conversation goes on"
"""Reason of a row in which an assistant's turn can't be found by what is written before it."""
A_LIST = "with a list of messages in data.completion"
"""Reason of a row that is a conversation where the recipe has no chat template for it."""
NOT_JSON = "not valid JSON"
"""Reason of a line that is no row of its own, as those of JSON that is written over several."""
NO_ROW = "a list, not a JSON object"
"""Reason of a line that is a list: of rows, or a row without columns."""
MENDS = {
    NOT_JSON: "write each row as one line, or all as a list in a file that is named .json",
    NO_ROW: 'if it is one list of rows, name the file .json; else write each row as {"text": "..."}',
    A_LIST: 'set data.chat_template = "tokenizer", or name a template',
    "not valid Unicode": "save the file as UTF-8",
    "not UTF-8 text": "save the file as UTF-8",
    "not a JSON object": 'write each row as {"text": "..."}',
    "with more fields than the header": "put texts that hold a separator in quotation marks",
    NOT_KEPT: 'learn the last answer alone (data.loss = "completion"), or name a data.chat_template that keeps what it'
    " wrote, or that marks answers by {% generation %}",
}
"""Reason of a bad row -> what to do about a source that has no other rows."""


COLUMNS_NAMED = 8
"""Columns that an error names at most."""
CHATS = ("messages", "conversations")
"""Names that columns of conversations have."""
CHOICES = (
    "a text's in data.text, a question's and its answer's in data.prompt and data.completion,"
    " or a conversation's in data.messages"
)
"""Keys that name columns, for somebody whose recipe has none."""


def mend_rows(skipped: Mapping[str, int], data: Data, columns: Collection[str], *, is_folder: bool) -> str:
    """Return what to do about a source without a usable row, by the reason that most rows have, or by its columns."""
    if not skipped:
        return "name another source, or put documents in it"
    read = data.text if data.is_plain else data.messages
    if read is not None and read not in columns and (chats := [name for name in CHATS if name in columns]):
        return f'set data.messages = "{chats[0]}", the column of conversations'
    if data.is_plain and data.text not in columns:
        if "prompt" in columns and "completion" in columns:
            return 'set data.prompt = "{prompt}" and data.completion = "{completion}"'
        if "instruction" in columns and "output" in columns:
            return "set data.prompt and data.completion as `fedloom recipes alpaca` has them"
        if columns and "text" not in data.model_fields_set:
            return f"name their columns: {CHOICES}; there are {_name(columns)}"
        if columns:
            return f"set data.text to the column that holds the text; there are {_name(columns)}"
    by = data.partition.by
    if by is not None and columns and by.partition(".")[0] not in columns:
        return f"set data.partition.by to a column that is there: {_name(columns)}"
    if columns and any(not {name, name.partition(".")[0]} & {*columns} for name in data.needed_columns):
        return f"check {name_keys(data, is_folder=is_folder)}; there are {_name(columns)}"
    commonest = max(skipped, key=lambda reason: skipped[reason], default="")
    return MENDS.get(commonest, f"check {name_keys(data, is_folder=is_folder)}")


def _name(columns: Collection[str]) -> str:
    """Name the first few columns of rows."""
    return list_some([name[:40] for name in sorted(columns)], COLUMNS_NAMED)


def name_keys(data: Data, *, is_folder: bool) -> str:
    """Name the recipe's keys that say which rows and columns are read, of those that mean something for a source."""
    *keys, last = (
        *(["data.text (the column that holds the text)"] if data.is_plain else [*dict(data.columns)]),
        *(["data.partition.by"] if data.partition.by is not None else []),
        *(["data.files (the glob)"] if is_folder else []),
    )
    return f"{', '.join(keys)} and {last}" if keys else last
