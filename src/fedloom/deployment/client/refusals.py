"""Refusals of a client: what a recipe, its documents or its model are that the policy of their owner does not allow.

`check_policy` looks at what is asked before anything is read or loaded; `check_documents` and `check_model` at what
only shows then. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.deployment.client.policy import SERVERS, Policy, PrivacyPolicy
from fedloom.errors import PolicyError
from fedloom.hub import COMMIT, MODEL_ID
from fedloom.recipe.data_section import TOKENIZERS
from fedloom.recipe.privacy_section import CLIENT, DOCUMENT
from fedloom.recipe.recipe import pin
from fedloom.records.privacy import name_units

if TYPE_CHECKING:
    from fedloom.recipe.privacy_section import Privacy
    from fedloom.recipe.recipe import Recipe
    from fedloom.training.jobs import ClientTask

COMMIT_OF_THE_SERVER = "0" * 40
"""Stand-in for the commit that `fedloom serve` names of a model of the hub, whatever its recipe says."""
DRAWN = "random:"
"""Beginning of the names of models whose weights are drawn, which anybody may ask for."""
WHOLE = ("modules_to_save",)
"""Options of PEFT's methods that train whole layers, as `full` does."""
ROWS = ("trainable_token_indices",)
"""Options of PEFT's methods that train rows of the embedding."""


TO_WHAT = {
    # Of those that `with_options` takes, a recipe can only ask for another column.
    "text": " (or --text)",
    "columns": " (or --columns)",
    "chat_template": f' (to the template itself, or to "{SERVERS}" for any of a recipe without [privacy])',
}
"""Keys of a policy, each with how else it is said, or with what it may be, where no refusal says that."""


class Refusal(NamedTuple):
    """Reason why a policy does not allow a recipe, and the key of the policy that says so."""

    key: str
    why: str


def check_policy(policy: Policy, recipe: Recipe, task: ClientTask | None = None) -> None:
    """Refuse a recipe, or a task whatever its recipe says, that asks for more than the client's owner allows.

    What is counted is the journal's to check, and what shows when it is loaded, `check_documents` and `check_model`.

    Raises:
        PolicyError: naming all that it does not allow.
    """
    _refuse(find_refusals(policy, recipe, task))


def _refuse(refusals: Iterable[Refusal]) -> None:
    if found := [*refusals]:
        raise PolicyError(*found)


