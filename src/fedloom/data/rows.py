"""Files of rows (`.jsonl`, `.csv`, `.parquet`, `.txt`), read row by row: a row that can't be read spoils no other.

Messages say what is wrong with a row, and never quote it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import DataError

if TYPE_CHECKING:
    from fedloom.recipe.sections import Data

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]
"""Each row's place, for people, and the function that opens it."""


class UnreadableError(Exception):
    """A row that gives no document; its message is a reason of a few words, without any of the row's content."""


def as_is(row: Row) -> Row:
    """Open a row that is already in memory: return it unchanged."""
    return row


def _rows_of_lines(path: Path, origin: str, parse: Callable[[str], Row]) -> Rows:
    def parse_line(line: bytes) -> Row:
        try:
            return parse(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise UnreadableError("not UTF-8 text") from None

    # Opened as bytes, so that a byte that is not UTF-8 spoils its own line and no other.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{origin}:{number}", partial(parse_line, line)


def _read_jsonl(path: Path, origin: str, data: Data) -> Rows:
    def parse(line: str) -> Row:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UnreadableError("not valid JSON") from None
        if not isinstance(row, dict):
            raise UnreadableError("not a JSON object")
        return row

    return _rows_of_lines(path, origin, parse)


def _read_txt(path: Path, origin: str, data: Data) -> Rows:
    return _rows_of_lines(path, origin, lambda line: {data.text: line.rstrip("\r\n")})


def _read_csv(path: Path, origin: str, data: Data) -> Rows:
    # The csv module refuses fields over 128 kB unless told otherwise; more than a C long would not be taken everywhere.
    csv.field_size_limit(2**31 - 1)
    # A byte that is not UTF-8 becomes half a surrogate pair here, which makes its own row a bad one and no other.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines)
        # The columns are not listed: in a file without a header, the first line is a document's text.
        check_column(data, rows.fieldnames or [], path, mend="name a column of the file's first line, the header")
        for row in rows:
            yield f"{origin}:{rows.line_num}", partial(as_is, row)


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
        for batch in table.iter_batches(columns=[name for name in names if name in (data.text, data.partition.by)]):
            for index in range(batch.num_rows):
                number += 1
                yield f"{origin}:{number}", partial(read_row, batch, index)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable Parquet file: damaged after row {number}", where=str(path), mend="create the file again"
        ) from error


def check_column(data: Data, columns: Iterable[str], where: Path | str, *, mend: str) -> None:
    """Refuse a file or data set that has no column for the text, or none for the label.

    Raises:
        DataError: names the column and the recipe's key.
    """
    for key, column in (("data.text", data.text), ("data.partition.by", data.partition.by)):
        if column is not None and column not in columns:
            raise DataError(f'there is no column "{column}", which {key} names', where=str(where), mend=mend)


READERS: dict[str, Callable[[Path, str, Data], Rows]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_txt,
}
"""Readers of single files by suffix; in `.jsonl` and `.txt` each line is a row."""


def read_rows(path: Path, origin: str, data: Data) -> Rows:
    """Yield the rows of a file whose suffix is among READERS.

    Raises:
        DataError: the file can't be read, or lacks a column that the recipe names.
    """
    try:
        yield from READERS[path.suffix](path, origin, data)
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror}", where=str(path), mend="check its permissions") from error
    except csv.Error as error:
        raise DataError("not a readable .csv file", where=str(path), mend="create the file again") from error
