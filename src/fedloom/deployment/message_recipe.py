"""Part of a recipe that a server tells its clients: which keys, and the bounds of each.

Bounds are those of the recipe's sections, and a lower upper one where a section's is too high: memory is asked for by
these numbers, on a machine that is not the server's. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fedloom.deployment.message_kinds import (
    Count,
    Either,
    Field,
    Flag,
    Kind,
    Listing,
    Pattern,
    Real,
    Record,
    Table,
    Word,
    refused,
)
from fedloom.recipe.data_section import Data
from fedloom.recipe.privacy_section import CLIENT, Privacy
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.section import Section
from fedloom.recipe.sections import (
    FEDERATED_METHODS,
    Adapter,
    Evaluation,
    Federation,
    Model,
    Personalise,
    QuantizationOptions,
)
from fedloom.recipe.training_section import OPTIMIZER_DEFAULTS, Optimizer, Training

ROUNDS, CLIENTS = 100_000, 100_000
LAYER = Pattern("layer's name: up to 300 letters, digits, `.`, `_`, `-`", re.compile(r"[\w.-]{1,300}", re.ASCII))
PLAIN = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,200}")
COLUMN = Pattern("column's name: up to 200 characters, none of them a control", PLAIN)
# A whole client is protected by noise of the server's, which its clients would have to believe in.
UNIT = Pattern(
    "`document`, or a column's name: up to 200 characters, none of them a control, but not `client`",
    re.compile(rf"(?!{CLIENT}$){PLAIN.pattern}"),
)
SOURCE = Pattern("`random:SHAPE`, or a name that the owner's policy lists, up to 200 characters", PLAIN)
REVISION = Pattern(
    "revision: up to 200 letters, digits, `.`, `_`, `-`, `/`, without `..`",
    re.compile(r"(?!.*\.\.)\w[\w./-]{0,199}", re.ASCII),
)
TEMPLATE = Pattern("template of rows: up to 20,000 characters", re.compile(r"[^\x00]{1,20000}"))
CHAT_TEMPLATE = Pattern("chat template in Jinja: up to 50,000 characters", re.compile(r"[^\x00]{1,50000}"))
RECIPE_NAME = Pattern(
    "name: up to 100 letters, digits, `.`, `_`, `-`", re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
)
DEVICE = Pattern("`auto`, `cpu`, `cuda` or `cuda:N`", re.compile(r"auto|cpu|cuda(:\d{1,2})?", re.ASCII))
# An adapter that works behind some words alone (aLoRA) is trained by the documents that have them, and by no other: it
# would tell whether there are any, and one document could be trained on alone.
OPTION_NAME = Pattern(
    "PEFT's name of a setting, but none of a path, a tokenizer, a text, words that invoke the adapter or a replication"
    " of layers",
    re.compile(r"(?!.*(?:path|tokenizer|text|invocation|replication))[a-z][a-z0-9_]{0,99}"),
)


class Option:
    """Setting of PEFT's, as JSON has it: no texts but names, no numbers that ask for much memory."""

    least, most, most_listed = -(2**16), 2**16, 2**20
    real = Real(-1e6, 1e6)

    def read(self, told: Any, where: str) -> Any:
        listed = told if type(told) is list else [*told.values(), *told] if type(told) is dict else None
        if listed is None:
            return self._read_one(told, where, self.most)
        if len(listed) > 4096:
            raise refused(where, "list of at most 4,096")
        for one in listed:
            self._read_one(one, where, self.most_listed)
        return told

    def _read_one(self, told: Any, where: str, most: int) -> Any:
        if told is None or type(told) is bool:
            return told
        if type(told) is str:
            return LAYER.read(told, where)
        return Count(self.least, most).read(told, where) if type(told) is int else self.real.read(told, where)

    def __str__(self) -> str:
        return (
            f"truth value, null, a name, a whole number from {self.least:,} to {self.most:,} (in a list or table to"
            f" {self.most_listed:,}), a {self.real}, or a list or table of up to 4,096 of these"
        )


def _told(
    section: type[Section], most: Mapping[str, float | Kind | None], policy: Mapping[str, str] | None = None
) -> tuple[Field, ...]:
    """Return the keys of a section that a server tells, each with the most that it may be or with its kind.

    None stands where the section says it all: truth values, words, numbers with both bounds.
    """
    keys = {name: section.model_fields[name] for name in most}
    kinds = {name: _kind(keys[name], given) if given is None or isinstance(given, int | float) else given
             for name, given in most.items()}  # fmt: skip
    return tuple(
        Field(name, kind, keys[name].description or "", required=False, policy=(policy or {}).get(name, ""))
        for name, kind in kinds.items()
    )


def _kind(key: FieldInfo, most: float | None) -> Kind:
    """Return the kind of a key as its section has it, with an upper bound where that has none, or a higher one."""
    annotation = key.annotation
    if get_origin(annotation) in (UnionType, Union):
        (annotation,) = (one for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is Literal:
        return Word(get_args(annotation))
    if annotation is bool:
        return Flag()
    bounds = {
        name: getattr(one, name) for one in key.metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)
    }
    uppers = [one for one in (bounds.get("le", bounds.get("lt")), most) if one is not None]
    assert uppers, "a number that travels without an upper bound"
    upper = min(uppers)
    if annotation is int:
        return Count(bounds["ge"], int(upper))
    assert annotation is float, f"a key that travels is of no known kind: {annotation}"
    return Real(bounds["gt"] if "gt" in bounds else bounds["ge"], upper, above="gt" in bounds, below="lt" in bounds)


