"""Every kind of source, and bad rows: skipped and counted, never fatal, never quoted."""

import csv
import gzip
import json
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from support.tiny import make_recipe

from fedloom.data.documents import Documents, load_documents
from fedloom.errors import DataError

CANARY = "xylophone"
NO_TEXT = "without text in column text"
MANY = [f"text number {number}" for number in range(50)]

UNUSUAL = [
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0001f600",
    "שלום \u202eעולם\u202c مرحبا",
    "e\u0301 is not é, \ufb01 is not fi",
    "  blanks\tstay, at both ends  ",
    "line\u2028separator and next\x85line",
    "a NUL \x00 inside",
    "a mark \ufeff inside",
]
"""Valid texts that a reader could be tempted to mend."""

BAD_LINES = {
    "empty": (b'{"text": ""}', "empty"),
    "blank": (b'{"text": " \\t\\n\\u3000"}', "empty"),
    "byte order mark": (b'{"text": "\\ufeff"}', "empty"),
    "NUL": (b'{"text": "\\u0000\\u0000"}', "empty"),
    "blank between marks": (b'{"text": "\\ufeff \\ufeff"}', "empty"),
    "blank between NULs": (b'{"text": "\\u0000 \\u0000\\n"}', "empty"),
    "null": (b'{"text": null}', NO_TEXT),
    "missing key": (b'{"body": "xylophone"}', NO_TEXT),
    "number": (b'{"text": 3}', "not text"),
    "list": (b'{"text": ["xylophone"]}', "not text"),
    "object": (b'{"text": {"text": "xylophone"}}', "not text"),
    "boolean": (b'{"text": true}', "not text"),
    "no JSON": (b"xylophone", "not valid JSON"),
    "cut off": (b'{"text": "xylophone', "not valid JSON"),
    "two objects": (b'{"text": "xylophone"} {"text": "xylophone"}', "not valid JSON"),
    "nested deeply": (b'{"text": ' + b"[" * 100_000, "not valid JSON"),
    "number of 5,000 digits": (b'{"text": "xylophone", "id": ' + b"1" * 5_000 + b"}", "not valid JSON"),
    "JSON list": (b'["xylophone"]', "a list, not a JSON object"),
    "JSON string": (b'"xylophone"', "not a JSON object"),
    "JSON null": (b"null", "not a JSON object"),
    "invalid UTF-8": (b'{"text": "xylophone \xff"}', "not UTF-8 text"),
    "UTF-16": ('{"text": "xylophone"}'.encode("utf-16-le"), "not valid JSON"),
    "lone surrogate": (b'{"text": "xylophone \\ud800"}', "not valid Unicode"),
}
"""A line of a `.jsonl` file that gives no document, and why."""


def load(source: Path | str, seed: int = 7, at_most: int | None = None, **data: object) -> Documents:
    """However many rows are bad; what is too many has its own tests, in tests/faults."""
    return load_documents(make_recipe(data={"source": str(source), "max_bad_fraction": 1, **data}).data, seed, at_most)


def texts_of(found: Documents) -> list[str]:
    return [document.text for document in found.documents]


def write_bytes(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, **columns: object) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_rows(folder: Path, suffix: str, texts: list[str]) -> Path:
    """The texts as a file of that kind."""
    path = folder / f"documents{suffix}"
    if suffix == ".jsonl":
        return write_bytes(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    if suffix == ".parquet":
        return write_parquet(path, text=texts)
    if suffix == ".csv":
        return write_csv(path, [["text"], *([text] for text in texts)])
    return write_bytes(path, "".join(f"{text}\n" for text in texts).encode())


every_suffix = pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".txt"])


@every_suffix
def test_every_kind_of_file_gives_its_rows(tmp_path: Path, suffix: str) -> None:
    found = load(write_rows(tmp_path, suffix, MANY))
    assert sorted(texts_of(found)) == sorted(MANY)
    assert not found.skipped
    assert found.explain_skipped() == ""
    assert len({document.origin for document in found.documents}) == len(MANY)


