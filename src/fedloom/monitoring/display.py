"""Shows a run to a person: the plan, a progress bar, one table row a round. Without a terminal, plain lines."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from fedloom.monitoring.observer import Observer
from fedloom.progress import Clock, Phase, Progress, Stage, StageName
from fedloom.records.plan import (
    Plan,
    explain_audit,
    explain_cut,
    explain_data,
    explain_rows,
    explain_shares,
    explain_weights,
)
from fedloom.records.privacy import explain_noise, explain_privacy
from fedloom.records.run import judged_loss
from fedloom.text import count, format_bytes, format_number, format_seconds, list_reasons, show_controls

if TYPE_CHECKING:
    from fedloom.records.run import RoundRecord, Run

COLUMNS = (
    ("round", 5),
    ("train", 8),
    ("clients", 8),
    ("central", 8),
    ("proximal", 9),
    ("drift", 8),
    ("seconds", 8),
    ("bytes", 9),
)
PRIVATE_COLUMNS = tuple(("ε", width) if name == "train" else (name, width) for name, width in COLUMNS)
"""Columns of a private run: its clients' losses are nobody's business, and what was spent is everybody's."""
CLIENTS_NAMED = 6
"""Clients on the screen at once; where there are more, they are counted."""
STAGES: dict[StageName, str] = {
    "baselines": "baselines",
    "personalise": "by itself",
    "contributions": "contributions",
    "tasks": "tasks",
    "answers": "answers",
}
"""Names of what follows the rounds."""
DOING: dict[Phase, str] = {"train": "training", "evaluate": "evaluating", "ask": "asking tasks"}
PLAIN_SECONDS = 20.0
"""Seconds between two lines of progress where there is no terminal."""


