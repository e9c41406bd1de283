"""The report of one run: the sections of the published experiment's document, with numbers from the run's records."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomlkit

from fedloom.errors import RunError
from fedloom.host.files import write_text, writing
from fedloom.recipe.sections import Strategy
from fedloom.records.run import MEND, Record, Run, read_run
from fedloom.report import figures
from fedloom.report.baselines_section import show_baselines
from fedloom.report.communication_section import show_communication
from fedloom.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Figure,
    Section,
    Table,
    Text,
    to_html,
    to_markdown,
)
from fedloom.report.observations import observe
from fedloom.report.plots import Bars, Line, Mark, Plot, draw, drawn_before
from fedloom.report.privacy_section import show_privacy
from fedloom.report.setup_section import STATES, name_versions, show_setup
from fedloom.report.tasks_section import show_tasks
from fedloom.report.worth_section import show_worth
from fedloom.text import format_number, list_some

LOSS_AXIS = "loss (nats per token)"
UNUSUAL = 3
"""Unusually long rounds that are named; more are counted."""
REFERENCES = ("experiment",)
"""Published trajectories that ship with fedloom, each in its own JSON file beside this module."""


def write_report(folder: str | Path, *, reference: str | None = None) -> Path:
    """Write `report.md`, `report.html` and `plots/*.svg` into a run directory; return the page's path.

    `reference` names a published trajectory to add to the plot of the loss, one of REFERENCES.

    Raises:
        RunError: the folder is no run directory, a file in it is damaged, or there is no such reference.
    """
    run = read_run(folder)
    return write_document(build_report(run, reference=reference), run.folder, "report")


def write_document(document: Document, folder: Path, name: str) -> Path:
    """Write a document as NAME.md and NAME.html with its plots, each file whole or not at all; return the page's path.

    Raises:
        RunError: a file can't be written.
    """
    mend = "write the report again: the run itself is not affected"
    with writing(folder / "plots", mend):
        (folder / "plots").mkdir(parents=True, exist_ok=True)
    # To draw takes longer than all else: what was drawn from the same numbers stays.
    drawn = {
        figure.name: drawn_before(figure.plot, folder / "plots" / f"{figure.name}.svg") or draw(figure.plot)
        for figure in document.figures
    }
    # The plots first, so that no page links to one that is not there yet.
    files = {f"plots/{plot}.svg": svg for plot, svg in drawn.items()}
    files |= {f"{name}.md": to_markdown(document), f"{name}.html": to_html(document, drawn)}
    for path, text in files.items():
        write_text(folder / path, text, mend)
    return folder / f"{name}.html"


def build_report(run: Run, *, reference: str | None = None) -> Document:
    """Build the report of a run that is done, still running, interrupted or failed.

    Raises:
        RunError: the run has no plan, or there is no such reference.
    """
    if not run.plan:
        raise RunError("it has no plan.json", where=str(run.folder), mend=MEND)
    state = STATES.get(run.status.get("state", ""), "unknown")
    done, scheduled = figures.completed(run), run.recipe["federation"]["rounds"]
    return Document(
        title=run.recipe["name"],
        subtitle=run.recipe.get("description") or f"{run.plan.get('model', '')} on {run.plan.get('data', '')}",
        state=f"{state}, {done} of {scheduled} rounds",
        sections=[
            Section("Setup", show_setup(run, state)),
            Section("Loss trajectories", _losses(run, reference)),
            *([Section("Was it worth it?", blocks)] if (blocks := show_worth(run)) else []),
            *([Section("Did federation help?", blocks)] if (blocks := show_baselines(run, LOSS_AXIS)) else []),
            *([Section("Tasks", blocks)] if (blocks := show_tasks(run)) else []),
            *([Section("Answers", blocks)] if (blocks := _samples(run)) else []),
            Section("Runtime and throughput", _runtime(run)),
            Section("Federation", _federation(run)),
            Section("Communication", show_communication(run)),
            Section("Privacy", show_privacy(run)),
            Section("Observations", _observations(run)),
            Section("How to repeat it", _repeat(run)),
        ],
    )


def load_reference(name: str) -> dict[str, Any]:
    """Return a published trajectory that ships with fedloom, with its source and its known faults.

    Raises:
        RunError: there is no reference of that name.
    """
    if name not in REFERENCES:
        raise RunError(f'no reference "{name}"', where="--reference", mend=f"choose one of: {', '.join(REFERENCES)}")
    text = (resources.files("fedloom.report") / f"{name}.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _losses(run: Run, reference: str | None) -> list[Block]:
    if not run.rounds:
        return [Text("No round is complete yet.")]
    name, _, losses = figures.judged_series(run)
    rise = figures.find_rise(run)
    rows = [
        [
            str(record["round"]),
            *(format_number(record.get(key), form) for key, form in _LOSS_COLUMNS.values()),
        ]
        for record in run.rounds
    ]
    marks = [Mark(run.best_round, "best")] if run.best_round is not None else []
    marks += [Mark(rise.round, rise.kind)] if rise else []
    lines = [
        Line(label, *found)
        for label, key in (
            ("central", "central_loss"),
            ("clients' hold-out", "client_loss"),
            ("training", "train_loss"),
        )
        if (found := figures.series(run, key))[0]
    ]
    notes: list[Block] = []
    if reference:
        published = load_reference(reference)
        lines += [
            Line(
                trajectory["name"], list(range(len(trajectory["central_loss"]))), trajectory["central_loss"], faint=True
            )
            for trajectory in published["trajectories"]
        ]
        notes = [
            Text(f"Also in the plot: {published['source']}."),
            Text("Known faults of those numbers:"),
            Bullets(published["caveats"]),
        ]
    best = f"The best adapter is round {run.best_round}'s, by {name} loss." if losses else ""
    blocks: list[Block] = [
        Text(
            "Mean negative log-likelihood of a token: in training (over the steps of the round, without the proximal"
            f" term), and of the round's new global adapter on the clients' own hold-outs{_beside_own(run)} and on the"
            f" central hold-out. {best}"
        ),
        Table(["Round", *_LOSS_COLUMNS], rows),
        Figure(
            "loss",
            "Loss by round; round 0 is the adapter before any training.",
            Plot(lines, x_label="round", y_label=LOSS_AXIS, marks=marks),
        ),
        *notes,
    ]
    clients = range(len(run.plan.get("clients", ())))
    each = [Line(f"client {client}", *found) for client in clients if (found := figures.client_series(run, client))[0]]
    if each:
        plot = Plot(each[:12], x_label="round", y_label=LOSS_AXIS)
        shown = "" if len(each) <= 12 else f" (the first 12 of {len(each)})"
        blocks.append(
            Figure("clients", f"Each client's hold-out loss under the global adapter{_beside_own(run)}{shown}.", plot)
        )
    return blocks


def _beside_own(run: Run) -> str:
    """Say of clients that have a part of the adapter of their own that it stands beside the global one's."""
    return " (each with its own part)" if run.recipe["federation"].get("lora_rule") == "fedsa" else ""


