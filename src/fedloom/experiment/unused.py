"""Settings that a recipe has and that change nothing in this run, each said in one line.

A recipe refuses a key that its section's kind never uses. What makes a key idle here is the value of another one,
which a sweep may well go through, or what the documents are: so a run is not refused for it, and its plan says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedloom.adapters.lora import lora_pairs
from fedloom.adapters.peft_config import unmatched_options
from fedloom.federation.aggregation import count_trimmed
from fedloom.federation.schedule import cohort_size
from fedloom.federation.shares import cap_weights
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import UNWEIGHTED
from fedloom.records.plan import Plan
from fedloom.text import count

if TYPE_CHECKING:
    from fedloom.adapters.adapted_model import AdaptedModel
    from fedloom.data.documents import Documents
    from fedloom.data.tokens import TokenBlocks
    from fedloom.recipe.section import Section
    from fedloom.recipe.sections import Federation, Strategy

Found = Iterator[tuple[str, str]]
"""Keys without effect, and why; those that the recipe leaves out among them."""


def find_unused(
    recipe: Recipe,
    plan: Plan,
    adapted: AdaptedModel,
    documents: Documents | None = None,
    blocks: Sequence[TokenBlocks] = (),
) -> tuple[str, ...]:
    """Return a line for each setting that somebody wrote and that has no effect on the planned run.

    `adapted` may be without values. `documents` and their `blocks` are those of clients in this process; None where the
    clients are elsewhere.
    """
    here = documents is not None
    found = [
        *_in_data(recipe, blocks, has_columns=documents is None or documents.has_columns, here=here),
        *_in_training(recipe, plan, here=here),
        *_in_federation(recipe, plan, here=here),
        *_in_strategy(recipe, plan),
    ]
    if recipe.model.convert and not plan.converts:
        found.append(("model.convert", "the weights that are read are no pickles"))
    if recipe.adapter.rank == 1 and "rank_pattern" not in recipe.adapter.options:
        found.append(("adapter.rslora", "with a rank of 1, α/√r is α/r"))
    holding = sum(1 for client in plan.clients if client.holdout_tokens)
    if recipe.privacy is not None:
        found.append(("evaluation.clients", "the clients of a private run tell no loss"))
    elif (recipe.evaluation.clients or 0) >= holding:
        found.append(("evaluation.clients", f"{holding} of {count(len(plan.clients), 'client')} hold anything out"))
    if not recipe.evaluation.tasks:
        found.append(("evaluation.tasks_every", "there are no evaluation.tasks"))
    elif recipe.evaluation.tasks_every > recipe.federation.rounds:
        found.append(("evaluation.tasks_every", f"the run is over after {count(recipe.federation.rounds, 'round')}"))
    if recipe.data.learns == "all":
        found.append(("report.samples", "no answers are learnt, so none are asked for"))
    elif recipe.report.samples and not plan.central_documents:
        found.append(("report.samples", "nothing is held out centrally that could be asked"))
    written = [(key, why) for key, why in found if _is_written(recipe, key)]
    written += unmatched_options(recipe.adapter.options, adapted.model)
    little = _of_little_effect(recipe, plan, adapted, blocks, here=here)
    return (
        *(f"{key} has no effect: {why}" for key, why in written),
        *(f"{key} {what}" for key, what in little if _is_written(recipe, key)),
    )


def _is_written(recipe: Recipe, key: str) -> bool:
    """Return whether the recipe sets a key: to what it is anyway counts only where that switches something on."""
    *sections, name = key.split(".")
    section: Section = recipe
    for part in sections:
        section = getattr(section, part)
    value = getattr(section, name)
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return name in section.model_fields_set and (value is True or value != default)


def _in_data(recipe: Recipe, blocks: Sequence[TokenBlocks], *, has_columns: bool, here: bool) -> Found:
    data = recipe.data
    if data.on_bad_row == "error":
        yield "data.max_bad_fraction", 'with on_bad_row = "error" the first bad row ends the run'
    if not has_columns:
        yield "data.text", "the documents are text files, which have no columns"
    if not here:
        yield "data.partition.kind", "each client brings its own documents"
        if not data.central_holdout:
            for key in ("revision", "subset", "split", "files"):
                yield f"data.{key}", "the server holds nothing out, so it reads no documents"
        return
    if data.window == "pack":
        if all(part.num_texts == len(part) for part in blocks):
            yield "data.window", "no two documents of a client fit into one block"
    elif not any(bool((part.lengths_N == part.tokens_NT.shape[1]).any()) for part in blocks):
        yield "data.window", "no document is longer than a block"


def _in_training(recipe: Recipe, plan: Plan, *, here: bool) -> Found:
    training, rounds = recipe.training, recipe.federation.rounds
    if training.schedule == "constant" and not training.warmup:
        yield "training.schedule_scope", "the learning rate is constant"
    elif rounds == 1 and training.schedule_scope != "rounds":
        yield "training.schedule_scope", "one round is the whole run"
    if training.schedule == "constant":
        yield "training.learning_rate_end", "the learning rate is constant"
    alone = training.schedule_scope == "round" or (rounds == 1 and training.schedule_scope == "run")
    if alone and all(client.steps <= 1 for client in plan.clients):
        for key in ("schedule", "learning_rate_end"):
            yield f"training.{key}", "no client takes more than one step in a round, and the first has the whole rate"
    if plan.whole_steps == tuple(client.steps for client in plan.clients):
        yield "training.max_steps", "no client's epochs take as many"
    if all(client.blocks <= training.batch_size for client in plan.clients):
        yield "training.gradient_accumulation", "no client has more rows than one micro-batch"
    table = training.optimizer_table
    if table.kind == "sgd" and not table.setting("momentum"):
        yield "training.optimizer_state", "SGD without momentum has none"
    elif rounds == 1:
        yield "training.optimizer_state", "no round follows that could begin with it"
    if not training.proximal_mu and training.proximal_schedule != "adaptive":
        yield "training.proximal_schedule", "training.proximal_mu is 0 throughout"
    if not here:
        for key in ("clients_at_once", "devices"):
            yield f"training.{key}", "each client trains on a machine of its own"
        return
    if training.devices == (recipe.model.device,) or training.devices == (plan.device,):
        yield "training.devices", "it names the device of model.device alone"
    if plan.engine == "reference":
        yield "training.clients_at_once", "the engine reference trains one client after another"
        yield "training.cuda_graph", "the engine reference records no steps"
    elif not plan.device.startswith("cuda"):
        yield "training.cuda_graph", f"{plan.device} is no GPU"
    elif training.gradient_checkpointing:
        yield "training.cuda_graph", "steps are not recorded with training.gradient_checkpointing"
    elif training.gradient_accumulation > 1:
        yield "training.cuda_graph", "steps are not recorded with training.gradient_accumulation"


def _in_federation(recipe: Recipe, plan: Plan, *, here: bool) -> Found:
    section, able = recipe.federation, sum(1 for client in plan.clients if client.steps)
    if able == 1:
        yield "contributions", "one client trains, and without it there is no federation"
    if recipe.bounds_clients:
        for key in ("max_lost_clients", "on_quorum_lost"):
            yield f"federation.{key}", "a client without an update counts as one that changes nothing"
    elif plan.clients_per_round == able:
        yield (
            "federation.fraction",
            f"all of {count(able, 'client')} train in a round, by rounding or by federation.min_clients",
        )
    if plan.clients_per_round == cohort_size(able, section.model_copy(update={"min_clients": 1})):
        yield (
            "federation.min_clients",
            f"by federation.fraction, {plan.clients_per_round} of {count(able, 'client')} train in a round anyway",
        )
    if section.early_stop and section.early_stop.patience >= section.rounds:
        yield "federation.early_stop", f"the run is over after {count(section.rounds, 'round')}, before its patience is"
    if (section.keep_every or 0) > section.rounds:
        yield "federation.keep_every", f"the run is over after {count(section.rounds, 'round')}"
    if (section.max_bytes or 0) >= section.rounds * plan.bytes_per_round and plan.bytes_are != "at first":
        most = f"{plan.bytes_are} {section.rounds * plan.bytes_per_round:,}".lstrip()
        yield "federation.max_bytes", f"all rounds take {most} bytes"
    patterns = "rank_pattern" in recipe.adapter.options
    if set(section.client_ranks or ()) == {recipe.adapter.rank} and not patterns:
        yield "federation.client_ranks", "each of them is adapter.rank"
    if section.lora_rule == "fedex" and plan.clients_per_round == 1:
        yield "federation.lora_rule", "one client's factors are their own mean, so nothing is left to add"
    if here:
        if section.max_share and _caps_nobody(section, plan):
            yield "federation.max_share", "no client has a larger one"
        for key in ("round_deadline", "max_change", "max_client_blocks"):
            yield f"federation.{key}", "the clients are in this process"
        if section.on_quorum_lost == "wait" and not recipe.bounds_clients:
            yield "federation.on_quorum_lost", 'a client in this process is not asked again: "wait" is as "stop"'


def _caps_nobody(section: Federation, plan: Plan) -> bool:
    """Return whether a cap on shares changes neither the mean, nor the clients' loss, nor what is judged by it."""
    held = {number: client.holdout_tokens for number, client in enumerate(plan.clients) if client.holdout_tokens}
    known = section.strategy.weighs or section.strategy.kind in UNWEIGHTED
    central = plan.central_tokens > 0
    # Of some steps alone, the tokens of a round are known on average.
    if plan.whole_steps and section.strategy.weight_by == "tokens":
        return False
    return central and known and not plan.capped and cap_weights(held, section.max_share) == held


