"""Documents that a client's owner gave: which files and which column of them are read. No torch here.

What is read is the owner's to say, and lies inside the folder: a link that leads out of it is refused by its name.
Errors name what the owner can change, `--data`, `--text` and `--files`, and say where a key is the server's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedloom.data.documents import LINKED, Document, Documents, find_files, load_documents
from fedloom.deployment.client.policy import Policy
from fedloom.errors import DataError, FedloomError, PolicyError
from fedloom.recipe.data_section import Data
from fedloom.recipe.loading import list_keys

TRAIN, HOLDOUT = "train.jsonl", "holdout.jsonl"
NO_FILE = Policy()
"""Policy of an owner who wrote none."""
ROWS = ("on_bad_row", "max_bad_fraction", "prompt", "completion", "messages", "chat_template", "system", "loss", "end")
"""Keys of a recipe's section `data` that reading goes by: what is done with rows that are bad, and their format."""
OPTIONS = {"source": "--data", "text": "--text", "files": "--files"}
"""Keys of that section that are the owner's to say, and the options that say it."""
OWN_KEY = re.compile(rf'(?<![\w/.-])data\.({"|".join(OPTIONS)})(?![\w/.-])(?: = "([^"]*)")?')
KEY = re.compile(r"(?<![\w/.-])[a-z_]+(?:\.[a-z_]+)+(?![\w/.-])")
"""A key of a recipe as errors write it; a part of a path is none."""


def check_there(path: Path) -> None:
    """Refuse documents that are not there.

    Raises:
        DataError
    """
    if not path.exists():
        raise DataError(
            "no such file or folder", where=f"--data {path}", mend="name this client's documents: --data PATH"
        )


def read_split(path: Path) -> tuple[Path, Path] | None:
    """Return the two files of a split that its owner made, or None where the path is none.

    Raises:
        DataError: one of them is a link that leads elsewhere.
    """
    files = path / TRAIN, path / HOLDOUT
    if not all(file.is_file() for file in files):
        return None
    for file in files:
        if not file.resolve().is_relative_to(path.resolve()):
            raise _leads_out(file)
    return files


def load_client(
    asked: Data,
    path: Path,
    policy: Policy,
    seed: int | None = None,
    at_most: int | None = None,
    *,
    open_tokenizer: Callable[[], Any] | None = None,
    private: bool = False,
) -> Documents:
    """Load the documents at a path: `asked` says how rows are judged, and the policy which files and column are read.

    `open_tokenizer` is asked where they are conversations. With `private`, rows that can't be read refuse nothing,
    however many they are: by templates and limits of its choice, a server would learn of each what it is like. Where a
    column says whose a row is, each has to be opened far enough to tell: no server has a say in that.

    Raises:
        DataError: they can't be read, whose one is can't be known, or a link leads out of the folder.
        PolicyError: a column was read that only looks like a part of one that the policy allows.
    """
    check_there(path)
    # Absolute, since what is not there would be looked for on the hub, by a name that is nobody's business.
    told = {"source": str(path.absolute()), **({"text": policy.text} if asked.is_plain else {})}
    try:
        if path.is_dir():
            told["files"] = policy.files
            _, left_out = find_files(path, policy.files, hidden=policy.hidden)
            for link in (file for file, reason in left_out.items() if reason == LINKED):
                raise _leads_out(link)
        elif policy.files != NO_FILE.files:
            raise DataError("a single file and a split are read whole", where="--files", mend="leave it out")
        kept = asked.model_dump(include=set(ROWS) & asked.model_fields_set)
        kept |= {"on_bad_row": "skip", "max_bad_fraction": 1.0} if private else {}
        data = Data.model_validate({**kept, **told}).with_unit(asked.unit)
        found = load_documents(
            data, seed, at_most, hidden=policy.hidden, open_tokenizer=open_tokenizer, or_none=private
        )
        _check_columns(data, found.documents, policy)
        if private and found.nobodys:
            raise DataError(
                f"{found.nobodys}: whose it is can't be known",
                where="privacy.unit",
                mend="correct it, or take it out",
            )
        return found
    except DataError as error:
        what, where, mend = (OWN_KEY.sub(_name_option, part) for part in (error.what, error.where, error.mend))
        raise DataError(what, where=where, mend=mend) from None


def _check_columns(data: Data, documents: Iterable[Document], policy: Policy) -> None:
    """Refuse documents made of a column `a.b` where the policy allows `a`, and so what is inside of it, alone.

    Raises:
        PolicyError
    """
    # Whether a name with a dot is a column or a place inside of one, rows alone say.
    inside = () if data.is_plain else {column for _, column in data.columns} - set(policy.columns)
    for column in sorted(inside):
        if any(column in (document.row or ()) for document in documents):
            raise PolicyError(("columns", f'does not allow the column "{column}" to be read'))


def _name_option(found: re.Match[str]) -> str:
    return OPTIONS[found[1]] + ("" if found[2] is None else f" {found[2]}")


def mend_of_server(error: FedloomError) -> str:
    """Return what to do where an error names a key of the server's recipe; an empty text where it names none."""
    named = KEY.findall(f"{error.where} {error.what} {error.mend}")
    key = next((key for key in named if key in set(list_keys())), None)
    return f"{key} is a key of the server's recipe: its owner can change it" if key else ""


def _leads_out(link: Path) -> DataError:
    return DataError(
        "it is a link that leads out of the folder, and is not followed",
        where=str(link),
        mend="put the file itself there, or take the link away",
    )
