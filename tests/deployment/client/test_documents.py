"""Documents of a client: what is read is what its owner gave, whatever a server asks for."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_recipe

from fedloom.deployment.client.documents import check_takes_all, gather_client
from fedloom.deployment.client.own_documents import HOLDOUT, TRAIN, load_client, mend_of_server
from fedloom.deployment.client.policy import Policy, PrivacyPolicy
from fedloom.deployment.client.refusals import find_refusals
from fedloom.errors import DataError, PolicyError, RecipeError
from fedloom.recipe.data_section import Data
from fedloom.recipe.recipe import Recipe

ASKED = Data(source="the client's own")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of documents, with a hidden file in it, beside a folder that is nobody's business."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"text {number} " * (number + 9))
    (folder / ".env").write_text("SECRET=1")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("SECRET=2")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "diary.txt").write_text("SECRET=3")
    (tmp_path / "private" / TRAIN).write_text(json.dumps({"text": "SECRET=4"}) + "\n")
    return folder


def texts(path: Path, policy: Policy | None = None, **asked: Any) -> list[str]:
    return [found.text for found in load_client(Data(source="x", **asked), path, policy or Policy()).documents]


@pytest.mark.parametrize(
    "asked",
    [
        {"files": ".env"},
        {"files": ".*"},
        {"files": "link/*.txt"},
        {"files": "*/diary.txt"},
        {"source": "/etc/passwd"},
        {"source": "python:stdlib"},
        {"split": "test", "revision": "main", "subset": "x"},
        {"partition": {"kind": "natural", "by": "path"}},
    ],
)
def test_a_server_does_not_choose_what_is_read(asked: dict[str, Any], folder: Path) -> None:
    """Fail where `files`, `source` or `partition` of the recipe are gone by, as finding 3 did."""
    recipe = make_recipe(data={**asked, "documents_per_client": None})
    documents = gather_client(recipe, folder).documents
    assert len(documents.train) + len(documents.holdout) == 8
    assert not any("SECRET" in document.text for document in (*documents.train, *documents.holdout))


@pytest.mark.parametrize("allowed", [("about",), ("about", "about.name"), ("about.name",)])
def test_a_column_that_looks_like_a_part_of_an_allowed_one_is_none(allowed: tuple[str, ...], tmp_path: Path) -> None:
    # Tables that were flattened have such names, and a column is not allowed because the beginning of its name is.
    asked, policy = {"prompt": "{about.name}", "loss": "all"}, Policy(columns=allowed)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"about": {"name": "inside"}}) + "\n")
    assert texts(path, policy, **asked) == ["inside"]
    path.write_text(json.dumps({"about": {"name": "inside"}, "about.name": "SECRET"}) + "\n")
    if "about.name" in allowed:
        assert texts(path, policy, **asked) == ["SECRET"]
    else:
        with pytest.raises(PolicyError, match=r'does not allow the column "about\.name"') as refused:
            texts(path, policy, **asked)
        assert "SECRET" not in str(refused.value)


def test_hidden_files_are_read_where_their_owner_says_so(folder: Path) -> None:
    assert not any("SECRET" in text for text in texts(folder))
    assert sum("SECRET" in text for text in texts(folder, Policy(hidden=True))) == 2
    assert texts(folder, Policy(files=".git/*.txt")) == ["SECRET=2"]


@pytest.mark.parametrize("files", ["**/*", "*/*.txt", "link/*.txt", "**/*.txt"])
def test_a_link_that_leads_out_is_refused_by_its_name(files: str, folder: Path, tmp_path: Path) -> None:
    policy = Policy(files=files)
    (folder / "link").symlink_to(tmp_path / "private", target_is_directory=True)
    if files == "**/*.txt":  # which matches no folder, and goes into none that is linked
        assert len(texts(folder, policy)) == 8
        (folder / "link.txt").symlink_to(tmp_path / "private" / "diary.txt")
    with pytest.raises(DataError, match=r"documents/link.*a link that leads out of the folder, and is not followed"):
        load_client(ASKED, folder, policy)


def test_a_link_inside_is_followed_but_not_to_what_is_hidden(folder: Path) -> None:
    (folder / "again.txt").symlink_to(folder / "0.txt")
    (folder / "env.txt").symlink_to(folder / ".env")
    found = texts(folder)
    assert len(found) == 9
    assert not any("SECRET" in text for text in found)


@pytest.mark.parametrize("name", [TRAIN, HOLDOUT])
def test_a_split_of_links_that_lead_out_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    for file in (TRAIN, HOLDOUT):
        (folder / file).write_text("".join(json.dumps({"text": f"{file} {n} " * 9}) + "\n" for n in range(8)))
    gather_client(make_recipe(), folder)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "private" / TRAIN)
    with pytest.raises(DataError, match=rf"documents/{name}: it is a link that leads out of the folder"):
        gather_client(make_recipe(), folder)


def test_the_column_is_the_owners(tmp_path: Path) -> None:
    rows = [{"text": f"public {n} " * 9, "note": f"noted {n} " * 9, "ssn": f"{n}" * 9} for n in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(data={"text": "ssn", "documents_per_client": None})
    found = {
        policy.text: {document.text.split()[0] for document in gather_client(recipe, path, policy).documents.train}
        for policy in (Policy(), Policy(text="note"))
    }
    assert found == {"text": {"public"}, "note": {"noted"}}


@pytest.mark.parametrize("name", ["documents", "alice/letters"])
def test_documents_that_are_not_there_are_not_asked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a folder may say what is in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedloom.data.documents.open_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match="no such file or folder"):
        load_client(ASKED, Path(name), Policy())


ROWS = '{"text": "a text"}\n'


@pytest.mark.parametrize(
    ("name", "content", "policy", "asked", "why"),
    [
        (
            "a.jsonl",
            '{"story": "x"}\n',
            {},
            {},
            r"--data \S+a\.jsonl: no usable document .*; set --text to the column .*; there are story",
        ),
        ("a.jsonl", ROWS, {"text": "story"}, {}, r"no usable document .*without text in column story.*; set --text to"),
        (
            "d/a.jsonl",
            '{"story": "x"}\n',
            {},
            {},
            r"set --text to the column that holds the text; there are story",
        ),
        ("a.csv", "story\nx\n", {}, {}, 'there is no column "text", which --text names; name a column'),
        ("a.jsonl", ROWS * 9 + "[]\n", {}, {}, r"10 rows are bad .*check --text .* or raise data\.max_bad_fraction"),
        ("a.jsonl", ROWS * 9 + "[]\n", {}, {"on_bad_row": "error"}, r'a bad row, .*: data\.on_bad_row = "skip"'),
        ("d/a.txt", "a text", {"files": "*.md"}, {}, r'no file matches "\*\.md"; change --files'),
        ("d/a.txt", "a text", {"files": "**.x"}, {}, "not a valid pattern: .*; change --files"),
        ("a.jsonl", ROWS, {"files": "*.md"}, {}, "--files: a single file and a split are read whole"),
        ("data.text.bin", ROWS, {}, {}, r"data\.text\.bin: unknown type of file"),
        ("", "", {}, {}, r"--data \S+ere: no such file or folder; name this client's documents: --data PATH"),
    ],
)
def test_errors_name_what_a_clients_owner_can_change(
    name: str, content: str, policy: dict[str, Any], asked: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """They named the keys of a recipe, which is the server's."""
    path = tmp_path / (name or "nowhere")
    if name:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    given = path.parent if "/" in name else path
    with pytest.raises(DataError, match=why) as refused:
        load_client(Data(source="x", **asked), given, Policy(**policy))
    said = str(refused.value).replace(str(tmp_path), "")
    assert "data.partition" not in said
    assert not [key for key in ("data.text ", "data.files", "data.source") if key in said]
    servers = [key for key in ("data.max_bad_fraction", "data.on_bad_row") if key in said]
    assert mend_of_server(refused.value) == "".join(
        f"{key} is a key of the server's recipe: its owner can change it" for key in servers
    )


