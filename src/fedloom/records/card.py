"""The README.md of an adapter's folder, in the hub's model-card format, so that the folder can be uploaded as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.host.files import write_text
from fedloom.hub import COMMIT
from fedloom.recipe.loading import SCHEME, recipe_to_toml
from fedloom.recipe.methods import METHODS
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import Adapter
from fedloom.records.answers import explain_figures, list_notes, tabulate
from fedloom.records.plan import Plan, explain_audit, explain_data, explain_weights
from fedloom.records.privacy import NO_BOUND, explain_privacy
from fedloom.records.run import Record, list_adapters, read_run
from fedloom.text import count, to_markdown_code, to_markdown_text

METRICS = {
    "central_loss": ("loss", "Loss on the central hold-out (nats per token)"),
    "central_perplexity": ("perplexity", "Perplexity on the central hold-out"),
    "central_accuracy": ("accuracy", "Next-token accuracy on the central hold-out"),
    "client_loss": ("loss", "Loss on the clients' own hold-outs (nats per token)"),
    "own_loss": ("loss", "Loss on what its client holds out (nats per token)"),
}
"""Key of a round's record -> the hub's type, and what to call it."""
CLIENTS_OWN, SERVERS_OWN = "the clients' own documents", "the server's own documents"
"""Words on a card for what clients elsewhere hold, and for what is held out centrally beside them."""
CARD = "README.md"
TASKS = "## Tasks\n"
"""Heading of what tasks found."""
BEHIND = re.compile(r"^## (?:Privacy|Use|Recipe)$", re.MULTILINE)
"""Heading that comes behind it; cards of earlier versions lack some."""
HERE = "PATH-OF-THIS-FOLDER"
"""Words of a card for where the adapter lies, until it lies somewhere that has a name."""
BASE = "FOLDER-OF-THE-BASE-MODEL"
"""Words of a card for where a base model lies that came from the machine of the run."""
SHARED_ALONE = (
    "What is here is A, which all clients share; B is as it began, and changes nothing. Each client has a B of its own"
    " on its own machine, and a whole adapter with it: the figures are those of these."
)
"""Words of a card for an adapter of which a part stays with clients elsewhere."""
GGUF_KINDS = "llama, mistral, qwen2 and qwen3"
"""Kinds of models of which a GGUF file can be written (`fedloom.model.gguf_layout`, which a record is not to load)."""
ITS_OWNERS = (
    "It may tell of the documents that it learnt from, and belongs to whoever they belong to: think of that before you"
    " hand it on."
)
"""Warning of a card for an adapter that is one client's own."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""


@dataclass(frozen=True)
class Owner:
    """Client that has an adapter for itself, and in a sentence how that adapter came about."""

    client: int
    origin: str