_LOSS_COLUMNS = {
    "Training loss": ("train_loss", ".4f"),
    "Clients' hold-out loss": ("client_loss", ".4f"),
    "Central loss": ("central_loss", ".4f"),
    "Central perplexity": ("central_perplexity", ".3f"),
    "Central accuracy": ("central_accuracy", ".2%"),
}


def _runtime(run: Run) -> list[Block]:
    if not run.rounds:
        return [Text("No round is complete yet.")]
    shares, rows = figures.phase_shares(run), []
    for phase in figures.PHASES:
        records = figures.trained_rounds(run) if phase != "evaluation" else run.rounds
        seconds = [figures.phase_seconds(record, phase) for record in records]
        if not seconds:
            continue
        rates = figures.throughput(run, phase) if phase != "aggregation" else {}
        rows.append(
            [
                phase.capitalize(),
                _spread(figures.spread(seconds), ".2f"),
                *(
                    _spread(rates[name], ",.2f") if name in rates else ""
                    for name in ("samples/s", "steps/s", "tokens/s")
                ),
                f"{100 * shares[phase]:.1f} %",
            ]
        )
    rounds = [record["round"] for record in run.rounds]
    bars = Bars(rounds, {phase: [figures.phase_seconds(r, phase) for r in run.rounds] for phase in figures.PHASES})
    elapsed, total = figures.elapsed_seconds(run), figures.total_seconds(run)
    rest = f", {elapsed:,.0f} s from start to end{figures.shared_with(run)}" if elapsed is not None else ""
    rest += ", pauses left out" if run.status.get("paused") else ""
    blocks: list[Block] = [
        Text(f"Average and standard deviation over rounds. {total:,.1f} s in rounds{rest}."),
        *([Text(figures.SHARED_PASS)] if figures.shares_a_pass(run) else []),
        Table(["Phase", "Seconds a round", "Samples/s", "Steps/s", "Tokens/s", "Share of rounds"], rows),
        *_parts(run),
        Figure("time", "Seconds of each round, by phase.", Plot(bars=bars, x_label="round", y_label="time (s)")),
    ]
    if unusual := figures.outliers(run):
        text = "; ".join(
            f"round {r}, {phase}: {took:.1f} s against a median of {m:.1f} s" for r, phase, took, m in unusual[:UNUSUAL]
        )
        more = f"; and {len(unusual) - UNUSUAL} more" if len(unusual) > UNUSUAL else ""
        blocks.insert(2, Text(f"Unusually long: {text}{more}."))
    return blocks


def _parts(run: Run) -> list[Block]:
    """Show what part of the whole run its rounds were; nothing where that is not on record."""
    parts = figures.run_parts(run)
    whole = sum(parts.values()) or 1.0  # of no time at all, nothing is a part
    rows = [[part.capitalize(), f"{took:,.1f}", f"{100 * took / whole:.0f} %"] for part, took in parts.items()]
    text = (
        "The run starts when the model is loaded. Baselines, `personalise`, contributions, tasks and answers come after"
        " the rounds. Times on record are whole seconds."
    )
    return [Text(text), Table(["Part of the run", "Seconds", "Share of the run"], rows)] if rows else []