def _in_strategy(recipe: Recipe, plan: Plan) -> Found:
    strategy, clients = recipe.federation.strategy, plan.clients_per_round
    able = [client for client in plan.clients if client.steps]
    if (why := _why_plain(strategy, clients)) and _weighs_alike(strategy, plan):
        yield "federation.strategy.kind", why
    if clients == 1 and not recipe.bounds_clients:
        yield "federation.strategy.weight_by", "one client trains in a round"
    elif strategy.kind == "multi_krum" and strategy.setting("keep") == 1:
        yield "federation.strategy.weight_by", "with keep = 1 one update is taken as it is"
    elif strategy.weight_by == "equal":
        if not recipe.bounds_clients and len({client.blocks for client in able}) == 1:
            yield "federation.strategy.weight_by", "every client has as many examples"
    elif all(client.tokens * able[0].blocks == able[0].tokens * client.blocks for client in able):
        yield "federation.strategy.weight_by", "every client has as many tokens in an example"
    if strategy.kind == "fedavgm" and not strategy.setting("momentum"):
        yield "federation.strategy.nesterov", "momentum is 0"
    elif recipe.federation.rounds == 1 and not strategy.nesterov:
        yield "federation.strategy.momentum", "a first round has none yet, and no other follows"


def _of_little_effect(
    recipe: Recipe, plan: Plan, adapted: AdaptedModel, blocks: Sequence[TokenBlocks], *, here: bool
) -> Found:
    """Yield keys that do less than their names say, and what they do."""
    if here and not any(client.holdout_tokens for client in plan.clients):
        yield "personalise", "makes adapters that nothing judges: no client holds anything out"
    if here and recipe.data.clients == 1:
        yield "data.partition.kind", "only orders the documents: one client holds them all"
    if here and all(bool((part.lengths_N == part.tokens_NT.shape[1]).all()) for part in blocks):
        yield "data.pad_in_loss", "only moves results by rounding: no block has padding"
    spans = [client.steps * (recipe.federation.rounds if recipe.training.schedule_scope == "run" else 1)
             for client in plan.clients]  # fmt: skip
    if recipe.training.warmup >= max(1, *spans):
        yield "training.warmup", "keeps the learning rate below its peak throughout: no client takes as many steps"
    spare = len(recipe.training.devices or ()) - plan.clients_per_round
    if here and recipe.training.devices != "all" and spare > 0:
        yield "training.devices", f"names {spare} more than clients train in a round, which wait in it"
    most, whole = recipe.federation.max_bytes or 0, recipe.federation.rounds * plan.bytes_per_round
    if most < whole and plan.bytes_are != "at most":
        rounds = "at most " * bool(plan.bytes_are)
        rounds += f"{most // plan.bytes_per_round} of {count(recipe.federation.rounds, 'round')}"
        yield "federation.max_bytes", f"ends the run after {rounds}, or a few more where clients do not answer"
    if most_rank := _find_most_rank(adapted):
        yield "adapter.rank", f"gives a layer more factors than the {most_rank} that its smaller side can use"
    if recipe.adapter.method == "psoft":
        why = "PEFT divides the factors by it before it multiplies them by it"
        yield "adapter.alpha", f"only moves results by rounding: {why}"
    strategy = recipe.federation.strategy
    if (why := _why_plain(strategy, plan.clients_per_round)) and not _weighs_alike(strategy, plan):
        yield "federation.strategy.kind", f"is a mean in which every client counts the same: {why}"