MODEL = _told(
    Model,
    {
        "source": SOURCE,
        "revision": REVISION,
        "weights_revision": REVISION,
        "dtype": Word(("auto", "float32", "bfloat16")),  # what travels is float32
        "quantization": None,
        "quantization_options": Record(
            _told(QuantizationOptions, {"type": None, "compute_dtype": None, "double": None})
        ),
        "device": DEVICE,
    },
    {"source": "models"},
)
ADAPTER = _told(
    Adapter,
    {
        "method": Word(tuple(FEDERATED_METHODS)),
        "rank": None,
        "alpha": 1e6,
        "rslora": None,
        "dora": None,
        "dropout": None,
        "targets": Either((Word(("all-linear",)), Listing(LAYER, 1, 1000))),
        "options": Table(OPTION_NAME, Option(), 100),
    },
    {
        "method": "methods",
        "rank": "max_trained",
        "targets": "max_trained",
        "options": "methods train_embedding max_trained",
    },
)
DATA = _told(
    Data,
    {
        "text": COLUMN,
        "prompt": TEMPLATE,
        "completion": TEMPLATE,
        "messages": COLUMN,
        "chat_template": CHAT_TEMPLATE,
        "system": TEMPLATE,
        "loss": None,
        "end": None,
        "on_bad_row": None,
        "max_bad_fraction": None,
        "max_length": 2**17,
        "window": None,
        "pad_in_loss": None,
        "clients": CLIENTS,
        "documents_per_client": 10**9,
        "client_holdout": None,
        "duplicates": None,
        "near_duplicate": None,
    },
    {
        "text": "text",
        "prompt": "columns",
        "completion": "columns",
        "messages": "columns",
        "chat_template": "chat_template",
        "max_length": "min_length max_length",
        "window": "windows",
        "documents_per_client": "min_documents",
        "client_holdout": "min_holdout_documents",
    },
)
OPTIMIZER = Record(
    _told(
        Optimizer,
        {"kind": None, "betas": Listing(Real(0, 1, below=True), 2, 2), "eps": 1.0, "momentum": None},
    )
)
TRAINING = Record(
    _told(
        Training,
        {
            "engine": None,
            "clients_at_once": 4096,
            "gradient_checkpointing": None,
            "cuda_graph": None,
            "epochs": 1000,
            "max_steps": 10**6,
            "batch_size": 4096,
            "gradient_accumulation": 4096,
            "learning_rate": None,
            "learning_rate_end": None,
            "schedule": None,
            "schedule_scope": None,
            "warmup": 1e9,
            "optimizer": Either((Word(tuple(OPTIMIZER_DEFAULTS)), OPTIMIZER)),
            "optimizer_state": Word(("reset",)),  # none travels
            "weight_decay": None,
            "max_gradient_norm": 1e12,
            "proximal_mu": 1e6,
            "proximal_schedule": None,
        },
        {
            "epochs": "max_epochs",
            "max_steps": "min_documents",
            "batch_size": "min_batch_size",
            "gradient_accumulation": "min_batch_size",
        },
    )
)
FEDERATION = _told(
    Federation,
    {
        "rounds": ROUNDS,
        "lora_rule": None,
        "client_ranks": Listing(Count(1, 4096), 1, CLIENTS),
    },
    {"rounds": "max_rounds", "lora_rule": "lora_rules"},
)
PRIVACY = _told(
    Privacy,
    {"unit": UNIT, "epsilon": None, "noise_multiplier": None, "delta": None, "max_norm": None, "noise": None},
    dict.fromkeys(("unit", "epsilon", "noise_multiplier", "delta", "noise"), "privacy"),
)
RECIPE = Record(
    (
        *_told(Recipe, {"name": RECIPE_NAME, "seed": 2**63 - 1}),
        Field("model", Record(MODEL), "the base model"),
        Field("adapter", Record(ADAPTER), "the adapter", required=False),
        Field("data", Record(DATA), "the use of the client's documents", required=False),
        Field("training", TRAINING, "the work of a round", required=False),
        Field("federation", Record(FEDERATION), "the rounds", required=False),
        Field("evaluation", Record(_told(Evaluation, {"batch_size": 4096})), "the scoring", required=False),
        Field(
            "personalise",
            Record(_told(Personalise, {"epochs": 1000}, {"epochs": "max_epochs"})),
            "the adapter of its own that each client goes on to",
            required=False,
        ),
        Field("privacy", Record(PRIVACY), "the bound on what is told of a document", required=False),
    )
)
"""Keys of a recipe that a server tells."""
NEVER_TOLD = {
    "": ("description", "baselines", "contributions"),
    "model": ("convert", "device_map"),
    "data": ("source", "revision", "subset", "split", "files", "partition", "central_holdout"),
    "federation": (
        *("fraction", "min_clients", "max_lost_clients", "round_deadline", "on_quorum_lost", "strategy", "early_stop"),
        *("max_share", "max_change", "max_client_blocks", "keep_every", "max_bytes"),
    ),
    "training": ("devices",),
    "evaluation": ("clients", "every", "tasks", "tasks_every"),
    "report": ("samples",),
    "privacy": ("norm_quantile", "norm_rate"),
}
"""Keys of a recipe by their section that are the server's own, or the client's: sent all the same, they are refused."""