@every_suffix
def test_valid_text_is_kept_to_the_letter(tmp_path: Path, suffix: str) -> None:
    assert sorted(texts_of(load(write_rows(tmp_path, suffix, UNUSUAL)))) == sorted(UNUSUAL)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_line_ends_inside_a_text_are_kept(tmp_path: Path, suffix: str) -> None:
    texts = ["one\ntwo", "one\r\ntwo\r\n", "one\rtwo", '"quoted", and\nbroken']
    assert sorted(texts_of(load(write_rows(tmp_path, suffix, texts)))) == sorted(texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.jsonl", b'{"text": "one"}\r\n{"text": "two"}\r\n'),
        ("crlf.csv", b"text\r\none\r\ntwo\r\n"),
        ("crlf.txt", b"one\r\ntwo\r\n"),
        ("blank.jsonl", b'\n\n{"text": "one"}\n  \n\r\n{"text": "two"}'),
        ("blank.csv", b"text\n\none\n\ntwo"),
        ("blank.txt", b"\none\n \t\n\ntwo"),
        ("mark.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n'),
        ("mark.csv", b"\xef\xbb\xbftext\none\ntwo\n"),
        ("mark.txt", b"\xef\xbb\xbfone\ntwo\n"),
    ],
)
def test_line_ends_blank_lines_and_a_leading_mark_are_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    found = load(write_bytes(tmp_path / name, content))
    assert sorted(texts_of(found)) == ["one", "two"]
    assert not found.skipped


PACKERS = {".gz": gzip.compress, ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)}


@pytest.mark.parametrize("packed", ["", *PACKERS])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".JSONL", ".Csv"])
def test_a_file_of_rows_is_read_alike_alone_and_in_a_folder(suffix: str, packed: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in MANY]
    content = {
        ".json": f"[{','.join(lines)}]",
        ".csv": "\n".join(["id,text", *(f"1,{text}" for text in MANY)]),
        ".tsv": "\n".join(["id\ttext", *(f"1\t{text}" for text in MANY)]),
    }.get(suffix.lower(), "\n".join(lines))
    pack = PACKERS.get(packed, bytes)
    path = write_bytes(tmp_path / f"a{suffix}{packed.upper() if suffix.isupper() else packed}", pack(content.encode()))
    alone, inside = load(path), load(tmp_path)
    assert sorted(texts_of(alone)) == sorted(texts_of(inside)) == sorted(MANY)
    assert alone.rows == inside.rows == len(MANY)


def test_files_that_nobody_meant_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    for name in ("a.md", "deep/readme.md", "deep/b.md"):
        write_bytes(folder / name, name.encode())
    hidden = (".env", ".git/config", ".git/hooks/post", ".ipynb_checkpoints/a.md", "deep/.DS_Store", ".gitattributes")
    for name in (*hidden, "README.md", "dataset_infos.json"):
        write_bytes(folder / name, b"\x00\xff not meant")
    outside = write_bytes(tmp_path / "outside" / "secret.md", b"secret")
    (folder / "link.md").symlink_to(outside)
    (folder / "deep" / "within.md").symlink_to(folder / "a.md")
    (folder / "linked").symlink_to(outside.parent, target_is_directory=True)
    found = load(folder)
    assert sorted(texts_of(found)) == ["a.md", "a.md", "deep/b.md", "deep/readme.md"]
    assert found.files_left_out == {"hidden": len(hidden), "about the data set": 2, "linked from outside": 2}
    with pytest.raises(DataError, match=r"no file matches .*but for 1 linked from outside"):
        load(folder, files="linked/*")
    write_bytes(folder / ".notes" / "c.md", b"meant")
    assert texts_of(load(folder, files=".notes/*.md")) == ["meant"]
    write_bytes(folder / "README.md", b"meant too")
    assert texts_of(load(folder, files="README.md")) == ["meant too"]


def test_a_folders_name_is_its_label_to_the_letter(tmp_path: Path) -> None:
    names = ("clinic-a.north", "clinic-a.south", "v1.0", "v1.1")
    for name in names:
        write_bytes(tmp_path / name / "a.md", name.encode())
    write_bytes(tmp_path / "top.v2.md", b"top")
    found = load(tmp_path, partition={"kind": "natural", "by": "package"})
    assert {document.text: document.label for document in found.documents} == {
        **{name: name for name in names},
        "top": "top.v2",
    }


@pytest.mark.parametrize("at_most", [None, 5])
def test_every_row_is_accounted_for(at_most: int | None, tmp_path: Path) -> None:
    lines = [*(json.dumps({"text": text}) for text in MANY), '{"text": ""}', "nonsense", '{"text": 5}']
    path = write_bytes(tmp_path / "a.jsonl", "\n".join(lines).encode())
    found = load(path, at_most=at_most, max_bad_fraction=1.0)
    assert found.rows == len(lines)
    assert (found.rows == len(found.documents) + sum(found.skipped.values())) == (at_most is None)


