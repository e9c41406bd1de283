"""Commands of the command line about keys: `fedloom provision`. Heavy imports only inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedloom.errors import DeploymentError
from fedloom.host.files import path
from fedloom.run_options import ServerFolder
from fedloom.text import show_controls

provision = typer.Typer(
    no_args_is_help=True, suggest_commands=False, help="Keys and certificates of a federation over real machines."
)
MOST_DAYS = 3650
"""Days of the server's certificate authority, beyond which no kit leads anywhere."""
KitFolder = Annotated[Path, typer.Option("--to", parser=path, help="Where the kit goes.")]


@provision.command("init")
def provision_init(
    host: Annotated[str, typer.Option(help="The name or address that clients reach this machine by.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="That they connect to.")] = 8443,
    folder: ServerFolder = Path("fedloom-server"),
) -> None:
    """Server: make a certificate authority, the server's certificate, and an empty list of clients."""
    from fedloom.deployment.keys import describe_expiry, init

    typer.echo(f"{folder}: {describe_expiry(init(folder, host, port).expires())}")


@provision.command("renew")
def provision_renew(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A client, whose key it is then; else the server's.")
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=MOST_DAYS, help="Days from now for which a client's key is taken.")
    ] = 365,
    to: KitFolder = Path(),
    folder: ServerFolder = Path("fedloom-server"),
) -> None:
    """Server: make it another certificate by the same authority; or, for a client, take its key for longer."""
    from fedloom.deployment.keys import describe_expiry, renew, renew_client

    if name is not None:
        made = renew_client(folder, name, to, days)
        typer.echo(f"{name}'s key is taken until {made.expires:%Y-%m-%d}")
        typer.echo(
            f"{name} goes on with the kit that it has, which names the earlier end, or with this one: {made.kit}"
        )
        return
    typer.echo(f"{folder}: {describe_expiry(renew(folder).expires())}")
    typer.echo("a serve that runs keeps the old one until it is started anew (serve --resume)")


@provision.command("list")
def provision_list(
    folder: ServerFolder = Path("fedloom-server"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Server: show whose keys it takes and took: fingerprint, since when, when it was last seen, until when.

    Exit code 0, whether approvals have ended or not.
    """
    from fedloom.deployment.client_list import list_server, write_lines

    told = list_server(folder)
    for line in [json.dumps(told, indent=2)] if as_json else write_lines(told):
        typer.echo(show_controls(line))


@provision.command("request")
def provision_request(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What this client is to be called.")],
    folder: Annotated[Path, typer.Option(parser=path, help="Where its key is kept.")] = Path(),
) -> None:
    """Client: make a key, which stays here, and the file that goes to the server's owner."""
    from fedloom.deployment.client_keys import read_request
    from fedloom.deployment.fingerprints import identify_client
    from fedloom.deployment.keys import request

    asked = read_request(file := request(name, folder))
    typer.echo(f"send {file} to the server's owner; keep {folder / name}.key to yourself")
    typer.echo(
        f"when it is approved, its owner reads this fingerprint to you:\n{identify_client(asked.name, asked.key)}"
    )


@provision.command("rotate")
def provision_rotate(
    kit: Annotated[Path, typer.Argument(parser=path, metavar="KIT", help="The kit that it joins with now.")],
) -> None:
    """Client: make its next key, and a request that the one it has signs; that one is used until the next kit comes."""
    from fedloom.deployment.client.joining import read_kit
    from fedloom.deployment.client_keys import read_request
    from fedloom.deployment.fingerprints import identify_client
    from fedloom.deployment.keys import rotate

    read = read_kit(kit)
    if read.key is None:
        raise DeploymentError("a kit without a certificate has no key", where=str(kit), mend="name one that has")
    asked = read_request(file := rotate(read.name, read.key))
    typer.echo(f"send {file} to the server's owner; join as before until the new kit comes, and with that from then on")
    typer.echo(f"the next key has this fingerprint:\n{identify_client(asked.name, asked.key)}")


@provision.command("approve")
def provision_approve(
    request: Annotated[Path, typer.Argument(parser=path, metavar="FILE", help="What a client sent.")],
    to: KitFolder = Path(),
    days: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_DAYS,
            help="Days from now for which the key is taken. If left out: a year, or for a client that is on the list as"
            " long as stands there.",
        ),
    ] = None,
    folder: ServerFolder = Path("fedloom-server"),
) -> None:
    """Server: take a client's key, and write the kit to send back."""
    from fedloom.deployment.keys import approve

    made = approve(folder, request, to, days)
    name, until = made.name, f"taken until {made.expires:%Y-%m-%d}"
    if made.replaced:
        typer.echo(f"{name}'s next key, which the one before has signed, is {until}; it has this fingerprint:")
        typer.echo(f"{made.client}\nthe one before is taken no longer; send {made.kit} back")
        return
    typer.echo(
        f"{name}'s key is {until} and has this fingerprint; read it to {name}'s owner, whose own must be the same:"
    )
    typer.echo(
        f"{made.client}\nsend {made.kit} back; this server has this fingerprint; read it to {name}'s owner, too:"
    )
    typer.echo(f"{made.server}\nif {name}'s owner has another: fedloom provision revoke {name}")


