"""Fields of every message between server and client: kind, bounds, and the owner's keys that limit or forbid it.

Both sides read by these records and by nothing else, so what is not here does not travel: an unknown field is refused.
`message_recipe` has the recipe's. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, get_args

from fedloom.deployment.approvals import NAME
from fedloom.deployment.message_kinds import (
    Count,
    Either,
    Field,
    Flag,
    Listing,
    Only,
    Pattern,
    Real,
    Record,
    Row,
    Table,
    Word,
    as_private,
)
from fedloom.deployment.message_recipe import CLIENTS, LAYER, RECIPE, ROUNDS, TRAINING
from fedloom.progress import Phase

DOCUMENTS, TOKENS, QUESTIONS_OF_A_TASK = 10**12, 10**15, 10**9
TASKS, TASK_LETTERS = 100, 100
"""Tasks of a client's own that can be told of, and the letters of their names."""
MEASURES = ("examples", "tokens")
"""Measures of clients' weights that add up over them."""
LARGE = 1e18
"""Limit of measured numbers: beyond it is nothing that a client can have measured."""
SECONDS = 1e9
MOST_NOISE = 1e9
ROWS = 2**19
"""Steps and batches that one answer can tell of."""

HASH = Pattern("SHA-256: 64 hexadecimal digits", re.compile(r"[0-9a-f]{64}"))
CLIENT = Pattern("client's name: 1 to 63 letters, digits, `.`, `_`, `-`", NAME)
TASK = Pattern(
    f"task's name: up to {TASK_LETTERS} letters, digits, `.`, `_`, `-`",
    re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{TASK_LETTERS - 1}}}", re.ASCII),
)
VERSION = Pattern("version, as `1.2.3`", re.compile(r"\d{1,4}(\.\d{1,4}){1,3}[a-z0-9.+]{0,40}", re.ASCII))

RESIDUAL = Table(
    LAYER,
    Row(tuple(Field(name, Count(1, 2**24), "") for name in ("features_out", "rank", "features_in"))),
    100_000,
)
LAYOUT = Field("layout", HASH, "the hash of the adapter's names and shapes, which must be one's own")
ADAPTER = (
    LAYOUT,
    Field("residual", RESIDUAL, "the shapes of what lies beside the adapter, with `lora_rule = \"fedex\"`"),
)  # fmt: skip
ASKED = (
    Field("recipe", RECIPE, "the recipe, but for what is the server's own"),
    Field("seconds", Real(0, SECONDS, above=True), "the time left for an answer, from when the question came"),
)
SAME = Field(
    "documents",
    HASH,
    "what it told of its blocks when it enrolled: with others, which nobody counted, it refuses",
    False,
)
ROUND = Field("round", Count(1, ROUNDS), "the round, from 1", policy="max_rounds")
NUMBER = Field("client", Count(0, CLIENTS - 1), "the client's number")
OWN = Field(
    "own",
    HASH,
    'with `lora_rule = "fedsa"`, what the client told of its own part of the adapter when it last trained: with'
    " another part it refuses; left out before its first round",
    False,
)


def _ask(do: str, *fields: Field, policy: str = "") -> Record:
    return Record((Field("do", Word((do,)), "the question", policy=policy), *ASKED, *fields))


QUESTIONS: dict[str, Record] = {
    "meet": _ask("meet", policy="max_meets_a_day"),
    "evaluate": _ask("evaluate", *ADAPTER, SAME, OWN, policy="tell_holdout_loss max_scores_a_day"),
    "train": _ask(
        "train",
        *ADAPTER,
        SAME,
        ROUND,
        Field("rounds", Count(1, ROUNDS), "the rounds of the run", policy="max_rounds"),
        NUMBER,
        OWN,
        Field("seed", Count(0, 2**63 - 1), "the seed of the order of documents, and of dropout"),
        Field("training", TRAINING, "this round's settings: as in the recipe, but for μ"),
        Field("judge", Flag(), "whether the hold-out's loss is told, too", policy="tell_holdout_loss max_scores_a_day"),
        policy="max_rounds_a_day",
    ),
    "tasks": _ask(
        "tasks",
        *ADAPTER,
        SAME,
        OWN,
        Field("base", Flag(), "whether the base model is asked, too"),
        policy="tell_tasks max_answers_a_day",
    ),
    "keep": _ask("keep", *ADAPTER, SAME, OWN, ROUND, NUMBER, policy="max_rounds_a_day"),
}
"""Messages to a client, by what is asked. All but the first come with an array of float32, the adapter."""


NULL, NONE, AT_ONCE = Only(None), Only(0), Only(0.0)
"""Values in the place of what a private run does not tell: a loss, a number of things, a time."""