def find_refusals(policy: Policy, recipe: Recipe, task: ClientTask | None = None) -> Iterator[Refusal]:
    """Yield all that a policy does not allow of a recipe, or of a task of it."""
    adapter, data, federation = recipe.adapter, recipe.data, recipe.federation
    yield from _refuse_telling(policy.privacy, recipe.privacy)
    epochs, rounds = recipe.training.epochs, federation.rounds
    if recipe.personalise:
        epochs = max(epochs, recipe.personalise.epochs)
    if task:
        # A server could tell a mild recipe and then set harder tasks.
        epochs, rounds = max(epochs, task.training.epochs), max(rounds, task.rounds, task.round)
    yield from _refuse_model(policy, recipe)
    if adapter.method not in policy.methods:
        yield Refusal("methods", f'does not allow the method "{adapter.method}"')
    if "full" not in policy.methods and (whole := _named(adapter.options, WHOLE)):
        yield Refusal("methods", f'does not allow whole layers to be trained (options.{whole[0]}), which "full" would')
    if not policy.train_embedding and (rows := _named(adapter.options, ROWS)):
        yield Refusal("train_embedding", f"does not allow the embedding to be trained (options.{rows[0]})")
    if federation.lora_rule not in policy.lora_rules:
        yield Refusal("lora_rules", f'does not allow the rule "{federation.lora_rule}"')
    if "text" in data.model_fields_set and data.text != policy.text:
        yield Refusal("text", f'does not allow the column "{data.text}" to be read for text')
    read = [] if data.is_plain else [column for _, column in data.columns]
    # An owner who bounds what is told names the column of their units there, and no other is taken.
    unit = None if policy.privacy else recipe.documents.unit
    for column in read if unit is None else [*read, unit]:
        if not {column, column.partition(".")[0]} & set(policy.columns):
            yield Refusal("columns", f'does not allow the column "{column}" to be read')
    if data.own_template is not None and policy.chat_template == TOKENIZERS:
        yield Refusal("chat_template", "allows no chat template but the tokenizer's own")
    # It can hang, or ask for what none may have, at a document of its choice: the run would be refused, or be slow.
    if data.own_template is not None and policy.chat_template == SERVERS and recipe.bounds_documents:
        yield Refusal("chat_template", "allows a server's chat template, but none in a run with [privacy]")
    if not policy.min_length <= data.max_length <= policy.max_length:
        key, bound = ("min_length", "at least") if data.max_length < policy.min_length else ("max_length", "at most")
        yield Refusal(key, f"allows a max_length of {bound} {getattr(policy, key)}, not {data.max_length}")
    if data.window not in policy.windows:
        yield Refusal("windows", f'does not allow the window "{data.window}"')
    if data.documents_per_client is not None and data.documents_per_client < policy.min_documents:
        yield Refusal("min_documents", _too_few("documents", policy.min_documents, data.documents_per_client))
    size, steps = recipe.training.step_size, recipe.training.max_steps
    if size < policy.min_batch_size:
        yield Refusal("min_batch_size", f"allows no steps of {size}, {policy.min_batch_size} at least")
    # An update of a few steps is one of their rows alone, however many documents there are.
    if steps is not None and steps * size < policy.min_documents:
        yield Refusal("min_documents", _too_few("rows in a round", policy.min_documents, steps * size))
    if epochs > policy.max_epochs:
        yield Refusal("max_epochs", f"allows {policy.max_epochs} epochs a round, not {epochs}")
    if rounds > policy.max_rounds:
        yield Refusal("max_rounds", f"allows {policy.max_rounds} rounds, not {rounds}")


def _refuse_telling(owner: PrivacyPolicy | None, recipe: Privacy | None) -> Iterator[Refusal]:
    """Yield why a recipe bounds too little of what it has a client tell; how much, the ledger says."""
    if owner is None:
        return
    if recipe is None:
        yield Refusal("privacy", "allows no recipe without [privacy], which bounds what is told of a document")
        return
    if recipe.noise == "seed":
        yield Refusal("privacy", "allows no noise of a recipe's seed, which whoever has the recipe can take off")
    # A column is no stronger bound on a document: an author with one document less gives another one in its place. And
    # how many values a column has is told: which one that is, no server chooses.
    if owner.unit != recipe.unit:
        wants, has = map(_describe_unit, (owner.unit, recipe.unit))
        yield Refusal("privacy.unit", f"wants {wants} protected, and this recipe protects {has}")


def _describe_unit(unit: str) -> str:
    return {DOCUMENT: "each document", CLIENT: "each client"}.get(unit, f'all rows of one "{unit}" together')


def _named(options: Mapping[str, Any], refused: tuple[str, ...]) -> list[str]:
    # An empty value is one too: what PEFT makes of it, its next version may make something else of.
    return [name for name in refused if options.get(name) is not None]