def _find_most_rank(adapted: AdaptedModel) -> int | None:
    """Return the rank that B [O, R] A [R, I] can have in the first layer where that is less than R; None: nowhere."""
    shapes = dict(zip(adapted.layout.names, adapted.layout.shapes, strict=True))
    factors = [(shapes[a], shapes[b]) for a, b in lora_pairs(adapted.layout.names).values()]
    sides = [(a[0], min(a[1:].numel(), b[0])) for a, b in factors]
    return next((side for rank, side in sides if rank > side), None)


def _weighs_alike(strategy: Strategy, plan: Plan) -> bool:
    """Return whether a rule that is a plain mean here weighs the clients as fedavg does: most give each the same."""
    return strategy.kind == "multi_krum" or len({client.blocks for client in plan.clients if client.steps}) == 1


def _why_plain(strategy: Strategy, clients: int) -> str:
    """Return why a strategy is a plain mean of the updates of so many clients; an empty text where it is none."""
    match strategy.kind:
        case "fedmedian" if clients <= 2:
            return "of one or two values, the median is the mean"
        case "trimmed_mean" if not count_trimmed(strategy.setting("trim"), clients):
            return "with trim = 0 it leaves no value out, and is a plain mean"
        case "bulyan" if not strategy.setting("malicious"):
            return "with malicious = 0 it leaves no value out, and is a plain mean"
        case "multi_krum" if strategy.setting("keep") == clients:
            return f"with keep = {clients} it takes every update of a round, as fedavg does"
    return ""