def _loss(name: str, meaning: str, **more: Any) -> Field:
    return Field(name, Either((NULL, Real(0, LARGE))) if more else Real(0, LARGE), meaning, private=NULL, **more)


REPORT = Record(
    (
        ROUND,
        NUMBER,
        Field("examples", Count(1, DOCUMENTS), "blocks trained on"),
        Field("tokens", Count(1, TOKENS), "tokens trained on", private=NONE),
        Field("steps", Count(1, TOKENS), "steps taken"),
        Field("proximal_mu", Real(0, 1e6), "μ"),
        _loss("loss_first", "the first step's loss"),
        _loss("loss_last", "the last step's loss"),
        _loss("loss_mean", "the mean loss"),
        Field("proximal_loss", Real(0, LARGE), "the mean proximal term"),
        Field("proximal_ratio", Real(0, LARGE), "the proximal gradient's norm over the loss gradient's"),
        Field("drift", Real(0, LARGE), "the norm of the change"),
        Field("seconds", Real(0, SECONDS), "the time of training", private=AT_ONCE),
        Field("evaluate_seconds", Real(0, SECONDS), "the time of scoring", False, private=AT_ONCE),
        _loss("holdout_loss_before", "the hold-out's loss before", required=False, policy="tell_holdout_loss"),
        _loss("holdout_loss_after", "the hold-out's loss after", required=False, policy="tell_holdout_loss"),
    )
)
COUNTS_OF_TASKS = Listing(
    Row(
        (
            Field("task", TASK, ""),
            Field("questions", Count(1, QUESTIONS_OF_A_TASK), ""),
            Field("right", Count(0, QUESTIONS_OF_A_TASK), ""),
            Field("unreadable", Either((NULL, Count(0, QUESTIONS_OF_A_TASK))), ""),
        )
    ),
    0,
    TASKS,
)
PROGRESS = Field(
    "progress",
    Listing(
        Row(
            (
                Field("phase", Word(get_args(Phase)), ""),
                Field("tokens", Count(0, TOKENS), "", private=NONE),
                Field("samples", Count(0, DOCUMENTS), "", private=NONE),
                Field("round", Either((NULL, Count(0, ROUNDS))), ""),
                Field("client", Either((NULL, Count(0, CLIENTS - 1))), ""),
            )
        ),
        0,
        ROWS,
    ),
    "the steps and batches worked on",
    False,
)
SCORE = Row(
    (
        Field("loss_sum", Real(0, LARGE), ""),
        Field("correct", Count(0, TOKENS), ""),
        Field("num_targets", Count(1, TOKENS), ""),
    )
)
ANSWERS: dict[str, Record] = {
    "meet": Record(
        (
            Field("name", CLIENT, "the client's name; that of its key counts"),
            Field("version", VERSION, "the version of fedloom that it runs"),
            Field("base", HASH, "the hash of its base model, which must be the server's"),
            Field("documents", HASH, "a keyed hash of its blocks: tells that they are the same as before, no more"),
            Field(
                "train_documents",
                Count(0, DOCUMENTS),
                "documents to train on; in a private run, and so their blocks, the rows there are, or values of its"
                " column, whatever they say",
                policy="min_documents",
            ),
            Field(
                "holdout_documents",
                Count(0, DOCUMENTS),
                "documents held out",
                policy="min_holdout_documents",
                private=NONE,
            ),
            Field("blocks", Count(0, DOCUMENTS), "blocks to train on"),
            Field("tokens", Count(0, TOKENS), "tokens to train on", policy="min_tokens", private=NONE),
            Field("holdout_blocks", Count(0, DOCUMENTS), "blocks held out", private=NONE),
            Field("holdout_tokens", Count(0, TOKENS), "tokens held out", private=NONE),
            Field("shared_blocks", Count(0, DOCUMENTS), "blocks to train on that are also held out", private=NONE),
            Field("dropped", Count(0, DOCUMENTS), "documents left out as near copies of held-out ones", private=NONE),
            Field("leaks", Count(0, DOCUMENTS), "near copies of held-out documents that were kept", private=NONE),
            Field("tasks", Count(0, TASKS), "tasks of its own that it may be asked", policy="tell_tasks", private=NONE),
            Field(
                "noise_multiplier",
                Either((NULL, Real(0, MOST_NOISE, above=True))),
                "in a private run, its noise in units of `privacy.max_norm`: the recipe's, or its owner's where that is"
                " more",
                False,
                policy="privacy",
            ),
            Field(
                "weighs",
                Word(MEASURES),
                "of a branch, which answers for clients of its own: the measure by which it weighs them, which must be"
                " the server's",
                False,
            ),
            PROGRESS,
        )
    ),
    "evaluate": Record(
        (
            Field(
                "score", Either((NULL, SCORE)), "the score on its hold-out", policy="tell_holdout_loss", private=NULL
            ),
            PROGRESS,
        )
    ),
    "train": Record(
        (
            LAYOUT,
            Field("report", REPORT, "the numbers of the work"),
            Field(
                "own",
                HASH,
                'with `lora_rule = "fedsa"`, a keyed hash of the part of the adapter that stays with the client, the'
                " run and the round: tells that it is the same as before, no more",
                False,
            ),
            PROGRESS,
        )
    ),
    "tasks": Record(
        (
            Field(
                "tasks",
                Either((NULL, COUNTS_OF_TASKS)),
                "the counts of each task of its own, by the adapter; null where they stay with it",
                policy="tell_tasks",
                private=NULL,
            ),
            Field(
                "base",
                Either((NULL, COUNTS_OF_TASKS)),
                "the same by the base model, where it was asked",
                policy="tell_tasks",
                private=NULL,
            ),
        )
    ),
    "keep": Record(
        (
            _loss("before", "the hold-out's loss by the adapter that came", required=False, policy="tell_holdout_loss"),
            _loss("after", "the same by the adapter that it keeps", required=False, policy="tell_holdout_loss"),
        )
    ),
}
"""Messages to the server, by what was asked. That to `train` comes with an array of float32: the weights that may
change."""
PRIVATE_ANSWERS = {do: as_private(record) for do, record in ANSWERS.items()}
"""The same in a run whose recipe has `[privacy]`: nothing but the noised weights depends on what documents say."""