def _refuse_model(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    model = recipe.model
    pins = policy.pins(model.source)
    if policy.models is not None and not pins:
        yield Refusal("models", f'does not allow the base model "{model.source}"')
    # A tokenizer is a program of its model's: one that a server wrote could tell texts by how many tokens they become.
    if policy.models is None and not model.source.startswith(DRAWN) and model.source not in policy.named:
        yield Refusal("models", f'does not name "{model.source}"')
        return
    # By its name alone: a look at the disk would tell a server whether a folder of that name lies there.
    if not MODEL_ID.fullmatch(model.source):
        return
    # A branch, a tag or a pull request is whatever somebody makes of it later.
    revisions = {"model.revision": model.revision, "model.weights_revision": model.weights_revision}
    if loose := [key for key, named in revisions.items() if named is not None and not COMMIT.fullmatch(named)]:
        yield Refusal("models", f"allows a model of the hub by its commit alone, and {loose[0]} is none")
    commits = {pin["commit"] for pin in pins}
    if model.revision is None and commits <= {None}:
        yield Refusal("models", "allows a model of the hub by its commit alone, and the recipe names none")
    if model.revision is not None and commits and None not in commits and model.revision not in commits:
        yield Refusal("models", f'allows "{model.source}" at another commit')


def as_served(policy: Policy, recipe: Recipe) -> Recipe:
    """Return a recipe as a server tells it: with the commit that its branch stands for, where no policy names one."""
    pinned = recipe.model.revision is not None and COMMIT.fullmatch(recipe.model.revision)
    if pinned or any(entry["commit"] for entry in policy.pins(recipe.model.source)):
        return recipe
    return pin(recipe, {"model_revision": COMMIT_OF_THE_SERVER})


def mend_policy(keys: Iterable[str], file: Path | None) -> str:
    """Return what a policy's owner does to allow what these keys refuse; `file` is where they wrote it."""
    named = ", ".join(key + TO_WHAT.get(key, "") for key in keys)
    where = file or "a policy file (fedloom join --write-policy FILE writes one)"
    return f"if you mean to allow that, change {named} in {where}"


def as_owner_wrote(policy: Policy, recipe: Recipe) -> Recipe:
    """Return a recipe with its owner's column or chat template, and their pin where it names no commit itself."""
    own = {"text": policy.text} if recipe.data.is_plain else {}
    if recipe.data.is_chat and policy.chat_template not in (TOKENIZERS, SERVERS):
        own = {"chat_template": policy.chat_template}
    model, data = recipe.model, recipe.data.model_copy(update=own)
    commits = [pin["commit"] for pin in policy.pins(model.source) if pin["commit"]]
    if model.revision is None and commits:
        model = model.model_copy(update={"revision": commits[0]})
    return recipe.model_copy(update={"model": model, "data": data})


def check_documents(
    policy: Policy, *, documents: int, tokens: int | None = None, held_out: int = 0, unit: str = DOCUMENT
) -> None:
    """Refuse to work with fewer documents or tokens than the owner wants to hide each among.

    In a private run units alone are counted, by their places: noise hides what they say, and a refusal would tell it.

    Raises:
        PolicyError: naming the keys of the policy.
    """
    limits = (
        ("min_documents", f"{name_units(unit)} to train on", policy.min_documents, documents),
        ("min_tokens", "tokens to train on", policy.min_tokens, policy.min_tokens if tokens is None else tokens),
        ("min_holdout_documents", "documents held out", policy.min_holdout_documents if held_out else 0, held_out),
    )
    _refuse(Refusal(key, _too_few(what, least, found)) for key, what, least, found in limits if found < least)


def _too_few(what: str, least: int, found: int) -> str:
    return f"wants at least {least:,} {what}, not {found:,}"


def check_model(policy: Policy, recipe: Recipe, *, weights: str, share: float, embedding: bool) -> None:
    """Refuse a model that was loaded: by its weights, the share of them that is trained, or a trained embedding.

    Raises:
        PolicyError: naming the keys of the policy.
    """
    _refuse(_judge_model(policy, recipe, weights, share, embedding))


def _judge_model(policy: Policy, recipe: Recipe, weights: str, share: float, embedding: bool) -> Iterator[Refusal]:
    source = recipe.model.source
    hashes = {pin["weights"] for pin in policy.pins(source)}
    if hashes and None not in hashes and weights not in hashes:
        yield Refusal("models", f'allows "{source}" with other weights than these')
    if recipe.adapter.method == "full":
        return
    if share > policy.max_trained:
        yield Refusal("max_trained", f"allows {policy.max_trained:.0%} of the weights to be trained, not {share:.0%}")
    if embedding and not policy.train_embedding:
        yield Refusal("train_embedding", "does not allow the embedding to be trained")