def test_a_folder_gives_a_document_a_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.py", "x = 'é'\r\n\n".encode())
    write_bytes(tmp_path / "deep" / "er" / "b.md", b"# title")
    write_bytes(tmp_path / "c.txt", b"\xef\xbb\xbftwo\nlines")
    found = load(tmp_path)
    assert {document.origin: document.text for document in found.documents} == {
        "a.py": "x = 'é'\r\n\n",
        "deep/er/b.md": "# title",
        "c.txt": "two\nlines",
    }


@pytest.mark.parametrize(
    ("files", "origins"),
    [
        ("**/*.py", {"a.py", "sub/b.py"}),
        ("*.py", {"a.py"}),
        ("sub/*", {"sub/b.py", "sub/c.md"}),
        ("**/[bc].*", {"sub/b.py", "sub/c.md"}),
    ],
)
def test_a_glob_chooses_files_of_a_folder(tmp_path: Path, files: str, origins: set[str]) -> None:
    for name in ("a.py", "sub/b.py", "sub/c.md"):
        write_bytes(tmp_path / name, b"text")
    assert {document.origin for document in load(tmp_path, files=files).documents} == origins


def test_files_of_rows_in_a_folder_give_their_rows(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(tmp_path, ".jsonl", [f"{name} {number}" for number in range(3)]).rename(tmp_path / f"{name}.jsonl")
    write_rows(tmp_path, ".csv", ["from csv"])
    write_rows(tmp_path, ".parquet", ["from parquet"])
    write_bytes(tmp_path / "notes.md", b"a whole file")
    expected = ["a whole file", "from csv", "from parquet", *(f"{n} {i}" for n in ("one", "two") for i in range(3))]
    assert sorted(texts_of(load(tmp_path))) == expected


def test_the_standard_library_is_a_source() -> None:
    found = load("python:stdlib", at_most=20, partition={"kind": "natural", "by": "package"})
    root = Path(sysconfig.get_path("stdlib"))
    assert len(found.documents) == 20
    assert found.revision == "Python " + ".".join(map(str, sys.version_info[:3]))
    for document in found.documents:
        assert document.text == (root / document.origin).read_bytes().decode("utf-8-sig")
        assert document.label == document.origin.split("/")[0].removesuffix(".py")
        assert not {"site-packages", "test", "tests", "__pycache__"} & set(Path(document.origin).parts)


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_skipped_and_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    found = load(write_bytes(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n" + line))
    assert texts_of(found) == ["good"]
    assert found.skipped == {reason: 2}
    assert found.explain_skipped() == f"skipped 2: 2 {reason}"


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_nothing_but_bad_lines_is_an_error_that_counts_them(tmp_path: Path, line: bytes, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        load(write_bytes(tmp_path / "a.jsonl", line))
    assert f"no usable document (skipped 1: 1 {reason})" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_reasons_are_counted_apart_and_never_quote_a_text(tmp_path: Path) -> None:
    lines = [line for line, _ in BAD_LINES.values()]
    found = load(write_bytes(tmp_path / "a.jsonl", b"\n".join([b'{"text": "good"}', *lines])))
    reasons = [reason for _, reason in BAD_LINES.values()]
    assert found.skipped == {reason: reasons.count(reason) for reason in set(reasons)}
    assert CANARY not in repr(found.skipped) + found.explain_skipped()


def test_bad_rows_of_a_csv_are_skipped(tmp_path: Path) -> None:
    content = b'id,text\n1,good\n2\n3,""\n4,xylophone \xff\n5,also good,xylophone\n'
    found = load(write_bytes(tmp_path / "a.csv", content))
    assert texts_of(found) == ["good"]
    wide = {"with more fields than the header": 1, "with fewer fields than the header": 1}
    assert found.skipped == {"empty": 1, "not valid Unicode": 1, **wide}


def test_bad_rows_of_a_parquet_are_skipped(tmp_path: Path) -> None:
    found = load(write_parquet(tmp_path / "a.parquet", text=["good", None, "", "\ufeff"]))
    assert texts_of(found) == ["good"]
    assert found.skipped == {NO_TEXT: 1, "empty": 2}


@pytest.mark.parametrize("values", [[1, 2], [b"xylophone"], [[CANARY]]], ids=["numbers", "bytes", "lists"])
def test_a_parquet_column_that_is_not_text_gives_no_document(tmp_path: Path, values: list[object]) -> None:
    with pytest.raises(DataError, match=f"{len(values)} not text") as caught:
        load(write_parquet(tmp_path / "a.parquet", text=values))
    assert CANARY not in str(caught.value)


def test_invalid_utf8_in_a_parquet_is_skipped(tmp_path: Path) -> None:
    offsets_and_bytes = pyarrow.array([b"good", b"xylophone \xff"], pyarrow.binary()).buffers()
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, offsets_and_bytes)
    found = load(write_parquet(tmp_path / "a.parquet", text=column))
    assert texts_of(found) == ["good"]
    assert sum(found.skipped.values()) == 1
    assert CANARY not in repr(found.skipped)


def test_bad_files_of_a_folder_are_skipped(tmp_path: Path) -> None:
    write_bytes(tmp_path / "good.py", b"x = 1")
    write_bytes(tmp_path / "empty.py", b"")
    write_bytes(tmp_path / "blank.py", b" \r\n\t")
    write_bytes(tmp_path / "mark.py", b"\xef\xbb\xbf")
    write_bytes(tmp_path / "nul.bin", b"\x00" * 8)
    write_bytes(tmp_path / "latin.py", "xylophone é".encode("latin-1"))
    write_bytes(tmp_path / "picture.png", b"\x89PNG xylophone")
    found = load(tmp_path)
    assert texts_of(found) == ["x = 1"]
    assert found.skipped == {"empty": 4, "not UTF-8 text": 2}


def test_a_bad_line_of_a_txt_is_skipped(tmp_path: Path) -> None:
    found = load(write_bytes(tmp_path / "a.txt", b"good\nxylophone \xff\n\xef\xbb\xbf\n\x00\n"))
    assert texts_of(found) == ["good"]
    assert found.skipped == {"not UTF-8 text": 1, "empty": 2}


def test_of_nothing_it_is_said_that_something_has_to_come(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable document \(nothing there\); name another source, or put documents"):
        load(write_bytes(tmp_path / "a.jsonl", b""))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no file matches .*; put documents in it"):
        load(tmp_path / "folder")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "sub/a.py"])
def test_an_empty_source_is_an_error(tmp_path: Path, name: str) -> None:
    path = write_bytes(tmp_path / name, b"")
    with pytest.raises(DataError, match="no usable document"):
        load(path if path.parent == tmp_path else path.parent)


@every_suffix
@pytest.mark.parametrize("folder", ["/nowhere/at/all", "nowhere", ".", "~/nowhere"])
def test_a_missing_file_is_an_error(suffix: str, folder: str) -> None:
    with pytest.raises(DataError, match="no such file or folder") as caught:
        load(f"{folder}/missing{suffix}")
    assert f"missing{suffix}" in str(caught.value)


@pytest.mark.parametrize("source", ["~nobody-of-that-name/a.jsonl", "a" * 300, "a" * 300 + ".jsonl", "a\x00b.jsonl"])
def test_an_impossible_path_is_an_error(source: str) -> None:
    with pytest.raises(DataError, match=r"data\.source"):
        load(source)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(("key", "data"), [("data.text", {"text": "content"}), ("data.partition.by", {})])
def test_a_missing_column_names_those_there_are(tmp_path: Path, suffix: str, key: str, data: dict[str, str]) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        write_csv(path, [["id", "text"], ["1", CANARY]])
    else:
        write_parquet(path, id=[1], text=[CANARY])
    with pytest.raises(DataError) as caught:
        load(path, partition={"kind": "natural", "by": "content"}, **data)
    # A .csv without a header has text in its first line, so its names are not told.
    there = "the header" if suffix == ".csv" else "id, text"
    for words in (str(path), 'no column "content"', key, there):
        assert words in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_missing_column_of_a_jsonl_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="50 without text in column content") as caught:
        load(write_rows(tmp_path, ".jsonl", MANY), text="content")
    assert str(caught.value).endswith("set data.text to the column that holds the text; there are text")
    with pytest.raises(DataError, match=r"in column ward.*; set data\.partition\.by to a column that is there: text"):
        load(write_rows(tmp_path, ".jsonl", MANY), partition={"kind": "natural", "by": "ward"})


def test_another_column_can_hold_the_text(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["text", "content"], ["no", "yes"]])
    assert texts_of(load(path, text="content")) == ["yes"]