def write_card(
    recipe: Recipe,
    plan: Plan,
    record: Mapping[str, Any] | None,
    owner: Owner | None = None,
) -> str:
    """Return the card of the adapter of a round; `record` is None for one that has not been evaluated yet.

    With an owner it is that of a client's own adapter, which came of the round's; the record has its own figures alone.
    What tasks have to say comes later, with `write_tasks`.
    """
    known = {key: record[key] for key in METRICS if record and key in record}
    # Only what a hub has, has a commit for a revision; a path is nobody else's business.
    on_a_hub = COMMIT.fullmatch(plan.model_revision)
    model = public_name(plan.model, plan.model_revision)
    # Who the clients elsewhere are is nobody else's business either; and what the server holds out is none of theirs.
    data = CLIENTS_OWN if plan.elsewhere else public_name(plan.data, plan.data_revision)
    held = {key: SERVERS_OWN if plan.elsewhere and key.startswith("central") else data for key in known}
    method, whole = recipe.adapter.method, recipe.adapter.method == "full"
    public = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"source": model}),
            "data": recipe.data.model_copy(update={"source": data}),
            "evaluation": recipe.evaluation.model_copy(
                update={
                    "tasks": tuple(public_name(file, "") if "/" in file else file for file in recipe.evaluation.tasks)
                }
            ),
        }
    )
    head = _head(
        recipe.name,
        held,
        known,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        license="other",
        license_name="see-base-model-and-data",
        base_model=model if on_a_hub else None,
        tags=[*([] if whole else [method]), "federated-learning", "fedloom"],
    )
    shown_model, shown_data = to_markdown_text(model), to_markdown_text(data)
    revisions = [to_markdown_text(revision) for revision in (plan.model_revision, plan.data_revision)]
    weights = f"- Base weights: {explain_weights(plan.model_weights)}\n" if plan.model_weights else ""
    round = f"round {record['round']}" if record else "before any training"
    whose = f": client {owner.client}'s own" if owner else ""
    came, rounds = (f". {owner.origin} It comes of", " of the rounds") if owner else (",", "")
    text = [
        f"# {recipe.name}{whose}",
        to_markdown_text(recipe.description),
        ITS_OWNERS if owner else "",
        f"{_describe(recipe.adapter)} {shown_model} ({revisions[0]}){came} {round} of {plan.rounds}."
        f" {'That round' if owner else 'It'} was trained by federation:"
        f" {_describe_clients(plan, 'the weights of models' if whole else 'adapters')}",
        f"{weights}- Data{rounds}: {explain_data(shown_data, revisions[1])}{_count_documents(plan)}\n"
        f"- Trainable parameters: {plan.trainable_share}\n"
        f"- Objective{rounds}: {f'FedProx, μ = {plan.proximal_mu:g}' if plan.proximal_mu else 'FedAvg'}\n"
        "- Licence: that of the base model and of the data; set it before you publish this",
        SHARED_ALONE if plan.shared_alone else "",
        _tabulate(known),
        f"## Privacy\n\n{explain_privacy(plan.privacy) if plan.privacy else NO_BOUND}",
        _how_to_use(recipe, model, plan.model_revision if on_a_hub else None, owner),
        f"## Recipe\n\n{to_markdown_code(recipe_to_toml(public), 'toml')}",
    ]
    return f"---\n{head}\n---\n\n" + "\n\n".join(filter(None, text)) + "\n"


def write_tasks(folder: Path) -> None:
    """Put what a run's adapters could do into their cards, in place of what tasks found before.

    Raises:
        RunError: a card can't be written.
    """
    run = read_run(folder)
    for name, round in list_adapters(run).items():
        path = folder / "adapters" / name / CARD
        if path.is_file():
            card = path.read_text(encoding="utf-8")
            if (told := put_tasks(card, describe_tasks(run.evaluations, round))) != card:
                write_text(path, told)


def describe_tasks(records: Sequence[Record], round: int) -> str:
    """Return as Markdown what the adapter of a round could do, beside the base model and baselines.

    It is an empty text where that adapter was not asked.
    """
    tasks = {record["task"] for record in records if record.get("round") == round}
    told = [record for record in records if record["task"] in tasks and record.get("round", round) == round]
    if not tasks:
        return ""
    header, rows = tabulate(told)
    head, *body = (f"| {' | '.join(map(to_markdown_text, line))} |" for line in (header, *rows))
    table = "\n".join([head, f"|{' --- |' * len(header)}", *body])
    notes = "\n".join(f"- {to_markdown_text(note)}" for note in list_notes(told))
    return "\n\n".join(part for part in (explain_figures(told), table, notes) if part)


def put_tasks(card: str, text: str) -> str:
    """Return a card with what tasks found, in place of what they found before; nothing where the text is empty."""
    plain = without_tasks(card)
    behind = BEHIND.search(plain)
    if not behind or not text:
        return plain
    return f"{plain[: behind.start()]}{TASKS}\n{text}\n\n{plain[behind.start() :]}"


