"""The command line: parses, calls one function, prints errors. Heavy imports only inside commands.

Exit codes: 0 done, or yes; 1 no, of a command that answers a question, or a bug (with its traceback); 2 the person can
mend it (one line); 130 and 143 interrupted.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedloom import __version__
from fedloom import client_commands as owner
from fedloom import run_options as seen
from fedloom.errors import FedloomError
from fedloom.host.files import path
from fedloom.host.imports import quick_imports
from fedloom.model_commands import chat, convert, evaluate, export, generate, node, preview, push
from fedloom.provision_commands import provision
from fedloom.run_options import Overrides, RecipeName, ResumeRun, RunFolder, say
from fedloom.service_commands import runs, status, stop, submit
from fedloom.text import show_controls

app = typer.Typer(
    name="fedloom",
    help="Fine-tune a language model on documents that never leave their owners.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click names them, too
)

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""Error that typer raises for a command that it can't make sense of; it keeps the class itself private."""
INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options before the command."""
    if version:
        typer.echo(f"fedloom {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, help="The run directory; runs/NAME-TIME if left out.")
    ] = None,
    log: Annotated[
        str | None, typer.Option(help="Tell each round's numbers to tensorboard, mlflow, wandb or trackio.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write the report after every round, not only at the end.")
    ] = False,
    resume: ResumeRun = False,
    node: seen.Nodes = None,
    page: seen.PageAddress = None,
    metrics: seen.MetricsAddress = None,
    metrics_names: seen.MetricsNames = False,
    log_file: seen.LogFile = None,
    log_format: seen.LogFormat = None,
    notify: seen.NotifyCommand = None,
) -> None:
    """Carry out a recipe and leave a run directory with a report."""
    from fedloom.experiment.recognition import open_recipe

    out, recipe = seen.find_resumed(recipe, out, resume=resume, command="run")
    loaded = open_recipe(recipe, overrides or (), say)
    asked = seen.Asked(page, metrics, metrics_names, log_file, log_format, notify)
    with seen.told_when_terminated(), seen.observed("fedloom run", out, say, asked) as observers:
        with quick_imports():
            from fedloom.experiment.clients import LocalClients
            from fedloom.experiment.run import run

        clients = LocalClients(node or ())
        run(loaded, out, resume=resume, log_to=log, watch=watch, clients=clients, observers=observers)


app.add_typer(provision, name="provision")


@app.command()
def serve(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe, for one run; if left out, the server stays for many."),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, help="The run directory; runs/NAME-TIME if left out.")
    ] = None,
    resume: ResumeRun = False,
    port: seen.LinkPort = None,
    wait: seen.WaitSeconds = 600,
    server: Annotated[Path, typer.Option(parser=path, help="What provision init made.")] = Path("fedloom-server"),
    insecure: seen.Insecure = False,
    page: seen.PageAddress = None,
    metrics: seen.MetricsAddress = None,
    metrics_names: seen.MetricsNames = False,
    log_file: seen.LogFile = None,
    log_format: seen.LogFormat = None,
    notify: seen.NotifyCommand = None,
) -> None:
    """Carry out a recipe with clients on other machines; without one, stay for those of `fedloom submit`.

    A server that stays takes the runs of its queue one after another, until Ctrl-C, SIGTERM or `fedloom stop FOLDER`
    ends it; started again, it goes on with the run that was at work.
    """
    from fedloom.deployment.processes import hide_arguments

    hide_arguments()
    loaded = None
    if recipe is not None:
        from fedloom.experiment.recognition import open_recipe

        out, recipe = seen.find_resumed(recipe, out, resume=resume, command="serve")
        loaded = open_recipe(recipe, overrides or (), say)
    elif out or resume:
        raise typer.BadParameter("--out and --resume are of one run, whose RECIPE is missing.")
    from fedloom.deployment.keys import open_server

    security = None if insecure else open_server(server)
    link = seen.choose_port(port, security)
    asked = seen.Asked(page, metrics, metrics_names, log_file, log_format, notify)
    watched = out if loaded else server
    with seen.told_when_terminated(), seen.observed("fedloom serve", watched, say, asked) as observers:
        if loaded is None:
            from fedloom.deployment.server.service import serve_queue

            serve_queue(server, port=link, security=security, wait_seconds=wait, observers=observers)
        from fedloom.deployment.server.serving import serve

        serve(loaded, out, resume=resume, port=link, security=security, wait_seconds=wait, observers=observers)


@app.command()
def join(
    kits: owner.KitFiles,
    data: owner.Documents,
    policy: owner.PolicyFiles = None,
    journal: owner.JournalFiles = None,
    fingerprint: owner.ServerFingerprint = None,
    text: owner.TextColumn = None,
    columns: owner.ColumnNames = None,
    files: owner.FilesGlob = None,
    hidden: owner.HiddenFiles = None,
    tasks: owner.TaskFiles = None,
    keep: owner.KeepFolders = None,
    write_policy: owner.WritePolicy = None,
    log_file: seen.LogFile = None,
    log_format: seen.LogFormat = None,
    notify: seen.NotifyCommand = None,
) -> None:
    """Take part in a federation with documents that stay on this machine, as one client or several.

    With several kits, of one server, the clients have one base model, and train together: --data once for each.
    """
    from fedloom.deployment.client.first_use import confirm_server
    from fedloom.deployment.client.joining import join
    from fedloom.deployment.processes import hide_arguments

    hide_arguments()

    asked = seen.Asked(log_file=log_file, log_format=log_format, notify=notify)
    with seen.told_when_terminated(), seen.observed("fedloom join", None, say, asked) as observers:
        own = {"text": text, "columns": tuple(columns) if columns else None, "files": files, "hidden": hidden}
        members = owner.read_members(kits, data, policy, journal, keep, tasks, own)
        for member in members:
            confirm_server(member.kit, fingerprint, input if sys.stdin.isatty() else None, say)
        join(members, seen.saying_to(observers, say))


app.command()(owner.branch)
app.command()(owner.preflight)
app.command()(owner.journal)
app.command()(owner.audit)


app.command()(status)
app.command()(submit)
app.command()(runs)
app.command()(stop)


@app.command()
def split(
    recipe: RecipeName,
    to: Annotated[Path, typer.Option(parser=path, help="The folder to write.")],
    overrides: Overrides = None,
) -> None:
    """Write what each client of a run holds as folders that join --data takes: to try a deployment out."""
    from fedloom.experiment.recognition import open_recipe

    loaded = open_recipe(recipe, overrides or (), say)
    from fedloom.deployment.client.documents import write_splits
    from fedloom.monitoring.display import Terminal

    for folder in write_splits(loaded, to, Terminal()):
        typer.echo(show_controls(str(folder)))


@app.command()
def plan(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Show what a run would load and need, and the audit of its splits; train nothing."""
    from fedloom.experiment.recognition import open_recipe

    loaded = open_recipe(recipe, overrides or (), say)
    from fedloom.experiment.run import plan
    from fedloom.monitoring.display import Terminal

    display = Terminal()
    display.show_plan(plan(loaded, display))