class Terminal(Observer):
    """Shows a run on a terminal or in a notebook, or as plain lines where the output is a file or a pipe."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bar = _BarAndClients(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[pace]}"),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=None, pace="", visible=False)
        self._clock = Clock()
        self._stage: StageName = "rounds"
        self._round = 0
        self._rounds = 0
        self._clients: Mapping[str, str] = {}
        self._asks = False
        self._private = False
        self._header = ""
        self._said = time.perf_counter()

    def show_step(self, what: str, detail: str) -> None:
        self._print(f"{what:<10}{detail}", style="dim")

    def show_plan(self, plan: Plan) -> None:
        if self.console.is_terminal or self.console.is_jupyter:
            self.console.print(render_plan(plan))
        else:  # no word is cut to a width that nobody has
            for name, value in describe_plan(plan).items():
                self._print(f"{name:<9} " + value.replace("\n", f"\n{'':<10}"))
        for warning in plan.warnings:
            self._print(f"note      {warning}")
        self._clock, self._rounds = Clock(plan.stages), plan.rounds
        self._asks, self._private = bool(plan.tasks), bool(plan.privacy)

    def show_folder(self, folder: Path) -> None:
        self._print(f"{'run':<10}{folder}\n", style="dim")
        self._print(round_header(private=self._private), style="bold")
        self._start_bar()

    def show_stage(self, name: StageName, share: float = 1.0) -> None:
        self._clock.begin(name, share)
        self._stage, self._round = name, 0
        # Until the first piece of its work is done, it would be shown as the stage before.
        doing, total = self._describe_work(), self._clock.total_steps
        self._bar.update(self._task, total=total, description=doing, pace=self._pace("train"))

    def show_past(self, plan: Plan, records: Sequence[RoundRecord]) -> None:
        self._clock.skip(plan.done_of(records))

    def show_sweep(self, stages: Sequence[Stage]) -> None:
        self._clock = Clock(stages)

    def show_left(self, stages: Sequence[Stage]) -> None:
        self._clock.expect(*stages)

    def show_pass(self, names: Sequence[str], plans: Sequence[Plan]) -> None:
        self._asks, self._rounds = any(plan.tasks for plan in plans), max(plan.rounds for plan in plans)
        self._print(f"{'pass':<10}{count(len(names), 'run')} together", style="dim")
        for warning, number in Counter(warning for plan in plans for warning in plan.warnings).items():
            whose = "" if number == len(plans) else f"{number} of {len(plans)} runs: "
            self._print(f"note      {whose}{warning}")
        losses = {"central" if plan.central_documents else "clients" for plan in plans}
        self._header = f"{'round':>5}{losses.pop() if len(losses) == 1 else 'loss':>10}  run"
        self._start_bar()

    def show_trial(self, name: str, record: RoundRecord) -> None:
        if self._header:  # not before: what is said of runs that go on stands above it
            self._print(self._header, style="bold")
            self._header = ""
        loss = format_number(record.get("central_loss", record.get("client_loss")), ".4f")
        self._print(f"{record['round']:>5}{loss:>10}  {name}")

    def show_sweep_end(self, ranked: Sequence[tuple[str, float, float, int]], folder: Path) -> None:
        self._print(f"\n{'best':>8}{'round':>7}{'last':>9}  run", style="bold")
        for name, best, last, round in ranked:
            self._print(f"{best:>8.4f}{round:>7}{last:>9.4f}  {name}")
        if len(ranked) > 1:
            self._print(f"comparison    {folder / 'comparison.html'!s}")

    def _start_bar(self) -> None:
        self._clock.start()
        if self.console.is_terminal:
            self._bar.update(self._task, visible=True)
            self._bar.start()

    def watch(self, progress: Progress) -> None:
        self._clock.tick(progress)
        self._round = progress.round or self._round
        doing, pace = self._describe_work(progress), self._pace(progress.phase)
        total = self._clock.total_steps
        self._bar.update(self._task, completed=self._clock.steps, total=total, description=doing, pace=pace)
        self._print_at_times(f"{doing}: {pace}")

    def _describe_work(self, progress: Progress | None = None) -> str:
        """Say what is done: the stage, with its round, and who is at work."""
        doing = f"round {self._round}" if self._stage == "rounds" else STAGES[self._stage]
        if self._stage in ("baselines", "contributions") and self._round:
            doing += f", round {self._round}"
        # The clients of a deployment have a line of their own.
        if is_working(self._clients.values()) or progress is None:
            return doing
        if progress.phase == "train":
            return doing if self._stage in ("baselines", "contributions") else f"{doing}, client {progress.client}"
        return f"{doing}, {DOING[progress.phase]}"

    def _pace(self, phase: Phase) -> str:
        """Say how many steps are done, how fast it goes, and the time left as far as it is known."""
        total, speed = self._clock.total_steps, self._clock.tokens_per_second(phase)
        said = f"{self._clock.steps:,}{'' if total is None else f'/{total:,}'} steps"
        said += f"  {speed:,.0f} tokens/s" if speed else ""
        # What questions take, nobody knows before they are asked.
        left = None if phase == "ask" else self._clock.seconds_left()
        return said if left is None else f"{said}  {format_seconds(left)} left{' before tasks' if self._asks else ''}"

    def _print_at_times(self, line: str) -> None:
        """Print a line where there is no terminal, and none was printed for a while."""
        if not self.console.is_terminal and time.perf_counter() - self._said > PLAIN_SECONDS:
            self._said = time.perf_counter()
            self._print(f"      {line}")

    def show_round(self, record: RoundRecord) -> None:
        self._round = min(record["round"] + 1, self._rounds)
        self._print(format_round(record))
        for what, why in explain_losses(record):
            self._print(f"{what:<10}{why}")

    def show_clients(self, phases: Mapping[str, str]) -> None:
        self._clients, self._bar.clients = phases, describe_clients(phases)
        self._bar.update(self._task, description=self._describe_work())
        self._print_at_times(self._bar.clients)

    def show_wait(self) -> None:
        self._clock.start()

    def show_end(self, run: Run, report: Path) -> None:
        self._print("")
        if run.status.get("stopped_early"):
            self._print(f"stopped early: {run.status['stopped_early']}")
        losses = [loss for record in run.rounds if math.isfinite(loss := judged_loss(record))]
        if losses:
            best = f"best in round {run.best_round}: {min(losses):.4f}"
            self._print(f"{_name_judge(run)} loss {losses[0]:.4f} → {losses[-1]:.4f} nats a token, {best}")
        self._print(f"best adapter  {run.folder / 'adapters' / 'best'}")
        self._print(f"report        {report}")

    def close(self) -> None:
        """Take the progress bar off the screen."""
        if self._bar.live.is_started:
            self._bar.stop()

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(show_controls(text), style=style, soft_wrap=True, markup=False)


class _BarAndClients(Bar):
    """A progress bar, and beneath it what the clients of a deployment are doing."""

    clients = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.clients:
            yield Text(show_controls(self.clients), style="dim")


def round_header(*, private: bool) -> str:
    """Return the header of a table of rounds."""
    return "".join(f"{name:>{width}}" for name, width in (PRIVATE_COLUMNS if private else COLUMNS))


def format_round(record: Mapping[str, Any]) -> str:
    """Return a round's row, to stand beneath `round_header`."""
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(round_cells(record), COLUMNS, strict=True))


def round_cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what stands in a round's row, by `COLUMNS`."""
    spent = record.get("epsilon")
    seconds = record["train_seconds"] + record["aggregate_seconds"] + record["evaluate_seconds"]
    return (
        str(record["round"]),
        format_number(record.get("train_loss"), ".4f") if spent is None else f"{spent:.3g}",
        format_number(record.get("client_loss"), ".4f"),
        format_number(record.get("central_loss"), ".4f"),
        format_number(record.get("proximal_loss"), ".2e"),
        format_number(record.get("drift"), ".4f"),
        f"{seconds:.1f}",
        format_bytes(record["bytes_up"] + record["bytes_down"]),
    )