def without_tasks(card: str) -> str:
    """Return a card as it was written with its adapter."""
    behind = BEHIND.search(card)
    if not behind:
        return card
    # Behind a blank line, and before all that others wrote as they liked.
    before, mark, _ = card[: behind.start()].partition(f"\n{TASKS}")
    return f"{before}\n{card[behind.start() :]}" if mark else card


def write_own_card(recipe: Recipe, revision: str, origin: str, loss: float | None) -> str:
    """Return the card of an adapter that a client keeps for itself: what it is made of, whose it is, and how to use it.

    `revision` is the base model's, `origin` says in a sentence or two how the adapter came about, and `loss` is that on
    what the client holds out, None where it is not known.
    """
    known = {} if loss is None else {"own_loss": loss}
    method, whole = recipe.adapter.method, recipe.adapter.method == "full"
    on_a_hub = bool(COMMIT.fullmatch(revision))
    model = public_name(recipe.model.source, revision)
    head = _head(
        recipe.name,
        dict.fromkeys(known, "the client's own documents"),
        known,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        license="other",
        license_name="see-base-model-and-data",
        base_model=model if on_a_hub else None,
        tags=[*([] if whole else [method]), "federated-learning", "fedloom"],
    )
    shown = to_markdown_text(model)
    parts = [
        f"# {recipe.name}: a client's own",
        f"{_describe(recipe.adapter)} {shown} ({to_markdown_text(revision)}). {origin}",
        f"It was made on its owner's machine and was sent to nobody. {ITS_OWNERS}",
        _tabulate(known),
        f"## Use\n\n{_load(model, whole=whole, on_a_hub=on_a_hub)}",
    ]
    return f"---\n{head}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _tabulate(known: Mapping[str, float]) -> str:
    """Return a table of the figures that are known; nothing without any."""
    rows = [f"| {METRICS[key][1]} | {value:.4f} |" for key, value in known.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else ""


def _head(name: str, data: Mapping[str, str], known: Mapping[str, float], **facts: Any) -> str:
    """Write what a hub reads of the model, and of its results on data if there are any, as YAML."""
    # Needed when a run is written down, and slow to import: not at the start.
    from huggingface_hub import EvalResult, ModelCardData

    results: Any = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data[key],
            dataset_name=data[key],
            metric_type=METRICS[key][0],
            metric_name=METRICS[key][1],
            metric_value=value,
        )
        for key, value in known.items()
    ]
    named: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    return str(ModelCardData(**facts, **named).to_yaml())


def _describe_clients(plan: Plan, travelled: str) -> str:
    """Say where the clients' documents were: of those of one machine it would be no merit that they stayed there."""
    clients = count(len(plan.clients), "client")
    if plan.elsewhere:
        return f"{clients}, each on its own documents, which stayed where they were; only {travelled} travelled."
    return f"{clients}, simulated: the documents lay on one machine, and were dealt out among them."


def _describe(adapter: Adapter) -> str:
    """Describe what the folder holds, up to the name of the base model."""
    if adapter.method == "full":
        return "The model itself, every weight of it fine-tuned from"
    facts = [adapter.method, *(["DoRA"] if adapter.dora else [])]
    facts += [f"rank {adapter.rank}"] if adapter.method == "lora" or "rank" in adapter.given else []
    return f"An adapter ({', '.join(facts)}) of"


def _count_documents(plan: Plan) -> str:
    """Say how many documents there were and what the audit found; nothing where that would tell of a client."""
    if "central" in plan.privacy:
        return ""
    trained = sum(client.train_documents for client in plan.clients)
    held_out = plan.central_documents + sum(client.holdout_documents for client in plan.clients)
    return (
        f", {count(trained, 'document')} to train on and {held_out:,} held out\n"
        f"- Audit of the split, copies on two sides: {to_markdown_text(explain_audit(plan))}"
    )