@pytest.mark.parametrize("name", ["a.xml", "a.jsonl.bz2", "a"])
def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"unknown type of file") as caught:
        load(write_bytes(tmp_path / name, CANARY.encode()))
    for words in (".jsonl", ".parquet", ".csv", ".txt", name):
        assert words in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("files", ["*.rs", "no/such/*", "", "/absolute/*", "**.rs", "a" * 300])
def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path, files: str) -> None:
    write_bytes(tmp_path / "a.py", b"text")
    with pytest.raises(DataError, match=r"data\.files") as caught:
        load(tmp_path, files=files)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"xylophone", b"PAR1xylophonePAR1"])
def test_a_file_that_is_no_parquet_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = write_bytes(tmp_path / "a.parquet", content)
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_parquet_that_is_damaged_inside_is_an_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[f"{CANARY} {number}" for number in range(1_000)])
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(2_000) + content[2_004:])
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert CANARY not in str(caught.value)


@every_suffix
def test_the_order_comes_from_the_seed(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path, suffix, MANY)
    first = load(path, seed=1)
    assert load(path, seed=1) == first
    assert texts_of(first) != MANY
    other = load(path, seed=2)
    assert texts_of(other) != texts_of(first)
    assert sorted(texts_of(other)) == sorted(MANY)


