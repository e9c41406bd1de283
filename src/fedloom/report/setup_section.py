"""The report's first section: the recipe, the documents, the machine and the times of a run."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.recipe.sections import UNWEIGHTED
from fedloom.records.plan import explain_cut, explain_data, explain_rows, explain_weights
from fedloom.records.run import Record, Run
from fedloom.report import figures
from fedloom.report.document import Block, Table, Text, without_columns
from fedloom.text import count, format_bytes, format_seconds, format_trainable, list_reasons

STATES = {"running": "still running", "done": "done", "failed": "failed", "interrupted": "interrupted"}
"""States in status.json, and how pages word them."""
LORA_RULES = {
    "factors": "LoRA's A and B each averaged by itself",
    "ffa": "LoRA's A stays as it began, B alone is trained and averaged",
    "rolora": "LoRA's B is trained and averaged in odd rounds, A in even ones",
    "fedsa": "LoRA's A averaged, each client keeps a B of its own",
    "svd": "LoRA's A and B made anew of the mean of clients' products, the best that their rank can hold",
    "fedex": "LoRA's A and B each averaged by itself, and what that leaves out of the products added to the model",
}
"""Words of what becomes of LoRA's two factors, by `federation.lora_rule`."""
NAMED = 30
"""Clients elsewhere whose names are shown."""


def show_setup(run: Run, state: str) -> list[Block]:
    """Show the setup as a table, with the audit of the split and the peaks of memory; a note if the run is not done."""
    recipe, plan, status = run.recipe, run.plan, run.status
    adapter, data, training = recipe["adapter"], recipe["data"], recipe["training"]
    elapsed = figures.elapsed_seconds(run)
    targets = adapter["targets"] or "PEFT's choice of layers"
    rows = {
        "Model": f"{plan['model']} ({plan['model_revision']}), {plan['dtype']}",
        **({"Weights": explain_weights(plan["model_weights"])} if plan.get("model_weights") else {}),
        "Adapter": f"{adapter['method']}, r = {adapter['rank']}, α = {adapter['alpha']:g},"
        f" dropout = {adapter['dropout']:g}, on {targets if isinstance(targets, str) else ', '.join(targets)}",
        "Trainable parameters": format_trainable(plan["trainable_parameters"], plan["parameters"]),
        "Data": explain_data(plan["data"], plan["data_revision"]),
        "Clients": f"{len(plan['clients'])}, {plan['clients_per_round']} in a round; {_division(run)}{_left_out(plan)}",
        **({"Names": _names(plan["elsewhere"])} if plan.get("elsewhere") else {}),
        "Documents": _documents(plan),
        **({"Learnt": plan["learns"]} if plan.get("learns") else {}),
        "Block": f"{data['max_length']} tokens, {data['window']};"
        f" padding {'counted' if data['pad_in_loss'] else 'not counted'}",
        "Objective": _objective(training),
        "Strategy": _strategy(run) + _factors(recipe),
        "Epochs per client": _epochs(training),
        "Learning rate": f"{_rate(training)}; {_optimizer(training)}",
        "Batch size": f"{_batch(training)} (train), {recipe['evaluation']['batch_size']} (evaluation)",
        "Engine": _engine(plan),
        "Rounds": f"{figures.completed(run)} completed of {recipe['federation']['rounds']} scheduled",
        "Start": _time(status.get("started")),
        "Finish" if state != STATES["running"] else "Last update": _time(status.get("updated")),
        "Runtime": "unknown"
        if elapsed is None
        else f"{elapsed:,.0f} s ({format_seconds(elapsed)}){figures.shared_with(run)}",
        **({"Stopped": _stopped(status)} if status.get("resumed") else {}),
        "Machine": _machine(run.environment),
        "Versions": name_versions(run.environment),
    }
    blocks: list[Block] = [Table(["", ""], list(rows.items()), text_columns=2)]
    if run.status.get("stopped_early"):
        blocks.insert(0, Text(f"Stopped early: {run.status['stopped_early']}."))
    if state != STATES["done"]:
        why = f": {status['error']}" if status.get("error") else ""
        blocks.insert(0, Text(f"This run is {state}{why}. This report shows what is on record.", note=True))
    blocks += [Text(f"{line}.", note=True) for line in run.plan.get("unused", ())]
    if plan["audit"]["overlaps"]:
        blocks += [Text("The audit of the split, before copies were taken out of training:"), _audit(plan)]
    else:
        blocks += [Text("Each client looked for copies within its own documents; between clients nobody can look.")]
    memory = _memory(run)
    return [*blocks, Text("Peak memory, by phase:"), memory] if memory else blocks


def _names(clients: Sequence[str]) -> str:
    """Say which of the clients elsewhere has which number, of the first ones."""
    more = f", and {len(clients) - NAMED:,} more" if len(clients) > NAMED else ""
    return ", ".join(f"{number} is {name}" for number, name in enumerate(clients[:NAMED])) + more


def _stopped(status: Record) -> str:
    """Say how often a run was stopped and went on, for how long nobody was at work, and what is other since."""
    moved = "".join(f"; {one}" for one in status.get("moved", ()))
    between = f"; {format_seconds(status['paused'])} between are not in the runtime" if status.get("paused") else ""
    return f"went on {count(status['resumed'], 'time')}{between}{moved}"


def _strategy(run: Run) -> str:
    if own := run.plan.get("strategy"):
        return f"{own}, the caller's own"
    strategy = run.recipe["federation"]["strategy"]
    if strategy["kind"] in UNWEIGHTED:
        return f"{strategy['kind']}, every client with the same weight"
    return f"{strategy['kind']}, weighted by {strategy['weight_by']}"


