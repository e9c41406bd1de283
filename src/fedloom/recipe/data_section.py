"""Section `data` of a recipe: the documents, what of them is learnt, and how they are split. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from fedloom.recipe.section import MOST, Section
from fedloom.recipe.templates import RowTemplate, parse_template

PARTITION_KEYS: dict[str, tuple[str, ...]] = {
    "iid": (),
    "dirichlet": ("by", "alpha"),
    "natural": ("by",),
    "shard": ("by", "shards_per_client"),
    "linear": (),
    "square": (),
    "exponential": (),
}
"""Keys that each kind of partition needs besides its name."""


class Partition(Section):
    """The split of the documents over the clients, by the partitioners of flwr-datasets."""

    kind: Literal["iid", "dirichlet", "natural", "shard", "linear", "square", "exponential"] = Field(
        "iid", description="the split: even; skewed by label; whole labels; shards of labels; sizes that grow as named"
    )
    by: str | None = Field(None, description="the label column (`dirichlet`, `natural`, `shard`)")
    alpha: float | None = Field(None, gt=0, description="concentration: the smaller, the more skewed (`dirichlet`)")
    shards_per_client: int | None = Field(
        None, ge=1, le=MOST, description="shards of labels that a client gets (`shard`)"
    )

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Partition:
        needed = PARTITION_KEYS[self.kind]
        given = [key for key in ("by", "alpha", "shards_per_client") if getattr(self, key) is not None]
        if missing := [key for key in needed if key not in given]:
            raise ValueError(f'kind "{self.kind}" needs {" and ".join(missing)}')
        if spare := [key for key in given if key not in needed]:
            raise ValueError(f'kind "{self.kind}" does not use {" and ".join(spare)}')
        return self


# A literal can't be made from a table's keys in a way that a type checker reads, so both are written and compared here.
assert set(PARTITION_KEYS) == set(get_args(Partition.model_fields["kind"].annotation))


def _check_template(text: str) -> str:
    if not parse_template(text).columns:
        raise ValueError("names no column: write {instruction} where a row's own text stands")
    return text


TOKENIZERS = "tokenizer"
"""Name of the chat template that a tokenizer brings."""
Template = Annotated[str, AfterValidator(_check_template)]


class Data(Section):
    """The documents, the clients that hold them, and the part that is held out."""

    source: str = Field(
        min_length=1,
        description="hub id, file of rows, folder, `python:stdlib` (its files), or `python:functions` (its functions:"
        " `{prompt}` is signature and docstring, `{completion}` the body, `messages` both)",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    subset: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    files: str = Field("**/*", description="glob inside a folder")
    text: str = Field("text", description="the column that holds the text")
    prompt: Template | None = Field(
        None,
        description="text before an answer, with columns as `{instruction}`; `[[...{input}...]]` is left out where a"
        " column in it is empty",
    )
    completion: Template | None = Field(
        None, description="the answer behind `prompt`, for example `{output}`; both may name lists of messages"
    )
    messages: str | None = Field(
        None,
        description="the column that holds a conversation: a list of messages with `role` and `content`, or `from` and"
        " `value`",
    )
    chat_template: str | None = Field(
        None,
        description="file of a chat template in Jinja, the template itself, or `tokenizer` for the tokenizer's own, as"
        " `messages` have it if left out; with it, `prompt` and `completion` are a question and its answer in a chat",
    )
    system: str | None = Field(None, description="system message of a conversation that has none")
    loss: Literal["completion", "assistant", "all"] | None = Field(
        None,
        description="what is learnt: the (last) answer, every turn of the assistant, or all; if left out, the answer of"
        " `prompt` and `completion`, every turn of `messages`, all of a plain text",
    )
    end: bool | None = Field(
        None,
        description="one end-of-sequence is learnt behind an answer, or behind a text that ends within its block; if"
        " left out, behind answers alone",
    )
    on_bad_row: Literal["skip", "error"] = Field(
        "skip",
        description="treatment of a row or file without a usable text: count it, or stop; a blank text is no bad row",
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="largest share of bad rows among those read; above it a run stops (`skip`)"
    )
    # Above what any model reads: memory is asked for by it.
    max_length: int = Field(128, ge=2, le=2**24, description="tokens in a block")
    window: Literal["truncate", "blocks", "pack"] = Field(
        "truncate",
        description="part of a document that is used: its first block; all its blocks; or its first block, where short"
        " ones of a client share a block in training, and each is learnt as if it stood alone",
    )
    pad_in_loss: bool = Field(
        False, description="padding counted in the loss, and masked in attention; only to repeat programs that did so"
    )
    clients: int = Field(3, ge=1, le=MOST, description="number of clients")
    documents_per_client: int | None = Field(
        None, ge=1, le=MOST, description="a client's documents on average, its own hold-out included; all if left out"
    )
    client_holdout: float = Field(0.2, ge=0, lt=1, description="share of each client's documents, never trained on")
    central_holdout: int = Field(
        100, ge=0, le=MOST, description="documents for the central evaluation, disjoint from every client's"
    )
    partition: Partition = Field(default_factory=Partition, description="the split of the documents over the clients")
    duplicates: Literal["drop", "report"] = Field(
        "drop",
        description="treatment of a training document that is also held out: leave it out, or only count it; with"
        " `[privacy]` it is the client's hold-out that loses it, and of equal documents to train on all but one go",
    )
    near_duplicate: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity from which two documents count as copies"
    )

    # No key of its own: the section `privacy` names it, and what reads documents is told of this section alone.
    _unit: str | None = PrivateAttr(None)

    def with_unit(self, column: str | None) -> Data:
        """Return the section with a column whose values are protected whole."""
        told = self.model_copy()
        told._unit = column
        return told

    @property
    def unit(self) -> str | None:
        """Return the column whose values are protected whole; None where there is none."""
        return self._unit

    @property
    def is_plain(self) -> bool:
        """Return whether a document is one column of text, all of which is learnt."""
        return self.prompt is None and self.messages is None

    @property
    def is_chat(self) -> bool:
        """Return whether documents are conversations: lists of messages, as far as a recipe says."""
        return self.messages is not None or (self.completion is not None and self.chat_template is not None)

    @property
    def own_template(self) -> str | None:
        """Return the chat template that the recipe brings, or None for the tokenizer's."""
        return None if self.chat_template == TOKENIZERS else self.chat_template

    @property
    def learns(self) -> str:
        """Return what is learnt, as `loss` says it."""
        if self.loss is not None:
            return self.loss
        return "assistant" if self.messages else "completion" if self.completion else "all"

    @property
    def ends(self) -> bool:
        """Return whether an end-of-sequence is learnt."""
        return self.end if self.end is not None else self.learns != "all"

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """Return each column that is read, behind the key that names it; without that of a partition."""
        if self.is_plain:
            return (("data.text", self.text),)
        if self.messages is not None:
            return (("data.messages", self.messages),)
        return tuple((key, column) for key, template in self._templates for column in template.columns)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Return those of the columns without which a row has no text."""
        if self.is_plain or self.messages is not None:
            return tuple(column for _, column in self.columns)
        return tuple(column for _, template in self._templates for column in template.needed)

    @property
    def _templates(self) -> tuple[tuple[str, RowTemplate], ...]:
        """Return the templates of questions and answers, behind the keys that hold them."""
        texts = (("data.prompt", self.prompt), ("data.completion", self.completion))
        return tuple((key, parse_template(text)) for key, text in texts if text)
