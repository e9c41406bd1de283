"""The README.md of an adapter's folder, in the hub's model-card format, so that the folder can be uploaded as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.hub import COMMIT
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import Adapter
from fedloom.records.plan import Plan, explain_weights
from fedloom.records.privacy import NO_BOUND, explain_privacy
from fedloom.text import to_markdown_code, to_markdown_text

METRICS = {
    "central_loss": ("loss", "Loss on the central hold-out (nats per token)"),
    "central_perplexity": ("perplexity", "Perplexity on the central hold-out"),
    "central_accuracy": ("accuracy", "Next-token accuracy on the central hold-out"),
    "client_loss": ("loss", "Loss on the clients' own hold-outs (nats per token)"),
}
"""Key of a round's record -> the hub's type, and what to call it."""


def write_card(recipe: Recipe, plan: Plan, record: Mapping[str, Any] | None) -> str:
    """Return the card of the adapter of a round; `record` is None for one that has not been evaluated yet."""
    known = {key: record[key] for key in METRICS if record and key in record}
    # Only what a hub has, has a commit for a revision; a path is nobody else's business.
    on_a_hub = COMMIT.fullmatch(plan.model_revision)
    model, data = _public(plan.model, plan.model_revision), _public(plan.data, plan.data_revision)
    method, whole = recipe.adapter.method, recipe.adapter.method == "full"
    public = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"source": model}),
            "data": recipe.data.model_copy(update={"source": data}),
        }
    )
    head = _head(
        recipe.name,
        data,
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
    text = [
        f"# {recipe.name}",
        to_markdown_text(recipe.description),
        f"{_describe(recipe.adapter)} {shown_model} ({revisions[0]}), {round} of {plan.rounds}."
        " It was trained by federation:"
        f" {len(plan.clients)} clients, each on its own documents, which stayed where they were; only"
        f" {'the weights of models' if whole else 'adapters'} travelled.",
        f"{weights}- Data: {shown_data} ({revisions[1]})\n- Trainable parameters: {plan.trainable_share}\n"
        f"- Objective: {f'FedProx, μ = {plan.proximal_mu:g}' if plan.proximal_mu else 'FedAvg'}\n"
        "- Licence: that of the base model and of the data; set it before you publish this",
        "\n".join(
            [
                "| metric | value |",
                "|---|---|",
                *(f"| {METRICS[key][1]} | {value:.4f} |" for key, value in known.items()),
            ]
        )
        if known
        else "",
        explain_privacy(plan.privacy) if plan.privacy else NO_BOUND,
        _how_to_load(shown_model, whole=whole, on_a_hub=bool(on_a_hub)),
        f"The recipe:\n\n{to_markdown_code(recipe_to_toml(public), 'toml')}",
    ]
    return f"---\n{head}\n---\n\n" + "\n\n".join(part for part in text if part) + "\n"


def _head(name: str, data: str, known: Mapping[str, float], **facts: Any) -> str:
    """Write what a hub reads of the model, and of its results if there are any, as YAML."""
    # Needed when a run is written down, and slow to import: not at the start.
    from huggingface_hub import EvalResult, ModelCardData

    results: Any = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=METRICS[key][0],
            metric_name=METRICS[key][1],
            metric_value=value,
        )
        for key, value in known.items()
    ]
    named: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    return str(ModelCardData(**facts, **named).to_yaml())


def _describe(adapter: Adapter) -> str:
    """Describe what the folder holds, up to the name of the base model."""
    if adapter.method == "full":
        return "The model itself, every weight of it fine-tuned from"
    facts = [adapter.method, *(["DoRA"] if adapter.dora else [])]
    facts += [f"rank {adapter.rank}"] if adapter.method == "lora" or "rank" in adapter.given else []
    return f"An adapter ({', '.join(facts)}) of"


def _how_to_load(model: str, *, whole: bool, on_a_hub: bool) -> str:
    if whole or on_a_hub:
        library, kind = ("transformers", "AutoModelForCausalLM") if whole else ("peft", "AutoPeftModelForCausalLM")
        return f'```python\nfrom {library} import {kind}\n\nmodel = {kind}.from_pretrained("this folder")\n```'
    return f"To use it: load {model} with transformers, then `PeftModel.from_pretrained(model, this_folder)`."


def _public(source: str, revision: str) -> str:
    """Return a source without the folders that it lies in on this machine."""
    if COMMIT.fullmatch(revision) or ":" in source:
        return source
    return f"local: {source.rstrip('/').rsplit('/', 1)[-1]}"
