"""Documents that are not what a loader hopes for: told by file, line and reason, or counted; never quoted."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support.marks import first
from support.tiny import make_recipe

from fedloom.cli import main
from fedloom.data import documents as loader
from fedloom.data.documents import Document, Documents, load_documents
from fedloom.data.splits import split_documents
from fedloom.data.tokens import LONGEST_MEAN_TOKEN, tokenize_documents
from fedloom.errors import DataError
from fedloom.model.source import byte_tokenizer

CANARY = "xylophone"
GOOD = b'{"text": "a good row"}'

INPUTS: dict[str, tuple[bytes, int, str]] = {
    # What a line is -> its bytes, how many documents it gives, and otherwise why it gives none.
    "CRLF": (GOOD + b"\r", 1, ""),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, 1, ""),
    "blank line": (b"  \t", 0, ""),
    "extra key": (b'{"text": "xylophone", "id": 3}', 1, ""),
    "2 MB": (b'{"text": "' + b"xylophone " * 200_000 + b'"}', 1, ""),
    "NUL inside": (b'{"text": "xylophone \\u0000 xylophone"}', 1, ""),
    "emoji, right to left, combining": ('{"text": "👩\u200d🚀 שלום e\u0301 xylophone"}'.encode(), 1, ""),
    "empty text": (b'{"text": ""}', 0, "empty"),
    "NUL alone": (b'{"text": "\\u0000"}', 0, "empty"),
    "null": (b'{"text": null, "body": "xylophone"}', 0, "without text in column text"),
    "missing key": (b'{"body": "xylophone"}', 0, "without text in column text"),
    "number": (b'{"text": 5}', 0, "not text"),
    "list": (b'{"text": ["xylophone"]}', 0, "not text"),
    "malformed": (b'{"text": "xylophone', 0, "not valid JSON"),
    "JSON list": (b'[{"text": "xylophone"}]', 0, "a list, not a JSON object"),
    "JSON string": (b'"xylophone"', 0, "not a JSON object"),
    "lone surrogate": (b'{"text": "xylophone \\ud800"}', 0, "not valid Unicode"),
    "Latin-1": ('{"text": "xylophone é"}'.encode("latin-1"), 0, "not UTF-8 text"),
    "invalid UTF-8": (b'{"text": "xylophone \xff"}', 0, "not UTF-8 text"),
}
"""What a line of a `.jsonl` file can be: what the JSON reader of `datasets` lets through, or ends at without a line."""
BAD = {
    name: (line, reason) for name, (line, gives, reason) in INPUTS.items() if not gives and reason not in ("", "empty")
}


def load(source: Path | str, at_most: int | None = None, **data: Any) -> Documents:
    return load_documents(make_recipe(data={"source": str(source), **data}).data, 7, at_most)


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def refusal(source: Path | str, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(source, **data)
    assert CANARY not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("line", "gives", "reason"), INPUTS.values(), ids=INPUTS)
def test_a_line_gives_its_document_or_is_counted_by_its_reason(
    line: bytes, gives: int, reason: str, tmp_path: Path
) -> None:
    found = load(write_lines(tmp_path / "a.jsonl", GOOD, line, GOOD), max_bad_fraction=0.5)
    assert len(found.documents) == 2 + gives
    assert found.skipped == ({reason: 1} if reason else {})
    assert CANARY not in found.explain_skipped()


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_where_none_may_be_bad_the_line_is_named_and_not_quoted(line: bytes, reason: str, tmp_path: Path) -> None:
    said = refusal(write_lines(tmp_path / "a.jsonl", GOOD, line, GOOD), on_bad_row="error")
    assert f"a bad row, a.jsonl:2: {reason}" in said
    assert 'data.on_bad_row = "skip"' in said


def test_an_empty_text_is_no_bad_row(tmp_path: Path) -> None:
    found = load(write_lines(tmp_path / "a.jsonl", GOOD, b'{"text": " "}'), on_bad_row="error", max_bad_fraction=0)
    assert found.skipped == {"empty": 1}


@pytest.mark.parametrize(
    ("bad", "share", "stops"), [(0, 0.0, False), (1, 0.0, True), (1, 0.01, False), (2, 0.01, True)]
)
def test_more_bad_rows_than_the_recipe_allows_end_the_run(bad: int, share: float, stops: bool, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[GOOD] * (100 - bad), *[b'{"text": ["xylophone"]}'] * bad)
    if stops:
        said = refusal(path, max_bad_fraction=share)
        assert f"{bad} of 100 rows are bad ({bad} %), one of them a.jsonl:" in said
        assert "not text" in said
        assert f"raise data.max_bad_fraction (now {share:g})" in said
    else:
        assert len(load(path, max_bad_fraction=share).documents) == 100 - bad


def test_the_default_allows_one_in_a_hundred() -> None:
    data = make_recipe().data
    assert (data.on_bad_row, data.max_bad_fraction) == ("skip", 0.01)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"id,text\n1,good\n2,xylophone \xff\n", "a.csv:3: not valid Unicode"),
        ("a.txt", b"good\nxylophone \xff\n", "a.txt:2: not UTF-8 text"),
        ("folder/latin.py", "xylophone é".encode("latin-1"), "latin.py: not UTF-8 text"),
        ("folder/rows.parquet", b"PAR1xylophonePAR1", "rows.parquet: .parquet file without such columns or damaged"),
    ],
)
def test_every_kind_of_file_tells_its_place(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path
    if path.parent != tmp_path:
        (path.parent / "good.py").write_text("good")
        source = path.parent
    assert said in refusal(source, on_bad_row="error")


def test_a_cut_off_parquet_is_refused_alone_and_counted_in_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"{CANARY} {number}" for number in range(500)]}), path)
    path.write_bytes(path.read_bytes()[:-200])
    assert "not a readable Parquet file" in refusal(path)
    write_lines(tmp_path / "b.jsonl", *[GOOD] * 3)
    found = load(tmp_path, max_bad_fraction=0.5)
    assert len(found.documents) == 3
    assert found.skipped == {".parquet file without such columns or damaged": 1}


ROWS = b"label,text\n" + b"".join(b"%d,Note %d of a patient\n" % (number % 3, number) for number in range(60))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.sets(st.integers(0, 59), min_size=1, max_size=4))
def test_a_quote_that_is_never_closed_takes_no_row_away_unnoticed(
    rows: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = ROWS
    for row in rows:
        content = content.replace(b",Note %d of" % row, b',"Note %d of' % row)
    path = tmp_path_factory.getbasetemp() / "lone.csv"
    path.write_bytes(content)
    said = refusal(path)
    assert "a quotation mark is not closed" in said
    assert f"begins on line {min(rows) + 2}" in said
    # In a folder it is one file of many: what was read counts, and how many rows that were is said.
    folder = tmp_path_factory.mktemp("lone")
    (folder / "a.csv").write_bytes(content)
    (folder / "b.jsonl").write_bytes(GOOD)
    found = load(folder, max_bad_fraction=0.9)
    assert len(found.documents) == min(rows) + 1
    (reason,) = found.skipped
    assert reason.startswith(".csv file without such columns or damaged")
    assert not min(rows) or f"the rest after {min(rows)} row" in reason


@pytest.mark.parametrize("cells", [b"0,Note, cut at its comma", b"0", b'0,"Note",more,', b"0,Note,"])
def test_a_row_of_other_width_than_the_header_is_a_bad_one(cells: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(ROWS + cells + b"\n")
    found = load(path, max_bad_fraction=0.1)
    more = cells.count(b",") > 1
    assert found.skipped == {f"with {'more' if more else 'fewer'} fields than the header": 1}
    assert (len(found.documents), found.rows) == (60, 61)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"label;text\n1;good\n", 'separated by ";"'),
        ("a.csv", b"label\ttext\n1\tgood\n", "separated by tabs: name the file .tsv"),
        ("a.tsv", b"label,text\n1,good\n", 'separated by ",": name the file .csv'),
        ("a.csv", b"label, text\n1, good\n", 'take the blanks around "text"'),
        ("a.csv", b"text,text\n1,good\n", 'the column "text" is there twice'),
        ("a.csv", "label,text\n1,good\n".encode("utf-16"), "in UTF-16; save it as UTF-8"),
        ("a.jsonl", '{"text": "good"}\n'.encode("utf-16"), "in UTF-16; save it as UTF-8"),
        ("a.json", b'{"text": "xylophone"}', "not a list of rows"),
        ("a.json", b'[{"text": "xylophone"', "not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.jsonl.gz", b"xylophone", "a damaged packed file"),
        ("a.jsonl.zst", b"xylophone", "can't be read: damaged"),
        ("a.parquet.gz", b"xylophone", "unknown type of file"),
    ],
)  # fmt: skip
def test_a_file_in_another_form_says_which(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


@pytest.mark.parametrize("missing", ["null", "NaN", '""'])
def test_a_missing_label_is_no_label(missing: str, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", b'{"text": "good", "site": "a"}', b'{"text": "good", "site": %s}' % missing.encode()
    )
    found = load(path, partition={"kind": "natural", "by": "site"}, max_bad_fraction=0.5)
    assert found.skipped == {"without a value in column site": 1}


@pytest.mark.parametrize("name", ["b.py", "b.jsonl", "b.parquet"])
def test_a_file_that_vanishes_after_it_was_listed_is_counted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("good")
    (tmp_path / name).write_text("xylophone")
    list_files = loader.find_files

    def list_and_lose(folder: Path, pattern: str, *, hidden: bool) -> tuple[list[Path], dict[Path, str]]:
        paths = list_files(folder, pattern, hidden=hidden)
        (folder / name).unlink()
        return paths

    monkeypatch.setattr(loader, "find_files", list_and_lose)
    found = load(tmp_path, max_bad_fraction=0.5)
    assert [document.text for document in found.documents] == ["good"]
    assert sum(found.skipped.values()) == 1
    assert found.revision == "1 file, 4 bytes"


@pytest.mark.parametrize("files", ["../*.txt", "sub/../../*.txt", ".."])
def test_a_glob_does_not_lead_out_of_its_folder(files: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.txt").write_text(CANARY)
    (tmp_path / "inside" / "a.txt").write_text("good")
    assert "leads out of the folder" in refusal(tmp_path / "inside", files=files)


class CountingTokenizer:
    """A real tokenizer that knows how many characters it was given."""

    def __init__(self) -> None:
        self.characters = 0
        self._tokenizer = byte_tokenizer()

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer(text, **options)


LARGE = {
    "words": lambda: "".join(f"word{number} " for number in range(1_000_000))[:10_000_000],
    "one word": lambda: "a" * 10_000_000,
    "blanks and a letter": lambda: " " * 9_999_999 + "a",
    "astral": lambda: "\U0001f600" * 10_000_000,
}


@pytest.mark.long
@pytest.mark.parametrize("kind", first(LARGE, every=2))
def test_ten_million_characters_cost_no_more_than_their_head(kind: str, tmp_path: Path) -> None:
    text = LARGE[kind]()
    path = write_lines(tmp_path / "a.jsonl", json.dumps({"text": text}).encode(), *[GOOD] * 20)
    data = make_recipe(data={"source": str(path), "clients": 1, "documents_per_client": 15, "max_length": 128}).data
    tokenizer = CountingTokenizer()
    tracemalloc.start()
    started = time.perf_counter()
    splits = split_documents(load_documents(data, 7), data, 7)
    held = [*splits.central, *splits.clients[0].train, *splits.clients[0].holdout]
    (large,) = [document for document in held if document.text == text]
    blocks = tokenize_documents([large], tokenizer, data)
    seconds = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{kind}: {seconds:.1f} s, {peak / 1e6:.0f} MB, {tokenizer.characters:,} characters tokenised")
    assert tokenizer.characters <= LONGEST_MEAN_TOKEN * data.max_length
    assert blocks.tokens_NT[0].tolist() == byte_tokenizer()(text[:128])["input_ids"][:128]
    assert seconds < 60
    assert peak < 600e6


def test_the_head_of_a_text_has_the_tokens_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer whose tokens are long and merge over a cut, and a head of a few characters."""
    from tokenizers import Tokenizer, models

    from fedloom.data import tokens

    words = {"a": 0, "aa": 1, "aaaa": 2, "b": 3, "aaaaaaaa": 4}
    merges = [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")]

    class Merging:
        def __init__(self) -> None:
            self._tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": self._tokenizer.encode(text).ids}

    tokenizer = Merging()
    monkeypatch.setattr(tokens, "LONGEST_MEAN_TOKEN", 3)
    for text in ("a" * 1000, "aab" * 500, "b" * 7 + "a" * 900, "", "a", "ab" * 3):
        data = make_recipe(data={"max_length": 8}).data
        blocks = tokenize_documents([Document(text, "test")], tokenizer, data)
        whole = tokenizer(text)["input_ids"][:8]
        assert blocks.tokens_NT[:, : len(whole)].tolist() == ([whole] if len(whole) > 1 else [])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    texts=st.lists(
        st.text(alphabet=st.one_of(st.characters(), st.characters(categories=["Cs", "Cc", "Zs", "Mn"])), max_size=40),
        max_size=8,
    ),
    window=st.sampled_from(["truncate", "blocks"]),
)
def test_any_text_is_a_document_or_counted_and_none_is_lost(
    texts: list[str], window: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps({"text": text}).encode() for text in ["good text", *texts]]
    found = load(write_lines(path, *lines), max_bad_fraction=1)
    assert len(found.documents) + sum(found.skipped.values()) == 1 + len(texts)
    assert sum(any("\ud800" <= letter <= "\udfff" for letter in text) for text in texts) <= found.skipped.get(
        "not valid Unicode", 0
    )
    kept = {document.text for document in found.documents}
    assert kept <= {"good text", *texts}
    data = make_recipe(data={"max_length": 4, "window": window}).data
    blocks = tokenize_documents(found.documents, byte_tokenizer(), data)
    sizes = [len(document.text.encode()) for document in found.documents]
    assert blocks.dropped == sum(size < 2 for size in sizes)
    if window == "truncate":
        assert len(blocks) + blocks.dropped == len(found.documents)
        assert blocks.num_tokens == sum(min(size, 4) for size in sizes if size > 1)
    else:
        assert blocks.num_tokens == sum(size - (size % 4 == 1) for size in sizes)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    content=st.one_of(
        st.binary(max_size=120),
        st.text(alphabet='{}[]":,textd\\\n\r\x00"5.e-', max_size=80).map(str.encode),
        st.builds(
            lambda head, tail: b"text,label\n" + head + b'"' + tail, st.binary(max_size=40), st.binary(max_size=40)
        ),
    ),
    suffix=st.sampled_from([".jsonl", ".csv", ".txt", ".parquet", ".py"]),
    alone=st.booleans(),
)
def test_any_bytes_are_documents_or_one_error(
    content: bytes, suffix: str, alone: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    folder.mkdir(exist_ok=True)
    path = folder / f"any{suffix}"
    path.write_bytes(content)
    try:
        found = load(path if alone else folder, max_bad_fraction=1)
    except DataError as error:
        said = str(error)
    else:
        said = ""
        assert all(document.text.strip() for document in found.documents)
    assert len(said.splitlines()) <= 1


@pytest.mark.parametrize("at_most", [None, 3])
@pytest.mark.parametrize(
    ("values", "skipped"),
    [
        (["good", None, "good", ""], {"without text in column text": 1, "empty": 1}),
        ([1, 2, 3], None),
        ([["xylophone"], ["xylophone"]], None),
    ],
    ids=["null and empty", "numbers", "lists"],
)
def test_rows_of_a_hubs_data_set_are_checked_as_those_of_files(
    values: list[Any],
    skipped: dict[str, int] | None,
    at_most: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "rows.parquet")
    # What the hub would give: `datasets` opens a folder as it opens a repository.
    monkeypatch.setattr(loader, "open_rows", lambda *asked: loader.open_hub(*asked[:3]))
    if skipped is None:
        assert f"no usable document (skipped {len(values)}: {len(values)} not text)" in refusal(tmp_path)
    else:
        found = load(tmp_path, at_most, max_bad_fraction=0.25)
        assert [document.text for document in found.documents] == ["good", "good"]
        assert found.skipped == skipped
        assert "without text in column text" in refusal(tmp_path, on_bad_row="error")


def test_the_command_line_refuses_bad_rows_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[GOOD] * 50, BAD["malformed"][0])
    counts = ["data.clients=3", "data.documents_per_client=9", "data.central_holdout=24"]
    arguments = ["run", "tiny", f"data.source={path}", *counts, "data.on_bad_row=error"]
    monkeypatch.setattr("sys.argv", ["fedloom", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a bad row, a.jsonl:51: not valid JSON" in line
    assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"], "nothing half-written"


def test_a_loader_without_checks_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that these tests must not let through: it takes whatever a row holds for its text."""

    def take(row: Any, origin: str, data: Any, form: Any, unit: Any) -> Document:
        return Document(str(row.get(data.text)), origin)

    monkeypatch.setattr(loader, "_to_document", take)
    caught = []
    for name, (line, gives, reason) in INPUTS.items():
        try:
            test_a_line_gives_its_document_or_is_counted_by_its_reason(line, gives, reason, fresh(tmp_path, name))
        except AssertionError:
            caught.append(name)
    assert {"empty text", "null", "missing key", "number", "list", "lone surrogate"} <= set(caught)


def fresh(folder: Path, name: str) -> Path:
    made = folder / name
    made.mkdir()
    return made