@provision.command("revoke")
def provision_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client.")],
    folder: ServerFolder = Path("fedloom-server"),
) -> None:
    """Server: take a client's key no longer; a server that runs lets go of it."""
    from fedloom.deployment.keys import revoke

    revoke(folder, name)
    typer.echo(f"{name} is revoked")


@provision.command("backup")
def provision_backup(
    to: Annotated[Path, typer.Option(parser=path, metavar="FILE", help="The file to write; it holds the keys.")],
    folder: ServerFolder = Path("fedloom-server"),
) -> None:
    """Server: write its keys, its list of clients and its queue into one file, which nobody else may read."""
    from fedloom.deployment.backup import back_up
    from fedloom.text import count

    clients = count(back_up(folder, to), "client")
    typer.echo(show_controls(f"{to}: the keys of {folder}, with {clients}; whoever has this file can be this server"))


@provision.command("restore")
def provision_restore(
    file: Annotated[Path, typer.Argument(parser=path, metavar="FILE", help="What provision backup wrote.")],
    to: Annotated[Path, typer.Option(parser=path, metavar="FOLDER", help="The server's folder; it must not be there.")],
) -> None:
    """Server: make its folder of a backup, on this machine or another; clients' kits stay as they are."""
    from fedloom.deployment.backup import restore
    from fedloom.deployment.client_list import list_server, write_lines

    restore(file, to)
    for line in write_lines(list_server(to)):
        typer.echo(show_controls(line))


@provision.command("compose")
def provision_compose(to: Annotated[Path, typer.Option(parser=path, help="The folder that gets them.")]) -> None:
    """Either side: write a Dockerfile and Compose files that run the server or a client."""
    from fedloom.deployment.docker import write_compose

    typer.echo("\n".join(map(str, write_compose(to))))


@provision.command("systemd")
def provision_systemd(to: Annotated[Path, typer.Option(parser=path, help="The folder that gets them.")]) -> None:
    """Either side: write units of systemd that run the server or a client, as a user of their own."""
    from fedloom.deployment.systemd import describe_closed, write_units

    typer.echo(show_controls("\n".join(map(str, write_units(to)))))
    # Not refused: they may be for another machine, on which all of this lies elsewhere.
    if why := describe_closed():
        typer.echo(show_controls(f"note: {why}"), err=True)


@provision.command("helm")
def provision_helm(to: Annotated[Path, typer.Option(parser=path, help="The folder that gets it.")]) -> None:
    """Either side: write a Helm chart that runs the server or a client in Kubernetes."""
    from fedloom.deployment.helm import write_chart

    typer.echo(show_controls("\n".join(map(str, write_chart(to)))))