@app.command()
def sweep(
    recipe: RecipeName,
    axes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.KEY=VALUE,VALUE]...",
            help="Settings, each with what it is to be, beside those of the recipe's \\[sweep] table.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(parser=path, help="The folder; runs/NAME-sweep-TIME if left out.")] = None,
    draw: Annotated[
        int | None, typer.Option("--random", min=1, help="Only so many of the combinations, drawn at random.")
    ] = None,
    log_file: seen.LogFile = None,
    log_format: seen.LogFormat = None,
    notify: seen.NotifyCommand = None,
) -> None:
    """Run every combination of some settings, in as few passes as can be, and compare them."""
    asked = seen.Asked(log_file=log_file, log_format=log_format, notify=notify)
    with seen.told_when_terminated(), seen.observed("fedloom sweep", None, say, asked) as observers:
        from fedloom.experiment.sweep import sweep
        from fedloom.monitoring.display import Terminal
        from fedloom.monitoring.observer import Observers

        sweep(recipe, axes or (), out, Observers(Terminal(), *observers), num_random=draw)


@app.command()
def report(
    run: RunFolder,
    reference: Annotated[str | None, typer.Option(help="Lay a published trajectory over the plot: experiment.")] = None,
) -> None:
    """Write report.md, report.html and plots from a run's records."""
    from fedloom.report.run_report import write_report

    typer.echo(show_controls(str(write_report(run, reference=reference))))


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            parser=path, metavar="RUN RUN [RUN]...", help="Two run directories or more, or a sweep's folder."
        ),
    ],
    out: Annotated[Path, typer.Option(parser=path, help="Where comparison.html goes.")] = Path("comparison"),
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="SECTION.KEY", help="Make arms of the runs by this key; may be given again."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="VALUE", help="The arm that the others are set against; the first if left out."),
    ] = None,
) -> None:
    """Set runs side by side: what differs, in what was asked for and in what came of it."""
    from fedloom.report.comparison import write_comparison

    if against is not None and not by:
        raise typer.BadParameter("--against names an arm: say with --by what makes them.")

    page = write_comparison(runs, out, by=by or (), against=against, say=lambda line: typer.echo(show_controls(line)))
    typer.echo(show_controls(f"\n{page}"))


app.command()(preview)
app.command()(node)
app.command()(convert)
app.command()(export)
app.command()(push)
app.command()(evaluate)
app.command()(generate)
app.command()(chat)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None) -> None:
    """List the recipes that ship; with a name, print one."""
    from fedloom.recipe.loading import find_recipe, load_recipe, shipped_recipes

    if name is not None:
        typer.echo(find_recipe(name)[0], nl=False)
        return
    names = shipped_recipes()
    width = max(map(len, names))
    for shipped in names:
        typer.echo(f"{shipped:<{width}}  {load_recipe(shipped).description}")


@app.command()
def schema() -> None:
    """Print the JSON Schema that editors complete and check recipes by: save it as recipe.schema.json beside yours."""
    from fedloom.recipe.schema import schema_text

    typer.echo(schema_text(), nl=False)


@app.command()
def doctor() -> None:
    """Show what this machine has, and what is missing.

    Exit code 0 where nothing is, 1 where a line says `MISSING`.
    """
    from fedloom.host.machine import examine

    owner.show_findings(examine(), "MISSING")


@app.command()
def fsck(run: RunFolder) -> None:
    """Check that a run directory holds together: nothing lost, nothing counted twice, nothing damaged.

    Exit code 0 where it does, 1 where a line says `BAD`, 2 where there is no such run.
    """
    from fedloom.records.check import check_run

    owner.show_findings(check_run(run), "BAD")


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an old terminal shows ? for μ, and nothing fails for it
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as error:
        usage = f"{error.ctx.command_path} --help" if error.ctx else "fedloom --help"
        print(f"error: {show_controls(error.format_message())} Try {usage}", file=sys.stderr)
        sys.exit(2)
    except FedloomError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if code in (INTERRUPTED, seen.TERMINATED):
        print("interrupted", file=sys.stderr)
    sys.exit(code)
