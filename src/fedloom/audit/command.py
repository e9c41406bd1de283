"""The command `fedloom audit`: a rehearsal of a recipe, or a finished run, attacked and written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedloom.audit.finished import audit_run
from fedloom.audit.rehearsal import rehearse
from fedloom.deployment.client.policy import load_policy, with_options
from fedloom.errors import RecipeError
from fedloom.experiment.recognition import open_recipe
from fedloom.host.files import path as read_path
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import shipped_recipes
from fedloom.records.run import has_plan
from fedloom.report.audit_page import describe_audit, write_audit


def audit_to(
    to: Path | None,
    asked: str,
    overrides: Sequence[str],
    data: Path | None,
    policy: Path | None,
    own: Mapping[str, Any],
    observer: Observer | None = None,
) -> Iterator[str]:
    """Audit a recipe on the owner's documents, or a run directory; yield the lines that say what was found.

    `own` are the owner's options, as `with_options` takes them.

    Raises:
        FedloomError: what the person who asked can mend.
    """
    observer, folder = observer or Terminal(), read_path(asked)
    # A folder that happens to have the name of a recipe that ships is not meant.
    is_run = folder.is_dir() and (has_plan(folder) or asked not in shipped_recipes())
    if is_run:
        given = {"--data": data, "--policy": policy, "changes to a recipe": overrides, **own}
        if spare := next((name for name, value in given.items() if value), None):
            raise RecipeError("a finished run has its own", where=spare, mend="leave it out, or name a recipe")
        record = audit_run(folder, observer)
    elif data is None:
        raise RecipeError("a rehearsal needs documents", where="--data", mend="name yours: --data PATH")
    else:
        loaded = open_recipe(asked, [*overrides])
        record = rehearse(loaded, data, with_options(load_policy(policy), **own), observer, file=policy)
    home = to or (folder if is_run else Path("audits") / f"{record['recipe']}-{datetime.now():%Y%m%d-%H%M%S}")
    page = write_audit(record, home)
    yield from describe_audit(record)
    yield f"{'page':<14}{page}"
