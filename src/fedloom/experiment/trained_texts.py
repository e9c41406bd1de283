"""Texts that a finished run trained on, read again where they are still what they were."""

from __future__ import annotations

from fedloom.data.documents import load_documents
from fedloom.data.seen_questions import digest_trained
from fedloom.data.splits import documents_needed, split_documents
from fedloom.errors import DataError
from fedloom.model.source import ModelSource
from fedloom.progress import Say
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Record


def digest_documents(recipe: Recipe, plan: Record, source: ModelSource, say: Say) -> frozenset[bytes] | None:
    """Return hashes of the texts that a run trained on; None where they are not at hand, or no longer what they were.

    Those of clients on other machines never are, and of a private run it is not told. `plan` is the run's own, as it is
    on record.
    """
    if not plan["audit"]["overlaps"] or recipe.privacy:
        return None
    say("documents", recipe.data.source)
    wanted = documents_needed(recipe.data)
    try:
        found = load_documents(recipe.documents, recipe.seed, wanted, open_tokenizer=lambda: source.tokenizer)
        same = (found.revision, len(found.documents)) == (plan["data_revision"], plan["documents"])
        splits = split_documents(found, recipe.data, recipe.seed, private=recipe.bounds_documents)
        return digest_trained(splits.clients) if same else None
    except DataError:  # gone since, or out of reach
        return None
