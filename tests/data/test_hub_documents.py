"""Data sets of a hub, in the forms that they have there, read through `datasets` at a pinned commit.

The hub is one of this machine (`support.hub_here`). The reader is a process of its own: `datasets` reads the hub's
address once, when it is imported.
"""

import gzip
import io
import json
import subprocess
import sys
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.hub_here import environment_of, open_hub

# One reader, which all of them share, and which takes ten seconds to import what it needs.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("hub-documents")]
READER = """
import json, sys
from fedloom.data.documents import load_documents
from fedloom.errors import FedloomError
from fedloom.recipe.data_section import Data
for keys, at_most in json.load(sys.stdin):
    try:
        found = load_documents(Data.model_validate(keys), 7, at_most)
        told = {"revision": found.revision, "texts": [document.text for document in found.documents]}
    except FedloomError as error:
        told = {"error": str(error)}
    print(json.dumps(told))
"""


def rows(word: str, number: int = 12) -> list[dict[str, str]]:
    return [{"content": f"{word} {row} " + "x" * row, "license": "mit"} for row in range(number)]


def lines(word: str, number: int = 12) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(word, number)).encode()


def parquet(word: str) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(word)), file)
    return file.getvalue()


def texts(word: str) -> list[str]:
    return sorted(row["content"] for row in rows(word))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a reader makes of each question, asked in one process; `commits` are the data sets' own."""
    with open_hub() as hub:
        packed = hub.add_dataset(
            "codeparrot/codeparrot-clean-valid",
            {"README.md": b"# valid", "file-000000000001.json.gz": gzip.compress(lines("packed"))},
        )
        moved = hub.add_dataset("some/lines", {"train.jsonl": lines("first")})
        before = moved.references["main"][0].id
        after = moved.commit({"train.jsonl": lines("second")})
        hub.add_dataset("some/parquet", {"data/train-00000-of-00001.parquet": parquet("parquet")})
        hub.add_dataset("some/gated", {"train.jsonl": lines("gated")}, gated=True)
        asked = {
            "packed": ({"source": packed.name}, None),
            "packed, a part": ({"source": packed.name}, 5),
            "newest": ({"source": moved.name}, None),
            "pinned": ({"source": moved.name, "revision": before}, None),
            "parquet": ({"source": "some/parquet"}, None),
            "gated": ({"source": "some/gated"}, None),
            "no such revision": ({"source": moved.name, "revision": "no-such"}, None),
            "nobody's": ({"source": "nobody/nothing"}, None),
        }
        questions = [[{"text": "content", **keys}, at_most] for keys, at_most in asked.values()]
        environment = environment_of(hub, tmp_path_factory.mktemp("home"))
        done = subprocess.run(
            [sys.executable, "-c", READER],
            input=json.dumps(questions),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        answers = dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))
        commits = {"packed": packed.references["main"][0].id, "before": before, "after": after}
        return {**answers, "commits": commits}


def test_the_experiments_data_set_is_read_in_its_real_form(told: dict[str, Any]) -> None:
    """One file of JSON lines, packed by gzip, under the name that it has on the hub."""
    assert told["packed"]["revision"] == told["commits"]["packed"]
    assert sorted(told["packed"]["texts"]) == texts("packed")
    part = told["packed, a part"]["texts"]
    assert len(part) == 5
    assert set(part) < set(texts("packed"))


def test_a_pinned_commit_is_read_though_the_branch_moved_on(told: dict[str, Any]) -> None:
    assert told["newest"] == {"revision": told["commits"]["after"], "texts": told["newest"]["texts"]}
    assert sorted(told["newest"]["texts"]) == texts("second")
    assert told["pinned"]["revision"] == told["commits"]["before"]
    assert sorted(told["pinned"]["texts"]) == texts("first")


def test_parquet_is_read(told: dict[str, Any]) -> None:
    assert sorted(told["parquet"]["texts"]) == texts("parquet")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("gated", "it is gated: ask for access on its page, then hf auth login, or set HF_TOKEN"),
        ("no such revision", "the hub has no such revision: name a branch, a tag or a whole commit"),
        ("nobody's", "check the name and the network"),
    ],
)
def test_what_can_not_be_had_is_one_line_that_says_what_to_do(question: str, words: str, told: dict[str, Any]) -> None:
    assert words in told[question]["error"]
    assert "\n" not in told[question]["error"]
