"""Commands of the command line that make, feed or use a model. Heavy imports only inside."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fedloom.host.files import path
from fedloom.run_options import RunFolder
from fedloom.text import show_controls

Client = Annotated[
    int | None, typer.Option(min=0, help="The own adapter of the client of this number, in the place of the best.")
]


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


def preview(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, as for run.")
    ] = None,
    client: Annotated[int, typer.Option(min=0, help="The client whose documents are shown.")] = 0,
    rows: Annotated[int, typer.Option(min=0, help="Blocks that are shown.")] = 3,
) -> None:
    """Show what a model will see of a client's documents, and what of it it will learn."""
    from rich.text import Text

    from fedloom.errors import DataError
    from fedloom.experiment.preparation import gather
    from fedloom.experiment.preview import describe_client, pieces_of
    from fedloom.experiment.recognition import open_recipe
    from fedloom.monitoring.display import Terminal

    display = Terminal()
    loaded = open_recipe(recipe, overrides or (), display.show_step)
    if client >= loaded.data.clients:
        raise DataError(f"there are {loaded.data.clients} clients", where="--client", mend="their numbers begin at 0")
    material = gather(loaded, display)
    blocks, documents = material.clients[client].train, material.splits.clients[client].train
    colours = display.console.is_terminal and not display.console.no_color
    for row in range(min(rows, len(blocks))):
        shown = Text(f"\nblock {row + 1} of {len(blocks)}\n", style="dim")
        for piece in pieces_of(blocks, row, material.source.tokenizer):
            text = show_controls(piece.text)
            if piece.begins:
                shown.append("\n— another text of the same block —\n", "dim")
            shown.append(f"«{text}»" if piece.counts and not colours else text, "green" if piece.counts else "default")
        display.console.print(shown, soft_wrap=True)
    how = "in green" if colours else "in « »"
    display.console.print(f"\nWhat is {how} is learnt. Client {client}:", markup=False, highlight=False)
    for line in describe_client(loaded.data, blocks, documents, material.found.other_columns):
        display.console.print(show_controls(f"  {line}"), markup=False, highlight=False, soft_wrap=True)


def export(
    run: RunFolder,
    to: Annotated[
        Path | None, typer.Option(parser=path, help="The folder, or FILE.gguf, to write; it must not exist.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write the base model with the adapter merged in.")] = False,
    kind: Annotated[
        str | None, typer.Option("--as", help="Weights of a whole model as GGUF: f32, f16 (if left out) or q8_0.")
    ] = None,
    ollama: Annotated[
        Path | None, typer.Option(parser=path, help="In the place of --to: a folder that Ollama makes a model of.")
    ] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Print what to type to serve the folder with vLLM.")] = False,
    client: Client = None,
) -> None:
    """Copy a run's best adapter, or merge it into its base model, and prove that it is the same.

    A target that ends in .gguf is written for llama.cpp.
    """
    from fedloom.errors import RunError

    target = ollama or to
    if target is None or (ollama and (to or vllm)):
        raise RunError("one target is needed", where="--to or --ollama", mend="name a folder or a file for one of them")
    import shlex

    from fedloom.handover.export import export
    from fedloom.handover.vllm import serve_command
    from fedloom.monitoring.display import Terminal

    # Before anything is written: it may be refused.
    which = "best" if client is None else client
    command = serve_command(run, target, merged=merged, which=which) if vllm else ""
    distance = export(run, target, merged=merged, kind=kind, ollama=ollama is not None, which=which, display=Terminal())
    typer.echo(f"{show_controls(str(target))}: its logits lie {distance:.1e} from the run's, relative to their norm")
    if ollama:
        command = shlex.join(["ollama", "create", target.name, "-f", str(target / "Modelfile")])
    if command:
        typer.echo(show_controls(command))


