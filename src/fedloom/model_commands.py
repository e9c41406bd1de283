"""Commands of the command line that make or use a model: convert, export, generate. Heavy imports only inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.host.files import path
from fedloom.text import show_controls

RunFolder = Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="A run directory.")]


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub model, or a folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Read a model's pickled weights once, in a process without network, and keep them as safetensors for runs."""
    from fedloom.model.conversion import convert_model

    weights = convert_model(model, revision, lambda what: typer.echo(show_controls(what)))
    for name, digest in weights.record.items():
        typer.echo(show_controls(f"{digest}  {name}"))
    typer.echo(show_controls(f"{weights.location}: runs of this model use it from now on"))


def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(parser=path, help="The folder to write; it must not exist.")],
    merged: Annotated[bool, typer.Option("--merged", help="Write the base model with the adapter merged in.")] = False,
) -> None:
    """Copy a run's best adapter, or merge it into its base model, and prove that it is the same."""
    from fedloom.handover.export import export
    from fedloom.monitoring.display import Terminal

    distance = export(run, to, merged=merged, display=Terminal())
    typer.echo(f"{show_controls(str(to))}: its logits lie {distance:.1e} from the run's, relative to their norm")


def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Argument(help="What to write on from.")],
    base: Annotated[bool, typer.Option("--base", help="First without the adapter.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 80,
) -> None:
    """Let a run's best adapter write on from a prompt."""
    from fedloom.handover.generate import generate

    generate(run, prompt, base=base, max_new_tokens=tokens)