def test_the_order_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for number in range(20):
            write_bytes(tmp_path / folder / f"{number}.py", MANY[number].encode())
    assert load(tmp_path / "one").documents == load(tmp_path / "two").documents


@pytest.mark.parametrize(("at_most", "expected"), [(1, 1), (20, 20), (50, 50), (99, 50), (None, 50)])
def test_at_most_takes_the_head_of_the_same_order(tmp_path: Path, at_most: int | None, expected: int) -> None:
    path = write_rows(tmp_path, ".jsonl", MANY)
    assert texts_of(load(path, at_most=at_most)) == texts_of(load(path))[:expected]


def test_bad_rows_do_not_count_towards_at_most(tmp_path: Path) -> None:
    found = load(write_rows(tmp_path, ".jsonl", [*MANY, *[""] * 50]), at_most=50)
    assert sorted(texts_of(found)) == sorted(MANY)


def test_rows_without_a_label_are_skipped(tmp_path: Path) -> None:
    rows = [{"text": "a", "kind": "one"}, {"text": "b", "kind": 2}, {"text": "c", "kind": None}, {"text": CANARY}]
    path = write_bytes(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    found = load(path, partition={"kind": "natural", "by": "kind"})
    assert {document.text: document.label for document in found.documents} == {"a": "one", "b": "2"}
    assert found.skipped == {"without a value in column kind": 2}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_label_column_is_read_from_tables(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        write_csv(path, [["id", "kind", "text"], ["1", "one", "a"], ["2", "two", "b"]])
    else:
        write_parquet(path, id=[1, 2], kind=["one", "two"], text=["a", "b"])
    found = load(path, partition={"kind": "dirichlet", "by": "kind", "alpha": 0.5})
    assert {document.text: document.label for document in found.documents} == {"a": "one", "b": "two"}


def test_a_label_is_not_read_where_no_split_needs_it(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "a", "kind": "one"}')
    assert load(path).documents[0].label is None


def test_a_label_that_is_not_valid_unicode_is_skipped(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "a", "kind": "\\ud800"}\n{"text": "b", "kind": "one"}')
    found = load(path, partition={"kind": "dirichlet", "by": "kind", "alpha": 0.5})
    assert texts_of(found) == ["b"]
    assert sum(found.skipped.values()) == 1


@pytest.mark.parametrize("at_most", [None, 5])
def test_an_unreachable_data_set_names_it_and_how_to_mend_it(at_most: int | None) -> None:
    with pytest.raises(DataError) as caught:
        load("nobody/nothing", at_most=at_most)
    for words in ("nobody/nothing", "check the name and the network", "set data.source to the file or folder"):
        assert words in str(caught.value)


@pytest.mark.parametrize("at_most", [None, 12])
def test_a_data_set_is_read_whole_or_streamed_in_a_seeded_order(tmp_path: Path, at_most: int | None) -> None:
    # What the hub would give: datasets opens a folder as it opens a repository.
    from fedloom.data.hub_rows import open_hub

    write_rows(tmp_path, ".jsonl", [f"text {i}" for i in range(40)])
    data = make_recipe(data={"source": str(tmp_path)}).data
    first, again, other = (
        [open_row()["text"] for _, open_row in open_hub(data, seed, at_most).open_rows] for seed in (1, 1, 2)
    )
    assert sorted(first) == sorted(f"text {i}" for i in range(40))
    assert first == again
    assert (first != other) == (at_most is not None), "a whole data set is put in order by whoever loads it"