def _federation(run: Run) -> list[Block]:
    rounds = figures.trained_rounds(run)
    if not rounds:
        return [Text("No client has trained yet.")]
    everyone = len(run.plan.get("clients", ()))
    columns = {
        "Proximal loss": ("proximal_loss", ".3e"),
        "Proximal / loss gradient": ("proximal_ratio", ".2%"),
        "Drift": ("drift", ".4f"),
        "LoRA averaging error" if _averages_factors(run) else "Error, had factors been averaged": ("lora_error", ".2%"),
    }
    known = {name: value for name, value in columns.items() if any(value[0] in record for record in rounds)}
    weighed = any(record.get("shares") for record in rounds)
    rows = [
        [
            str(record["round"]),
            *(format_number(record.get(key), form) for key, form in known.values()),
            _who(record["clients"], everyone),
            _who(record["lost"], None) if record.get("lost") else "none",
            *([_largest(record)] if weighed else []),
        ]
        for record in rounds
    ]
    drift = Line("drift", *figures.series(run, "drift"))
    return [
        Text(
            "The proximal term μ/2 ‖w − w_global‖² in the objective, mean over steps; the norm of its gradient divided"
            " by that of the loss; and the drift, the distance of a client's adapter from the global one at the end of"
            f" the round{_beside_own(run)}, mean over clients."
        ),
        Table(["Round", *known, "Took part", "Lost", *(["Largest share"] if weighed else [])], rows),
        Figure(
            "drift",
            "Mean drift of the clients' adapters.",
            Plot([drift], x_label="round", y_label="‖w − w_global‖"),
        ),
    ]


def _averages_factors(run: Run) -> bool:
    """Return whether LoRA's factors are averaged, each apart; the error of that is on record in any case."""
    section = run.recipe["federation"]
    weighs = Strategy.model_construct(kind=section["strategy"]["kind"]).weighs and not run.plan.get("strategy")
    return weighs and section.get("lora_rule", "factors") not in ("svd", "fedex")


_ANSWERS = (("answer", "right answer, as held out"), ("base", "base model"), ("tuned", "with the adapter"))
"""Answers to a question by their key in `samples.json`, with their headings."""


def _samples(run: Run) -> list[Block]:
    """Return questions with their answers; nothing where the run has none, or where the file is not as it was."""
    try:
        samples = json.loads((run.folder / "samples.json").read_text(encoding="utf-8"))["samples"]
        rows = [
            # Runs of earlier versions have no right answer on record.
            Code("\n\n".join([one["prompt"], *(f"--- {name} ---\n{one[key]}" for key, name in _ANSWERS if key in one)]))
            for one in samples
        ]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [Text("Questions of the central hold-out, answered with the likeliest words."), *rows] if rows else []


def _observations(run: Run) -> list[Block]:
    sentences = observe(run)
    return [Bullets(sentences)] if sentences else [Text("There is not enough on record yet for observations.")]


def _repeat(run: Run) -> list[Block]:
    asked = run.folder / "recipe.toml"
    try:
        text = asked.read_text(encoding="utf-8") if asked.is_file() else ""
    except UnicodeDecodeError as error:
        raise RunError("not UTF-8: it is damaged", where=str(asked), mend="restore it, or move it away") from error
    return [
        Text(f"Seed {run.recipe['seed']}; {name_versions(run.environment)}. The recipe is in this run's folder:"),
        # Without its clients, `run` would train on whatever the central hold-out is taken from.
        Code(f"fedloom {'serve' if run.plan.get('elsewhere') else 'run'} {shlex.quote(str(asked))} --out runs/again"),
        Text(f"The recipe as it was given{_FILLED_IN * bool(run.plan.get('elsewhere'))}:"),
        Code(text),
        Text("The recipe with every default:"),
        Code(tomlkit.dumps(_without_none(run.recipe))),
    ]


_FILLED_IN = ", and the limits to what a client counts that a served run fills in where they are left out"


def _who(clients: Sequence[int], everyone: int | None) -> str:
    if len(clients) == everyone:
        return f"all {everyone}"
    if not clients:
        return ""
    return f"client{'s' * (len(clients) > 1)} {list_some([*map(str, clients)], 8)}"


def _largest(record: Record) -> str:
    """Name the client with the largest share of a round's weight; the first of equal ones."""
    shares: dict[str, float] = record.get("shares", {})
    if not shares:
        return ""
    client = max(shares, key=shares.__getitem__)
    capped = ", capped" if int(client) in record.get("capped", ()) else ""
    return f"{100 * shares[client]:.1f} % (client {client}{capped})"


def _spread(found: figures.Spread, form: str) -> str:
    return f"{found.mean:{form}} ± {found.deviation:{form}}"


def _without_none(value: Any) -> Any:
    # TOML has no null; a key that is left out means the same.
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value if inner is not None] if isinstance(value, list) else value