def test_a_folder_that_is_called_as_a_key_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.text").mkdir()
    (tmp_path / "data.text" / "link.txt").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match=r"^data\.text/link\.txt: it is a link that leads out"):
        load_client(ASKED, Path("data.text"), Policy())


def test_a_single_file_has_no_files_to_choose_from(folder: Path) -> None:
    with pytest.raises(DataError, match="--files: a single file and a split are read whole"):
        load_client(ASKED, folder / "0.txt", Policy(files="*.txt"))


def rows_of(path: Path, authors: int = 6) -> Path:
    rows = [{"text": f"{author} text {n} " * 12, "author": f"a{author}"} for n in range(4) for author in range(authors)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def private_recipe(unit: str = "document", **data: Any) -> Recipe:
    data = {"documents_per_client": None, "client_holdout": 0.4, "duplicates": "report", **data}
    return make_recipe(data=data, privacy={"epsilon": 8.0, "delta": 1e-3, "unit": unit})


def test_a_private_client_takes_no_number_of_its_documents(tmp_path: Path) -> None:
    """A document that is taken away would let in one that was left over."""
    path = rows_of(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"data\.documents_per_client: .*lets another one in"):
        check_takes_all(private_recipe(documents_per_client=8), path)
    check_takes_all(private_recipe(), path)
    assert len(gather_client(make_recipe(data={"documents_per_client": 8}), path).documents.train) < 8


def test_a_private_clients_documents_move_alone(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "rows.jsonl")
    rows = path.read_text().splitlines()
    whole = {document.text for document in gather_client(private_recipe(), path).documents.train}
    for place in range(0, len(rows), 5):
        path.write_text("\n".join(rows[:place] + rows[place + 1 :]) + "\n")
        left = {document.text for document in gather_client(private_recipe(), path).documents.train}
        assert left == whole - {json.loads(rows[place])["text"]}


def test_a_column_of_units_is_its_owners_to_name() -> None:
    recipe = private_recipe(unit="author")
    assert [refusal.key for refusal in find_refusals(Policy(), recipe)] == ["columns"]
    assert [*find_refusals(Policy(columns=("author",)), recipe)] == []
    # Who bounds what is told takes the column that they name, and no other: how many values it has is told.
    for unit, keys in (("author", []), ("document", ["privacy.unit"]), ("ward", ["privacy.unit"])):
        policy = Policy(columns=("author",), privacy=PrivacyPolicy(unit=unit))
        assert [refusal.key for refusal in find_refusals(policy, recipe)] == keys
    by_author = Policy(privacy=PrivacyPolicy(unit="author"))
    assert [refusal.key for refusal in find_refusals(by_author, private_recipe())] == ["privacy.unit"]


def test_whole_authors_are_trained_on_or_held_out(tmp_path: Path) -> None:
    counted: list[int] = []
    found = gather_client(private_recipe(unit="author"), rows_of(tmp_path / "rows.jsonl"), agree=counted.append)
    train, holdout = ({document.unit for document in side} for side in (found.documents.train, found.documents.holdout))
    assert train
    assert holdout
    assert not train & holdout
    assert found.places == counted[0] == len(train | holdout) == 6, "authors, and not their 24 rows"
    assert found.blocks.train.num_units == len(train) < len(found.blocks.train)


def test_too_few_authors_are_too_few_however_much_they_wrote(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match='wants at least 5 values of "author" to train on, not 4'):
        gather_client(private_recipe(unit="author"), rows_of(tmp_path / "rows.jsonl", authors=4))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"text": "words", "author": " "}', r"rows\.jsonl:25: without a value in column author"),
        ('{"text": ""}', r"rows\.jsonl:25: without a value in column author"),
        ('{"text": "wor', r"rows\.jsonl:25: not valid JSON: whose it is can't be known"),
        ('{"text": "words", "author": "\\ud800"}', r"rows\.jsonl:25: not valid Unicode: whose it is can't be known"),
    ],
)
def test_a_row_of_nobody_is_named_before_anything_is_counted(row: str, why: str, tmp_path: Path) -> None:
    path = rows_of(tmp_path / "rows.jsonl")
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(DataError, match=why):
        gather_client(private_recipe(unit="author"), path, agree=pytest.fail)


def test_a_row_without_a_text_that_says_whose_it_is_keeps_its_place(tmp_path: Path) -> None:
    path = rows_of(tmp_path / "rows.jsonl")
    path.write_text(path.read_text() + '{"text": {"a": 1}, "author": "ann"}\n{"author": "bob"}\n')
    assert gather_client(private_recipe(unit="author"), path).places == 8


def test_a_client_does_not_protect_itself_as_a_whole(tmp_path: Path) -> None:
    told = make_recipe(
        data={"documents_per_client": None, "client_holdout": 0.0},
        federation={"strategy": {"weight_by": "equal"}},
        privacy={"epsilon": 8.0, "delta": 1e-3, "unit": "client"},
    )
    with pytest.raises(RecipeError, match="noise that protects whole clients is a server's"):
        gather_client(told, rows_of(tmp_path / "rows.jsonl"))
