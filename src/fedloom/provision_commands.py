"""Commands of the command line about keys: `fedloom provision`. Heavy imports only inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.host.files import path

provision = typer.Typer(no_args_is_help=True, help="Keys and certificates of a federation over real machines.")
ServerFolder = Annotated[Path, typer.Option("--folder", parser=path, help="The server's folder.")]


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
def provision_renew(folder: ServerFolder = Path("fedloom-server")) -> None:
    """Server: make it another certificate by the same authority; clients' kits stay as they are."""
    from fedloom.deployment.keys import describe_expiry, renew

    typer.echo(f"{folder}: {describe_expiry(renew(folder).expires())}")
    typer.echo("a serve that runs keeps the old one until it is started anew (serve --resume)")


@provision.command("request")
def provision_request(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What this client is to be called.")],
    folder: Annotated[Path, typer.Option(parser=path, help="Where its key is kept.")] = Path(),
) -> None:
    """Client: make a key, which stays here, and the file that goes to the server's owner."""
    from fedloom.deployment.fingerprints import identify_client
    from fedloom.deployment.keys import read_request, request

    file = request(name, folder)
    typer.echo(f"send {file} to the server's owner; keep {folder / name}.key to yourself")
    typer.echo(f"when it is approved, its owner reads this fingerprint to you:\n{identify_client(*read_request(file))}")


@provision.command("approve")
def provision_approve(
    request: Annotated[Path, typer.Argument(parser=path, metavar="FILE", help="What a client sent.")],
    to: Annotated[Path, typer.Option(parser=path, help="Where the kit goes.")] = Path(),
    folder: ServerFolder = Path("fedloom-server"),
) -> None:
    """Server: take a client's key, and write the kit to send back."""
    from fedloom.deployment.keys import approve

    kit, name, client, server = approve(folder, request, to)
    typer.echo(f"{name}'s key has this fingerprint; read it to {name}'s owner, whose own must be the same:\n{client}")
    typer.echo(f"send {kit} back; this server has this fingerprint; read it to {name}'s owner, too:\n{server}")
    typer.echo(f"if {name}'s owner has another: fedloom provision revoke {name}")


@provision.command("revoke")
def provision_revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client.")],
    folder: ServerFolder = Path("fedloom-server"),
) -> None:
    """Server: take a client's key no longer; a server that runs lets go of it."""
    from fedloom.deployment.keys import revoke

    revoke(folder, name)
    typer.echo(f"{name} is revoked")


@provision.command("compose")
def provision_compose(to: Annotated[Path, typer.Option(parser=path, help="The folder that gets them.")]) -> None:
    """Either side: write a Dockerfile and Compose files that run the server or a client."""
    from fedloom.deployment.docker import write_compose

    typer.echo("\n".join(map(str, write_compose(to))))