def push(
    run: RunFolder,
    name: Annotated[str, typer.Argument(help="OWNER/NAME of a model on the hub; it is made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it.")] = False,
    with_report: Annotated[
        bool, typer.Option("--with-report", help="With the run's report, which names clients and files.")
    ] = False,
) -> None:
    """Upload a run's best adapter with its card to the model hub: private, and no records, unless told otherwise.

    Who you are, hf auth login has written down, or HF_TOKEN says.
    """
    from fedloom.handover.push import push
    from fedloom.monitoring.display import Terminal

    address = push(run, name, public=public, with_report=with_report, display=Terminal())
    typer.echo(show_controls(address))


Base = Annotated[bool, typer.Option("--base", help="First without the adapter.")]
Temperature = Annotated[
    float, typer.Option(min=0, max=10, help="How freely words are drawn; 0 takes the likeliest each time.")
]
TopP = Annotated[float, typer.Option(min=0.01, max=1, help="Draw from the likeliest words with so much probability.")]
SampleSeed = Annotated[int, typer.Option(min=0, help="Of what is drawn.")]


def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Argument(help="A question, or what to write on from.")],
    base: Base = False,
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 80,
    plain: Annotated[bool, typer.Option("--plain", help="Go on from the prompt as it stands.")] = False,
    temperature: Temperature = 0,
    top_p: TopP = 1,
    seed: SampleSeed = 0,
    client: Client = None,
) -> None:
    """Let a run's best adapter answer a prompt, written as the run's documents are."""
    from fedloom.evaluation.generation import Sampling
    from fedloom.handover.generate import generate

    how = Sampling(temperature, top_p, seed)
    which = "best" if client is None else client
    generate(run, prompt, base=base, max_new_tokens=tokens, which=which, plain=plain, sampling=how)


def chat(
    run: RunFolder,
    base: Base = False,
    system: Annotated[str | None, typer.Option(help="System message; the run's own if left out.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 400,
    temperature: Temperature = 0,
    top_p: TopP = 1,
    seed: SampleSeed = 0,
    client: Client = None,
) -> None:
    """Talk with a run's best adapter: a line of input is a question, and the input's end ends it."""
    from fedloom.evaluation.generation import Sampling
    from fedloom.handover.generate import chat

    how = Sampling(temperature, top_p, seed)
    which = "best" if client is None else client
    chat(run, read_lines(), base=base, which=which, system=system, max_new_tokens=tokens, sampling=how)


def evaluate(
    run: RunFolder,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A file of tasks, or the name of one that ships; the run's own if left out."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model too.")] = False,
    which: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter: best, last or the number of a round, 0 before any training; or baselines, pooled and local."
        ),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="TASK=SOURCE: where the rows of a task are read from instead.")
    ] = None,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run programs that a model writes, confined: read docs/tasks-code.md.")
    ] = False,
    harness: Annotated[
        list[str] | None, typer.Option(help="A task of lm-evaluation-harness, or a .yaml file of one.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each of the harness's tasks, from its first on.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=0, help="Answered questions before each of the harness's; its own number if left out."),
    ] = None,
) -> None:
    """Ask a run's adapters tasks, and keep what they could do in evaluation.jsonl and in the report.

    Several tasks, of the harness too, adapters and sources can be named, each behind an option of its own.
    """
    from fedloom.handover.evaluate import evaluate
    from fedloom.monitoring.display import Terminal
    from fedloom.report.tasks_section import describe_evaluations

    display = Terminal()
    records = evaluate(
        run,
        tasks or (),
        base=base,
        which=which or ("best",),
        places=source or (),
        run_code=run_code,
        harness=harness or (),
        limit=limit,
        examples=examples,
        say=display.show_step,
    )
    for line in describe_evaluations(records):
        typer.echo(show_controls(line))


def node() -> None:
    """Train for a run of another machine, which speaks through standard input: `fedloom run --node` starts it."""
    from fedloom.experiment.card_process import serve_streams

    serve_streams()


def read_lines() -> Iterator[str]:
    """Yield what is typed, line by line, without empty lines; a terminal is shown where to type."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
