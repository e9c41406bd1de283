"""Commands and options of the command line for whoever is a client. Heavy imports only inside."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fedloom.host.files import path
from fedloom.host.machine import Finding
from fedloom.run_options import (
    Asked,
    Insecure,
    LinkPort,
    LogFile,
    LogFormat,
    NotifyCommand,
    Overrides,
    RecipeName,
    WaitSeconds,
    choose_port,
    observed,
    say,
    told_when_terminated,
)
from fedloom.text import count, show_controls

if TYPE_CHECKING:
    from fedloom.deployment.client.joining import Member

Given = TypeVar("Given")


def write_policy_and_leave(file: Path | None) -> None:
    """Write a policy file instead of joining, where that is asked for."""
    if file is not None:
        from fedloom.deployment.client.policy import write_policy

        write_policy(file)
        typer.echo(show_controls(f"{file}: read it, change it, and join with --policy {file}"))
        raise typer.Exit


KitFile = Annotated[Path, typer.Argument(parser=path, metavar="KIT", help="The file that the server's owner sent.")]
KitFiles = Annotated[
    list[Path],
    typer.Argument(
        parser=path,
        metavar="KIT...",
        help="The files that the server's owner sent: one for each client, which then have one base model.",
    ),
]
Documents = Annotated[
    list[Path],
    typer.Option("--data", parser=path, help="A client's documents: a file or a folder; once for each kit, in order."),
]
PolicyFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--policy",
        parser=path,
        help="What the server may ask for; safe defaults if left out. Once for all kits, or once for each.",
    ),
]
JournalFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--journal",
        parser=path,
        help="Where all that is asked is written down; beside the kit if left out. Once for each kit.",
    ),
]
PolicyFile = Annotated[
    Path | None, typer.Option(parser=path, help="What the server may ask for; safe defaults if left out.")
]
JournalFile = Annotated[
    Path | None,
    typer.Option(parser=path, help="Where all that is asked is written down; beside the kit if left out."),
]
ServerFingerprint = Annotated[
    str | None,
    typer.Option(metavar="HEX", help="What the server's owner reads aloud; asked for at the first use if left out."),
]
TextColumn = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="The column that holds the text; `text` if left out.")
]
ColumnNames = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN", help="A column that conversations and prompts may read; once for each."),
]
FilesGlob = Annotated[
    str | None, typer.Option(metavar="GLOB", help="The files of the folder that are documents; all if left out.")
]
HiddenFiles = Annotated[
    bool | None, typer.Option("--hidden", help="Files and folders whose names begin with a dot are documents as well.")
]
KeepFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--keep",
        parser=path,
        metavar="FOLDER",
        help="Where adapters that are this client's own are kept, and go nowhere else; beside the journal if left out."
        " Once for all kits, or once for each.",
    ),
]
TaskFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Tasks of this client's own: the server is told how many are right, and nothing else."
    ),
]
TaskFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="FILE",
        help="Tasks of this client's own: the server is told how many are right, and nothing else. Once for all kits,"
        " or once for each.",
    ),
]
WritePolicy = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        metavar="FILE",
        is_eager=True,
        callback=write_policy_and_leave,
        help="Write a policy file with every key and its default, and leave.",
    ),
]


def read_members(
    kits: Sequence[Path],
    data: Sequence[Path],
    policies: Sequence[Path] | None,
    journals: Sequence[Path] | None,
    folders: Sequence[Path] | None,
    tasks: Sequence[str] | None,
    own: Mapping[str, Any],
) -> list[Member]:
    """Read each client's kit and policy, and pair them with what the options say of it; `own` is said of all.

    Raises:
        FedloomError: one of them can't be read, or they can't be at work together.
        typer.BadParameter: an option was given for more kits or fewer than there are.
    """
    from fedloom.deployment.client.joining import Member, check_together, read_kit
    from fedloom.deployment.client.policy import load_policy, with_options

    num_kits, members = len(kits), []
    for kit, documents, policy, journal, keep, file in zip(
        kits,
        _pair("--data", data, num_kits),
        _pair("--policy", policies, num_kits, for_all=True),
        _pair("--journal", journals, num_kits),
        _pair("--keep", folders, num_kits, for_all=True),
        _pair("--tasks", tasks, num_kits, for_all=True),
        strict=True,
    ):
        read, rules = read_kit(kit), with_options(load_policy(policy), **own)
        assert documents, "a required option"
        members.append(Member(read, documents, rules, journal or read.journal, policy, keep, file))
    check_together(members)
    return members


def _pair(option: str, given: Sequence[Given] | None, kits: int, *, for_all: bool = False) -> list[Given | None]:
    """Return what an option says of each kit, in their order; with `for_all`, once is for all of them."""
    if not given or (for_all and len(given) == 1):
        return [given[0] if given else None] * kits
    if len(given) != kits:
        often = "once for all, or once for each, in their order" if for_all else "once for each, in their order"
        told = f"{count(kits, 'kit')}, and {option} {count(len(given), 'time')}"
        raise typer.BadParameter(f"{told}: name it {often}.")
    return [*given]


def branch(
    kit: Annotated[Path, typer.Argument(parser=path, metavar="KIT", help="The file that the owner above sent.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    server: Annotated[
        Path, typer.Option(parser=path, help="What provision init made, for this branch's clients.")
    ] = Path("fedloom-server"),
    first_client: Annotated[
        int,
        typer.Option(min=0, help="Number of this branch's first client: with one of its own, no two draw alike."),
    ] = 0,
    port: LinkPort = None,
    wait: WaitSeconds = 600,
    insecure: Insecure = False,
    fingerprint: ServerFingerprint = None,
    log_file: LogFile = None,
    log_format: LogFormat = None,
    notify: NotifyCommand = None,
) -> None:
    """Take part in the runs of a server above with clients of this server's, as one client: a branch of a tree.

    The recipe is that of the server above, but for data.clients: what it says of a server's limits and deadline holds
    here for this branch's clients.
    """
    from fedloom.deployment.processes import hide_arguments

    hide_arguments()
    from fedloom.experiment.recognition import open_recipe

    asked = Asked(log_file=log_file, log_format=log_format, notify=notify)
    with told_when_terminated(), observed("fedloom branch", None if insecure else server, say, asked) as observers:
        loaded = open_recipe(recipe, overrides or (), say)
        from fedloom.deployment.branching import branch
        from fedloom.deployment.client.first_use import confirm_server
        from fedloom.deployment.client.joining import read_kit
        from fedloom.deployment.keys import open_server

        above = read_kit(kit)
        security = None if insecure else open_server(server)
        confirm_server(above, fingerprint, input if sys.stdin.isatty() else None, say)
        branch(
            above,
            loaded,
            port=choose_port(port, security),
            security=security,
            wait_seconds=wait,
            first_client=first_client,
            observers=observers,
        )


def preflight(
    kit: KitFile,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe that the server may ask for.")
    ] = None,
    data: Annotated[Path | None, typer.Option(parser=path, help="This client's documents: a file or a folder.")] = None,
    policy: PolicyFile = None,
    journal: JournalFile = None,
    text: TextColumn = None,
    columns: ColumnNames = None,
    files: FilesGlob = None,
    hidden: HiddenFiles = None,
    tasks: TaskFile = None,
) -> None:
    """Say whether joining would work, and what the policy allows of a recipe. The server hears nothing of it.

    Exit code 0 where it would, 1 where a line says `NO`.
    """
    from fedloom.deployment.client.rehearsal import rehearse

    options = {"text": text, "columns": tuple(columns) if columns else None, "files": files, "hidden": hidden}
    show_findings(rehearse(kit, data, policy, options, journal, recipe, tasks), "NO")


def journal(
    file: Annotated[Path, typer.Argument(parser=path, metavar="FILE", help="A journal, or the kit that it is of.")],
    policy: PolicyFile = None,
) -> None:
    """Read a client's journal aloud: what was asked, and what may still be asked today.

    Exit code 0 where it could be read, 2 where it could not.
    """
    from fedloom.deployment.client.joining import open_kit
    from fedloom.deployment.client.policy import load_policy
    from fedloom.deployment.client.reading import read_aloud

    for line in read_aloud(open_kit(file).journal if file.suffix == ".kit" else file, load_policy(policy)):
        typer.echo(show_controls(line))


def audit(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, as for run; or a run directory of this machine.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, as for run.")
    ] = None,
    data: Annotated[Path | None, typer.Option(parser=path, help="This client's documents: a file or a folder.")] = None,
    to: Annotated[
        Path | None,
        typer.Option(parser=path, help="Where audit.html goes; audits/NAME-TIME, or the run itself, if left out."),
    ] = None,
    policy: PolicyFile = None,
    text: TextColumn = None,
    columns: ColumnNames = None,
    files: FilesGlob = None,
    hidden: HiddenFiles = None,
) -> None:
    """Attack what a client of a recipe would send, or what a run has kept, and say what it tells of the documents.

    Of a recipe, a rehearsal: half of the documents are trained on, and no server is asked. It takes minutes.
    """
    from fedloom.audit.command import audit_to

    own = {"text": text, "columns": tuple(columns) if columns else None, "files": files, "hidden": hidden}
    for line in audit_to(to, recipe, overrides or (), data, policy, own):
        typer.echo(show_controls(line))


def show_findings(findings: Iterable[Finding], word: str) -> None:
    """Print a line for each finding, and how to mend what is not well, which ends with exit code 1."""
    well = True
    for finding in findings:
        typer.echo(show_controls(f"{'ok' if finding.well else word:<8}{finding.what:<18}{finding.found}"))
        if finding.mend:
            typer.echo(show_controls(f"{'':<26}{finding.mend}"))
        well = well and finding.well
    if not well:
        raise typer.Exit(1)