REFUSALS = {
    "documents": "its documents, or tasks of its own, can't be used",
    "model": "it can't have, load or use the base model, or its owner's policy does not allow that",
    "policy": "its owner's policy does not allow it",
    "day": "its owner's limit for a day is reached; it may be asked again later",
    "privacy": "its owner lets no more, or nothing without enough noise, be told of the documents; or all rounds that"
    " this recipe's ε is for were trained",
    "recipe": "its version of fedloom refuses the recipe, or it is a branch that was started with another one",
    "question": "it can't read the question, or a task is not as its recipe says: use the same version on both sides",
    "memory": "it has too little memory",
    "training": "its training came to no finite number",
    "clients": "it is a branch, and too few of its own clients answered",
    "late": "it gave up, because the time for an answer was over, or its clock is ahead of this machine's",
    "journal": "it can't keep its journal or its secret, or it can't keep or find what is its own of an adapter",
    "internal": "it failed in a way that was not foreseen",
}
"""Words by which a client refuses, and what the server makes of each. The reason stays on the client's screen."""
REFUSAL = Record(
    (
        Field("name", CLIENT, "the client's name"),
        Field("refused", Word(tuple(REFUSALS)), "why there is no other answer"),
    )
)
"""Answer to any question, in the place of any other."""


def describe_questions() -> str:
    """Return the fields of every message to a client as Markdown tables."""
    parts = (f"### `{do}`\n\n{_describe(record, skip='recipe.')}" for do, record in QUESTIONS.items())
    return "\n\n".join((*parts, f"### The recipe\n\n{_describe(RECIPE, 'recipe')}"))


def describe_answers() -> str:
    """Return the fields of every message to the server as Markdown tables."""
    records = {**{f"Answer to `{do}`": record for do, record in ANSWERS.items()}, "A refusal": REFUSAL}
    return "\n\n".join(
        f"### {title}\n\n{_describe(record, more={'in a private run': _describe_private})}"
        for title, record in records.items()
    )


def _describe_private(field: Field) -> str:
    """Return what stands in a field's place in a private run; an empty text where that is no other."""
    if field.private:
        return str(field.private)
    inner = field.kind.kind if isinstance(field.kind, Listing) else None
    parts = inner.fields if isinstance(inner, Row) else ()
    return ", ".join(f"`{part.name}` {part.private}" for part in parts if part.private)


def describe_refusals() -> str:
    """Return the words by which clients refuse, and what each means, as a Markdown table."""
    return "\n".join(
        ("| word | the client |", "|---|---|", *(f"| `{word}` | {why} |" for word, why in REFUSALS.items()))
    )


def _describe(
    record: Record, where: str = "", skip: str = " ", more: Mapping[str, Callable[[Field], str]] = MappingProxyType({})
) -> str:
    """Return fields as a Markdown table, with columns of `more` by their heads."""
    rows = [
        [
            f"`{name}`",
            f"{one.kind}{'' if one.required else '; may be left out'}",
            one.meaning,
            ", ".join(f"`{key}`" for key in one.policy.split()),
            *(tell(one) for tell in more.values()),
        ]
        for name, one in record.walk(where)
        if not name.startswith(skip)
    ]
    head = ["field", "kind and bounds", "what it is", "the owner's keys", *more]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join((lines[0], f"|{'---|' * len(head)}", *lines[1:]))
