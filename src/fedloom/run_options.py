"""Options of the commands that carry out a run: its recipe, who watches it beside the terminal, where it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from fedloom.deployment.addresses import split_address
from fedloom.errors import RunError
from fedloom.host.files import path
from fedloom.host.signals import Terminated
from fedloom.monitoring.observer import Observer, Observers, describe_end
from fedloom.progress import Say
from fedloom.text import show_controls

if TYPE_CHECKING:
    from fedloom.deployment.keys import Security

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, typed as in TOML.")
]
ResumeRun = Annotated[
    bool, typer.Option("--resume", help="Go on with a run that was stopped; RECIPE may be its run directory.")
]
RunFolder = Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="A run directory.")]
ServerFolder = Annotated[Path, typer.Option("--server", parser=path, help="The server's folder.")]
PageAddress = Annotated[
    str | None,
    typer.Option(
        "--page",
        metavar="ADDRESS",
        help="Show the run on a live page: a port of this machine alone, or HOST:PORT; the address to open is printed.",
    ),
]
MetricsAddress = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="ADDRESS",
        help="Answer Prometheus at /metrics, and /health: a port of this machine alone, or HOST:PORT.",
    ),
]
MetricsNames = Annotated[bool, typer.Option("--metrics-names", help="Name clients in the metrics.")]
Nodes = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        metavar="HOST[/DEVICE]",
        help="Have a machine that ssh reaches train some of the clients; once for each.",
    ),
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        parser=path, metavar="FILE", help="Write what is said there too, with time and level; rotated by size."
    ),
]
LogFormat = Annotated[
    Literal["text", "json"] | None,
    typer.Option(help="Lines of the log: text, or an object of JSON each; on standard error without --log-file."),
]
NotifyCommand = Annotated[
    str | None,
    typer.Option(
        "--notify",
        metavar="COMMAND",
        help="Run a command when it ends, fails or waits for clients: FEDLOOM_STATE, FEDLOOM_RUN and others say what.",
    ),
]

LinkPort = Annotated[
    int | None,
    typer.Option(
        "--port",
        min=0,
        max=65535,
        help="Of the SuperLink, on the loopback; `8000` if left out. A server on `localhost` has its kits' own.",
    ),
]
WaitSeconds = Annotated[float, typer.Option("--wait", min=1, help="Seconds that clients have to come.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS and keys, for clients on this machine alone.")]
LINK_PORT = 8000
"""Port of the SuperLink where none is typed."""
TERMINATED = 143
"""Exit code of a command that SIGTERM ended."""


class Asked(NamedTuple):
    """Options of who watches, as they were given."""

    page: str | None = None
    metrics: str | None = None
    metrics_names: bool = False
    log_file: Path | None = None
    log_format: Literal["text", "json"] | None = None
    notify: str | None = None


@contextmanager
def observed(command: str, out: Path | None, say: Say, asked: Asked) -> Iterator[Sequence[Observer]]:
    """Open who watches a run beside the terminal, and yield them; they are closed with the block.

    Raises:
        DeploymentError: an address is none.
        RunError: the log can't be written, or the command to notify is none.
    """
    from fedloom.monitoring.board import Board
    from fedloom.monitoring.log import Log
    from fedloom.monitoring.metrics import Metrics
    from fedloom.monitoring.notice import Notice
    from fedloom.monitoring.page import Page
    from fedloom.monitoring.status import status_file

    page_at, metrics_at = read_address("--page", asked.page), read_address("--metrics", asked.metrics)
    if asked.metrics_names and not metrics_at:
        raise typer.BadParameter("--metrics-names names clients in --metrics ADDRESS, which is missing.")
    with ExitStack() as stack:
        # `fedloom status` knows of a run before what it needs is imported, which takes seconds.
        if out:
            stack.enter_context(status_file(out, command))
        board = Board(command, out)
        observers: list[Observer] = [board]
        if asked.log_file or asked.log_format:
            observers.append(Log(asked.log_file, asked.log_format or "text", say))
        if asked.notify is not None:
            observers.append(Notice(asked.notify, board, say))
        if page_at:
            observers.append(Page(board, page_at, say))
        if metrics_at:
            observers.append(Metrics(board, metrics_at, say, names=asked.metrics_names))
        for observer in observers:
            stack.callback(observer.close)
        try:
            yield observers
        except BaseException as error:
            Observers(*observers).show_failure(*describe_end(error))
            raise


@contextmanager
def told_when_terminated() -> Iterator[None]:
    """SIGTERM has an exit code of its own."""
    try:
        yield
    except Terminated:
        raise typer.Exit(TERMINATED) from None


def say(what: str, detail: str) -> None:
    """Print what is done, a word, and what there is to say of it."""
    typer.echo(show_controls(f"{what:<10}{detail}"))


def choose_port(typed: int | None, security: Security | None) -> int:
    """Return the port of the SuperLink; of a local server its kits have it, and it is said where another was typed."""
    if security and security.is_local:
        if typed not in (None, security.port):
            say("port", f"--port {typed} has no effect: kits of a server on {security.host} lead to {security.port}")
        return security.port
    return LINK_PORT if typed is None else typed


def saying_to(observers: Sequence[Observer], say: Say) -> Say:
    """Return a function that says what is done, and has observers hear it too."""

    def tell(what: str, detail: str) -> None:
        say(what, detail)
        for observer in observers:
            observer.show_step(what, detail)

    return tell


def read_address(option: str, text: str | None) -> tuple[str, int] | None:
    """Read an address to listen at: HOST:PORT, or a port alone, which is one of this machine's alone.

    Raises:
        DeploymentError: it is neither.
    """
    if text is None:
        return None
    whole = f"127.0.0.1:{text}" if text.isdecimal() else text
    return split_address(whole, where=option, mend="name one as 127.0.0.1:8080, or a port alone")


def find_resumed(recipe: str, out: Path | None, *, resume: bool, command: str) -> tuple[Path | None, str]:
    """Return the run directory and the recipe; for a run that goes on, the recipe is its own."""
    from fedloom.recipe.loading import shipped_recipes
    from fedloom.records.going_on import how_to_go_on
    from fedloom.records.sweep_folder import is_sweep

    folder = path(recipe)
    if resume and is_sweep(sweep := out or folder):
        go_on = f"go on with: {how_to_go_on(sweep)}"
        raise RunError("a sweep, and not one of its runs", where=str(sweep.absolute()), mend=go_on)
    # By functions that take an impossible name for one that is not there.
    if resume and isfile(folder / "recipe.toml"):
        return out or folder, str(folder / "recipe.toml")
    if resume and out is None:
        how = f"fedloom {command} --resume RUN, or RECIPE --out RUN"
        if folder.suffix == ".toml" or recipe in shipped_recipes():
            raise typer.BadParameter(f"--resume needs a run directory: {how}.")
        what = "no run is in it: it has no recipe.toml" if isdir(folder) else "there is no such run"
        raise RunError(what, where=str(folder.absolute()), mend=f"name a run directory that is there: {how}")
    return out, recipe