def explain_losses(record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield what did not count in a round, or not in full, as a word and why."""
    for why in (*record.get("lost_because", {}).values(), *record.get("refused", ())):
        yield "lost", why
    for client, times in record.get("scaled", {}).items():
        yield "scaled", f"client {client}: its change was {times:,.0f} times the middle one"


def _name_judge(run: Run) -> str:
    """Name the hold-out whose loss chose the best adapter."""
    if any("central_loss" in record for record in run.rounds):
        return "central"
    return f"clients' {'middle ' * any('judged_loss' in record for record in run.rounds)}hold-out"


def is_working(phases: Iterable[str]) -> bool:
    """Return whether a client of a deployment is at work: what it does comes with its answer, when it is done."""
    return not {"training", "scoring"}.isdisjoint(phases)


def describe_clients(phases: Mapping[str, str]) -> str:
    """Say what each client is doing; of many clients, how many are doing what."""
    if len(phases) <= CLIENTS_NAMED:
        return ", ".join(f"{name} {phase}" for name, phase in sorted(phases.items()))
    return ", ".join(f"{number} {phase}" for phase, number in Counter(phases.values()).most_common())


def render_plan(plan: Plan) -> Table:
    """Return the plan as a table of two columns."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in describe_plan(plan).items():
        table.add_row(name, Text(show_controls(value)))
    return table


def describe_plan(plan: Plan) -> dict[str, str]:
    """Return what there is to say of a plan, by a word for each."""
    clients = plan.clients
    documents = _range([client.train_documents for client in clients])
    holdouts = _range([client.holdout_documents for client in clients])
    blocks = _range([client.blocks for client in clients])
    kept = plan.kept_adapters * plan.payload_bytes
    each_round = f"{plan.bytes_are} {format_bytes(plan.bytes_per_round)} a round".lstrip()
    payload = "a model" if plan.trainable_parameters == plan.parameters else "an adapter"
    rows = {
        "model": f"{plan.model} ({plan.model_revision})",
        **({"weights": explain_weights(plan.model_weights)} if plan.model_weights else {}),
        "trainable": plan.trainable_share,
        "data": explain_data(plan.data, plan.data_revision),
        **({"learnt": plan.learns} if plan.learns else {}),
        "clients": f"{len(clients)}, each {documents} documents to train on and {holdouts} held out; {blocks} blocks",
        **({"shares": explain_shares(plan.shares, plan.capped)} if plan.shares else {}),
        "central": f"{count(plan.central_documents, 'document')} held out",
        "audit": explain_audit(plan),
        "work": f"{count(plan.rounds, 'round')} of {count(plan.steps_per_round, 'step')}"
        # Clients of a private run tell no tokens.
        + (f" and {count(plan.train_tokens_per_round, 'token')}" if plan.train_tokens_per_round else "")
        + (f", evaluated after {count(plan.evaluated_rounds, 'round')}" if plan.evaluated_rounds else "")
        + "".join(f"; then {stage.name}, {count(stage.steps, 'step')}" for stage in plan.later),
        **({"tasks": "\n".join(plan.tasks)} if plan.tasks else {}),
        **({"kept": f"{count(plan.kept_adapters, 'adapter')} of rounds, {format_bytes(kept)}"} if kept else {}),
        **({"privacy": explain_privacy(plan.privacy), "noise": explain_noise(plan.privacy)} if plan.privacy else {}),
        "bytes": f"{format_bytes(plan.payload_bytes)} {payload}, {each_round}",
        **({"without": _explain_arms(plan)} if plan.arms else {}),
        "device": ", ".join([plan.device, plan.dtype, f"engine {plan.engine}", *plan.ways]),
    }
    each = " in each process" if plan.processes else ""
    if plan.peak_bytes:
        together = plan.clients_that_fit is not None
        how = f"{count(plan.clients_at_once, 'client')} at once" if together else "one client after another"
        fit = f"; {count(plan.clients_that_fit, 'client')} would fit" if plan.clients_that_fit else ""
        lacking = "; more than is free: it is likely to fail here"
        rows["memory"] = f"{format_bytes(plan.peak_bytes)} predicted for model and training{each}, {how}" + (
            lacking if plan.lacks_memory else fit
        )
    elif plan.ample_memory:
        rows["memory"] = f"more than enough is free for {count(plan.clients_at_once, 'client')} at once{each}"
    elif plan.engine == "batched":
        # How many of its clients train at once, each node elsewhere decides.
        how = "" if plan.elsewhere else f"; {count(plan.clients_at_once, 'client')} at once{each}"
        rows["memory"] = f"not predicted{how}"
    if plan.rows is not None:
        rows["rows"] = explain_rows(plan.rows, plan.documents, plan.skipped)
    if plan.skipped:
        rows["skipped"] = list_reasons(plan.skipped)
    if plan.cut:
        rows["cut"] = explain_cut(plan.to_json())
    if plan.files_left_out:
        rows["files left out"] = list_reasons(plan.files_left_out)
    return rows


def _explain_arms(plan: Plan) -> str:
    """Say what it takes to find what each client brings."""
    times = plan.arm_tokens / max(1, plan.rounds * plan.train_tokens_per_round)
    return (
        f"{count(plan.arms, 'federation')} of some of the clients at the end, for their contributions:"
        f" {count(plan.arm_tokens, 'token')} to train on, {times:.1f} times those of the run;"
        f" {count(plan.arms_at_once, 'client')} at once"
    )


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