def _how_to_use(recipe: Recipe, model: str, commit: str | None, owner: Owner | None) -> str:
    """Say in a few lines each how PEFT, or transformers, Ollama and vLLM use it; `commit` is of a base on a hub."""
    method = recipe.adapter.method
    whole = method == "full"
    parts = {"transformers" if whole else "PEFT": _load(model, whole=whole, on_a_hub=bool(commit))}
    # A trained prompt sits on no layers, and can be merged into none.
    if whole or METHODS[method].targets:
        merged = "" if whole or recipe.adapter.is_plain_lora else " --merged"
        whose = f" --client {owner.client}" if owner else ""
        name = f"my-{recipe.name}"
        parts[f"Ollama, from the run directory RUN, of models of the kinds {GGUF_KINDS}"] = (
            f"```\nfedloom export RUN --ollama {name}{merged}{whose}\n"
            f"ollama create {name} -f {name}/Modelfile\nollama run {name}\n```"
        )
        parts["vLLM"] = f"```\n{_serve(recipe, model, commit, whose)}\n```"
    return "## Use\n\n" + "\n\n".join(f"{title}:\n\n{text}" for title, text in parts.items())


def _load(model: str, *, whole: bool, on_a_hub: bool) -> str:
    if whole or on_a_hub:
        library, kind = ("transformers", "AutoModelForCausalLM") if whole else ("peft", "AutoPeftModelForCausalLM")
        return to_markdown_code(f'from {library} import {kind}\n\nmodel = {kind}.from_pretrained("{HERE}")', "python")
    imports, lines = _load_base(model)
    lines = [*imports, "from peft import PeftModel", "", *lines, f'model = PeftModel.from_pretrained(model, "{HERE}")']
    return to_markdown_code("\n".join(lines), "python")


def _load_base(model: str) -> tuple[list[str], list[str]]:
    """Return what to import and to type for a base model that is on no hub, where PEFT can't find it by its name."""
    kind, _, rest = model.partition(":")
    if kind == "random":
        imports = ["torch", "fedloom.model.loading load_model", "fedloom.model.source open_model"]
        lines = [f'model = load_model(open_model({_quote(model)}), dtype="float32", device=torch.device("cpu"))']
    else:
        package, _, inside = rest.partition("/") if kind == "package" else ("", "", rest.strip())
        found = f"find_spec({_quote(package)}).submodule_search_locations[0]" if package else _quote(BASE)
        file = f", gguf_file={_quote(inside)}" if inside.endswith(".gguf") else ""
        file = file or (f", subfolder={_quote(inside)}" if package and inside else "")
        imports = [*(["importlib.util find_spec"] if package else []), "transformers AutoModelForCausalLM"]
        lines = [f"folder = {found}", f"model = AutoModelForCausalLM.from_pretrained(folder{file})"]
    return [f"from {one.replace(' ', ' import ')}" if " " in one else f"import {one}" for one in imports], lines


def _quote(text: str) -> str:
    """Write a text as Python does, with nothing in it that ends a line."""
    return json.dumps(text, ensure_ascii=False)


def _serve(recipe: Recipe, model: str, commit: str | None, whose: str) -> str:
    """Return what to type for vLLM: the adapter over a base from a hub, where it is plain LoRA, or a whole model."""
    adapter = recipe.adapter
    plain = adapter.is_plain_lora and not adapter.options
    plain = plain and recipe.federation.lora_rule != "fedex"
    rank = next((rank for rank in RANKS if rank >= (adapter.rank or 0)), None)
    if adapter.method == "full":
        return f"vllm serve {HERE}"
    if not (plain and commit and rank):
        return f"fedloom export RUN --to merged --merged{whose}\nvllm serve merged"
    return (
        f"vllm serve {model} --revision {commit} \\\n"
        f"    --enable-lora --max-lora-rank {rank} \\\n    --lora-modules {recipe.name}={HERE}"
    )


def public_name(source: str, revision: str) -> str:
    """Return a source without the folders that it lies in on this machine."""
    if COMMIT.fullmatch(revision) or SCHEME.match(source):
        return source
    return f"local: {source.rstrip('/').rsplit('/', 1)[-1]}"
