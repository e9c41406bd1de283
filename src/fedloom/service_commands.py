"""Commands of the command line for a server that stays, and for what is at work: heavy imports only inside.

They are `submit`, `runs`, `status` and `stop`; the last two are of runs and sweeps, too.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.errors import RunError
from fedloom.host.files import path
from fedloom.run_options import Overrides, RecipeName, ResumeRun, RunFolder, ServerFolder, find_resumed, say
from fedloom.text import quote_path, show_controls

if TYPE_CHECKING:
    from fedloom.deployment.queue import Entry, Queue

LOOK_SECONDS = 0.2


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=path, help="The run directory; runs/NAME-TIME beside the server's folder if left out."),
    ] = None,
    resume: ResumeRun = False,
    server: ServerFolder = Path("fedloom-server"),
) -> None:
    """Put a run into the queue of a server that stays (`fedloom serve` without a recipe), and leave.

    The recipe is checked as `serve` checks it, and kept as it is now.
    """
    from fedloom.deployment.queue import BRANCH
    from fedloom.experiment.recognition import open_recipe
    from fedloom.monitoring.status import find_work

    if (work := find_work(server)) and work.command == BRANCH:
        raise RunError(
            "a branch works with it, whose runs are those of the server above",
            where=str(server),
            mend="submit it there",
        )
    out, recipe = find_resumed(recipe, out, resume=resume, command="submit")
    loaded = open_recipe(recipe, overrides or (), say)
    from fedloom.deployment.queue import Queue
    from fedloom.deployment.server.service import submit

    entry = submit(loaded, server, out, resume=resume, say=say)
    say("queued", f"run {entry.number}: {entry.out}")
    queue = Queue(server)
    if one_run := queue.one_run:
        say(
            "note",
            f"nobody takes it now: the server at work with {server} carries out {one_run} alone; it begins once that"
            " has ended and fedloom serve is started without a recipe",
        )
    elif not queue.is_served:
        say("note", f"nobody works with {server} now: it begins once fedloom serve is started")


def runs(
    server: ServerFolder = Path("fedloom-server"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """List the runs of a server that stays: what waits, what is at work, in which round, and what has ended, and how.

    Exit code 0, whatever became of them.
    """
    from fedloom.deployment.queue import list_runs, write_lines

    told = list_runs(server)
    for line in [json.dumps(told, indent=2)] if as_json else write_lines(told):
        typer.echo(show_controls(line))


def status(run: RunFolder) -> None:
    """Show what a run, a sweep or a server is doing, its clients and last rounds; or how it ended, and how it goes on.

    Exit code 0 where somebody is at work in it or it is done, 1 where nobody is and it is not, 2 where there is no such
    run.
    """
    from fedloom.deployment.queue import BRANCH
    from fedloom.monitoring.status import describe, find_work, is_well

    server, work = _is_server(run), find_work(run)
    lines = [*describe(run)] if work or not server else [_describe_server(run)]
    if server and not (work and work.command == BRANCH):  # whose runs are those of the server above
        lines.append(_count_runs(run))
    for line in lines:
        typer.echo(show_controls(line))
    if not (work or (_is_served(run) if server else is_well(run))):
        raise typer.Exit(1)


def _is_server(folder: Path) -> bool:
    """Return whether a folder is a server's, with keys or without."""
    from fedloom.deployment.queue import QUEUE

    return isfile(folder / "server.toml") or isdir(folder / QUEUE)


def _is_served(server: Path) -> bool:
    """Return whether a server is at work with its folder, be it for one run alone."""
    from fedloom.deployment.keys import SERVE_LOCK
    from fedloom.host.files import is_held

    return is_held(server / SERVE_LOCK)


def _describe_server(server: Path) -> str:
    """Say in a line who is at work with a server's folder, where it is no service of this user."""
    from fedloom.deployment.queue import Queue
    from fedloom.monitoring.standing import AT_WORK

    if one_run := Queue(server).one_run:
        return f"{'server':<10}at work for one run alone: fedloom status {quote_path(one_run)}"
    if _is_served(server):
        return f"{'server':<10}{AT_WORK}"
    return f"{'server':<10}nobody is at work with it; start it with: fedloom serve --server {quote_path(server)}"


def _count_runs(server: Path) -> str:
    """Say in a line how many runs a server has, by their states."""
    from fedloom.deployment.queue import list_runs

    told, option = list_runs(server), f"--server {quote_path(server)}"
    states = Counter(run["state"] for run in told["runs"])
    if told["damaged"]:
        states["damaged"] = len(told["damaged"])
    if not states:
        return f"{'runs':<10}none yet; submit one with: fedloom submit RECIPE {option}"
    counted = ", ".join(f"{number:,} {state}" for state, number in states.items())
    return f"{'runs':<10}{counted}; list them with: fedloom runs {option}"


def stop(
    run: RunFolder,
    now: Annotated[
        bool, typer.Option("--now", help="At once, not after the step, or a service's round, that is under way.")
    ] = False,
    server: ServerFolder = Path("fedloom-server"),
) -> None:
    """End a run or sweep at work on this machine, as Ctrl-C does, or a run that waits in a queue: it can go on later.

    The server that stays goes on with its next run; it is ended itself where RUN is its folder. Exit code 0 when it has
    ended, 1 where nobody is at work in it on this machine, 2 where there is no such run.
    """
    from fedloom.deployment.queue import BRANCH, QUEUE, SUBMIT, Queue
    from fedloom.monitoring.status import find_work, stop

    queue = Queue(server)
    if (entry := queue.find(run)) and entry.is_unfinished:
        _stop_in(queue, entry, now)
        return
    if (work := find_work(run)) and work.command == SUBMIT:
        raise RunError(
            "it is the run of a server that stays", where=str(run), mend="name that server's folder: --server FOLDER"
        )
    if one_run := "" if work else Queue(run).one_run:
        raise RunError(
            "a server is at work with it for one run alone",
            where=str(run),
            mend=f"name that run: fedloom stop {quote_path(one_run)}",
        )
    # Nobody has to be at work with a server's folder, which is no run directory.
    work = stop(run, at_once=now, say=typer.echo) if work or not _is_server(run) else None
    if work is None:
        typer.echo(show_controls(f"{run}: nobody is at work in it on this machine"))
        raise typer.Exit(1)
    again = f"start it again with: fedloom serve --server {quote_path(run)}"
    how = again if (run / QUEUE).is_dir() else _go_on(work.command, run)
    if work.command == BRANCH:
        how = "start it again as before"
    typer.echo(show_controls(f"stopped; {how}"))


def _stop_in(queue: Queue, entry: Entry, now: bool) -> None:
    """Have a run of a queue end, and wait for that."""
    from fedloom.deployment.queue import SUBMIT

    entry = queue.stop(entry, at_once=now)
    if entry.is_unfinished:
        say("stopping", f"run {entry.number} ends{'' if now else ' after the round that is under way'}")
    while (entry := queue.stop(entry, at_once=now)).is_unfinished:
        time.sleep(LOOK_SECONDS)
    how = _go_on(SUBMIT, entry.folder) if entry.state == "stopped" else "it had ended before"
    typer.echo(show_controls(f"{entry.state}; {how}"))


def _go_on(command: str, run: Path) -> str:
    from fedloom.deployment.queue import SUBMIT
    from fedloom.records.going_on import how_to_go_on

    if isdir(run):
        return f"go on with: {how_to_go_on(run, command)}"
    return f"nothing was begun: {'submit it again' if command == SUBMIT else 'start it as before'}"