def _factors(recipe: Record) -> str:
    """Say what becomes of LoRA's two factors; nothing of an adapter that has none."""
    rule = recipe["federation"].get("lora_rule", "factors")
    return f"; {LORA_RULES[rule]} ({rule})" if recipe["adapter"]["method"] == "lora" else ""


def _epochs(training: Record) -> str:
    steps = training.get("max_steps")
    return f"{training['epochs']}" + (f", {count(steps, 'step')} at most in a round" if steps else "")


def _batch(training: Record) -> str:
    parts = training.get("gradient_accumulation", 1)
    return f"{training['batch_size']}" + (f" x {parts} accumulated" if parts > 1 else "")


def _engine(plan: Record) -> str:
    # How many of its clients train at once, each node elsewhere decides.
    at_once = () if plan.get("elsewhere") else (f"{count(plan.get('clients_at_once', 1), 'client')} at once",)
    return ", ".join([plan["engine"], *at_once, *plan.get("ways", ())])


def _rate(training: Record) -> str:
    rate, schedule, warmup = f"{training['learning_rate']:g}", training["schedule"], training.get("warmup")
    spans = {"round": "over the round", "run": "over the run", "rounds": "over the run, the same within a round"}
    span = spans.get(training["schedule_scope"], "")
    if schedule == "constant":
        told = f"{rate}, constant"
    else:
        end = f" to {training['learning_rate_end']:g}" if training.get("learning_rate_end") else ""
        told = f"{rate}, {schedule}{end} {span}"
    if not warmup:
        return told
    return told + (f", after a warm-up of {100 * warmup:g} %" if warmup < 1 else f", after {warmup:g} steps of warm-up")


def _optimizer(training: Record) -> str:
    given = training["optimizer"]
    table = {"kind": given} if isinstance(given, str) else given
    own = "".join(f", {key} = {value}" for key, value in table.items() if key != "kind" and value is not None)
    return f"{table['kind']}{own}, its state: {training['optimizer_state']} between rounds"


def _objective(training: Record) -> str:
    schedule = training.get("proximal_schedule", "constant")
    if not training["proximal_mu"] and schedule != "adaptive":
        return "FedAvg"
    return f"FedProx, μ = {training['proximal_mu']:g}" + (f", {schedule}" if schedule != "constant" else "")


def _documents(plan: Record) -> str:
    clients = plan["clients"]
    train, holdout = (sum(client[key] for client in clients) for key in ("train_documents", "holdout_documents"))
    dropped = sum(plan["audit"]["dropped"])
    text = f"{train:,} to train on, {holdout:,} held out by clients, {plan['central_documents']:,} held out centrally"
    text += f"; {dropped:,} taken out of training as copies" if dropped else ""
    if "rows" in plan:
        text += f"; {explain_rows(plan['rows'], plan['documents'], plan['skipped'])}"
    for key, what in (("skipped", "skipped"), ("files_left_out", "files left out")):
        text += f"; {what}: {list_reasons(plan[key])}" if plan.get(key) else ""
    return text + (f"; cut: {explain_cut(plan)}" if plan.get("cut") else "")


def _division(run: Run) -> str:
    """Say how documents came to clients: those elsewhere have their own, whatever the recipe's partition is."""
    if run.plan.get("elsewhere"):
        return "each with its owner's own documents"
    partition = run.recipe["data"]["partition"]
    return "split " + ", ".join(
        value if key == "kind" else f"{key} {value}" for key, value in partition.items() if value is not None
    )


def _left_out(plan: Record) -> str:
    idle = plan.get("left_out", ())
    return f"; {len(idle)} of them left out with nothing to train on" if idle else ""


def _machine(environment: Record) -> str:
    if not environment:
        return "not on record"
    gpus = ", ".join(environment.get("gpus", ())) or "no GPU"
    memory = environment.get("memory_bytes")
    return f"{environment.get('processor')}, {environment.get('cores')} cores, {_size(memory)}, {gpus}"


def _time(moment: str | None) -> str:
    return moment.replace("T", " ").replace("+00:00", " UTC") if moment else "unknown"


def name_versions(environment: Record) -> str:
    """Name the versions of Python and of the libraries that a run used."""
    versions = environment.get("versions", {})
    return ", ".join([f"Python {environment.get('python')}", *(f"{name} {found}" for name, found in versions.items())])


def _audit(plan: Record) -> Table:
    overlaps = plan["audit"]["overlaps"]
    rows = [
        [f"{o['side']} / {o['other']}", *(f"{o.get(key, 0):,}" for key in ("exact", "near", "prompt"))]
        for o in overlaps
    ]
    drop = set() if any(o.get("prompt") for o in overlaps) else {3}
    header = ["Between", "Exact copies", "Near copies", "Same prompt"]
    return Table(without_columns(header, drop), [without_columns(row, drop) for row in rows])


def _memory(run: Run) -> Table | None:
    ram, gpu = figures.peak_memory(run, "ram"), figures.peak_memory(run, "gpu")
    phases = [phase for phase in ("loading", *figures.PHASES) if phase in ram or phase in gpu]
    rows = [[phase.capitalize(), *(_size(kind.get(phase)) for kind in (ram, gpu))] for phase in phases]
    drop = set() if gpu else {2}
    return (
        Table(without_columns(["Phase", "RAM", "GPU"], drop), [without_columns(row, drop) for row in rows])
        if rows
        else None
    )


def _size(size: int | None) -> str:
    return "" if size is None else format_bytes(size)
