"""Upload of a run's adapter to the hub: only where somebody asks for it, and private unless they say otherwise.

What is uploaded is an export, proven as any other. Records, documents and samples never are, and the report only where
it is asked for. Paths of this machine are taken out.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fedloom.errors import FedloomError, RunError
from fedloom.handover.export import write_export
from fedloom.handover.proof import open_subject
from fedloom.host.files import writing
from fedloom.hub import COMMIT, MODEL_ID, hub_address, is_offline, mend_for
from fedloom.monitoring.observer import Observer
from fedloom.records.card import HERE, public_name

REPORT = "report.html"
CARD = "README.md"
NAMES = {"adapter_config.json": "base_model_name_or_path", "config.json": "_name_or_path"}
"""Files that may say by a path where the base model lay, and the key in each."""


def push(
    run: str | Path,
    name: str,
    *,
    public: bool = False,
    with_report: bool = False,
    which: str = "best",
    display: Observer | None = None,
) -> str:
    """Upload a run's adapter, or the whole model that it trained, to a repository of the hub, and return its address.

    Raises:
        RunError: the name is none, the repository is one that others can read and that was not asked for, or the hub
            refuses; and as `fedloom.handover.export.export`.
    """
    run, display = Path(run), display or Observer()
    if "/" not in name or not MODEL_ID.fullmatch(name):
        raise RunError("not a name of a model on the hub", where="NAME", mend="write it as OWNER/NAME")
    if is_offline():
        raise RunError("HF_HUB_OFFLINE is set", where="push", mend="unset it to reach the hub")
    report = run / REPORT
    if with_report and not report.is_file():
        raise RunError("the run has no report", where=str(run), mend=f"write it first: fedloom report {run}")
    display.show_step("hub", hub_address())
    exists = _ask(name, lambda hub: _check(hub, name, public=public))
    subject = open_subject(run, which, display)
    with writing(Path(tempfile.gettempdir()), "push again"), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "export"
        write_export(subject, folder, display=display)
        _make_public(folder, name, subject.recipe.model.source, subject.source.revision)
        if with_report:
            (folder / REPORT).write_bytes(report.read_bytes())
        display.show_step("upload", name)
        message = f"{subject.recipe.name}, made with fedloom"
        return str(_ask(name, lambda hub: _upload(hub, name, folder, message, exists=exists, public=public)))


def _make_public(folder: Path, name: str, source: str, revision: str) -> None:
    """Put the repository's name into the card, and take paths of this machine out of what names the base model."""
    card = folder / CARD
    if card.is_file():
        card.write_text(card.read_text(encoding="utf-8").replace(HERE, name), encoding="utf-8")
    for file, key in NAMES.items():
        path = folder / file
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if key in told and not COMMIT.fullmatch(revision):
            path.write_text(json.dumps({**told, key: public_name(source, revision)}, indent=2) + "\n", encoding="utf-8")


def _check(hub: Any, name: str, *, public: bool) -> bool:
    """Return whether the repository is there already.

    Raises:
        RunError: others can read it and that was not asked for, or the other way round.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    hub.whoami()  # the hub says of a stranger's private repository, and to a stranger, that there is none
    try:
        found = hub.model_info(name, timeout=20.0)
    except RepositoryNotFoundError:
        return False
    if not found.private and not public:
        raise RunError("this repository is public", where=name, mend="name another, or say --public")
    if found.private and public:
        raise RunError("this repository is private", where=name, mend="leave --public out, and publish it on its page")
    return True


def _upload(hub: Any, name: str, folder: Path, message: str, *, exists: bool, public: bool) -> str:
    if not exists:
        hub.create_repo(name, private=not public)
    hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return f"{hub.endpoint}/{name}"


def _ask(name: str, question: Any) -> Any:
    """Ask the hub, and turn what its client raises into one error.

    Raises:
        RunError
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return question(HfApi())
    except FedloomError:
        raise
    # The hub's client raises a dozen kinds, and its words may quote what was sent.
    except Exception as error:
        raise RunError(
            f"{hub_address()} did not take it ({type(error).__name__})",
            where=name,
            mend=mend_for(error) or "check the name and the network; hf auth login, or HF_TOKEN, says who you are",
        ) from error
    finally:
        if not quiet:
            enable_progress_bars()
