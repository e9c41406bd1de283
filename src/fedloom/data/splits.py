"""Splits of the documents: first the central hold-out, then the clients' parts, then each client's own hold-out.

An audit proves them disjoint. The program behind the published experiment took its evaluation rows from the head of the
same split that the clients drew from: 9.9 % of them could be trained on. Here a document can't stand on both sides, and
copies of it, exact or near, are counted and dropped from training.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fedloom.data.documents import Document, Documents
from fedloom.errors import DataError
from fedloom.seeds import derive_seed
from fedloom.text import count

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data, Partition

NUM_PERMUTATIONS = 128
"""Hash functions of a MinHash."""
SHINGLE_WORDS = 5
"""Words in a run of words that documents are compared by."""
COMPARED_CHARACTERS = 200_000
"""Characters at a document's head by which near duplicates are found; comparing 10 million would take gigabytes."""
LONGEST_MEAN_WORD = 12
"""Characters; where words are longer on average, they are sentences of a script without spaces."""


@dataclass(frozen=True)
class ClientDocuments:
    """Documents of one client: those it trains on, and its own hold-out."""

    train: tuple[Document, ...]
    holdout: tuple[Document, ...]


@dataclass(frozen=True)
class Overlap:
    """Numbers of documents of `side` that have an exact copy, or only a near one, in `other`."""

    side: str
    other: str
    exact: int
    near: int
    prompt: int = 0
    """Documents that are no copy, and that ask what a document of the other side asks."""


@dataclass(frozen=True)
class Audit:
    """Result of the search for copies: documents compared, copies found, and documents that clients lost by it."""

    central: int
    train: int
    holdout: int
    near_duplicate: float
    """Jaccard similarity from which two documents count as copies."""
    overlaps: tuple[Overlap, ...]
    dropped: tuple[int, ...]
    """Training documents taken from each client because a copy of them is held out."""
    leaks: int
    """Training documents that stay although a copy of them is held out: 0 unless copies are only reported."""

    def to_json(self) -> dict[str, Any]:
        """Return the audit as plan.json records it."""
        return asdict(self)


@dataclass(frozen=True)
class Splits:
    """Disjoint documents for the central evaluation and for every client."""

    central: tuple[Document, ...]
    clients: tuple[ClientDocuments, ...]
    audit: Audit


def documents_needed(data: Data) -> int | None:
    """Return the number of documents that a recipe asks for; None if it takes all there are."""
    if data.documents_per_client is None:
        return None
    return data.central_holdout + data.clients * data.documents_per_client


def split_documents(found: Documents, data: Data, seed: int) -> Splits:
    """Give each document to one place: the central hold-out, a client's training or a client's hold-out.

    Raises:
        DataError: there are fewer documents than the recipe asks for, or the labels do not allow its partition.
    """
    documents = found.documents
    needed = documents_needed(data) or data.central_holdout + data.clients
    if len(documents) < needed:
        skipped = found.explain_skipped()
        raise DataError(
            f"{count(len(documents), 'usable document')}, but the recipe asks for {needed}"
            f" ({data.central_holdout} central + {data.clients} clients × {data.documents_per_client or 'at least 1'})"
            + (f"; {skipped}" if skipped else ""),
            where=f'data.source = "{data.source}"',
            mend=f"lower data.{'documents_per_client' if data.documents_per_client else 'clients'}"
            " or data.central_holdout",
        )
    central, pool = documents[: data.central_holdout], documents[data.central_holdout :]
    clients = tuple(
        hold_out(part, data.client_holdout, derive_seed(seed, "client-holdout", client=client))
        for client, part in enumerate(partition_documents(pool, data.partition, data.clients, seed))
    )
    clients, audit = audit_splits(central, clients, data.near_duplicate, drop=data.duplicates == "drop")
    return Splits(central, clients, audit)


def partition_documents(
    documents: Sequence[Document], partition: Partition, clients: int, seed: int
) -> list[list[Document]]:
    """Split documents over the clients as the partitioner of that kind in flwr-datasets does.

    Raises:
        DataError: the labels do not allow such a partition.
    """
    if partition.kind == "iid":
        # The same result as IidPartitioner's, whose import takes seconds: it brings plotting libraries along.
        share, rest = divmod(len(documents), clients)
        bounds = [client * share + min(client, rest) for client in range(clients + 1)]
        return [list(documents[start:end]) for start, end in pairwise(bounds)]
    import datasets

    labels = [document.label or "" for document in documents]
    if partition.kind == "natural":
        labels = _labels_to_clients(labels, partition, clients)
    # 32 bits are part of what a recipe's seed means: another width would give every recipe another partition.
    partitioner = _PARTITIONERS[partition.kind](partition, clients, derive_seed(seed, "partition") % 2**32)
    # Indices and labels travel through flwr-datasets, never the texts.
    partitioner.dataset = datasets.Dataset.from_dict({"index": range(len(documents)), "label": labels})
    try:
        # Libraries warn about themselves here, and the natural partitioner's progress bar has no switch.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            parts = [partitioner.load_partition(client)["index"] for client in range(clients)]
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        labelled = f" with {count(len(set(labels)), 'label')}" if partition.by else ""
        raise DataError(
            f"these {count(len(documents), 'document')}{labelled} can't be partitioned: {error}",
            where=f'data.partition = {{kind = "{partition.kind}"}}',
            mend="use more documents, fewer clients, another kind"
            + (", or a larger data.partition.alpha" if partition.kind == "dirichlet" else ""),
        ) from error
    return [[documents[index] for index in part] for part in parts]


def _labels_to_clients(labels: list[str], partition: Partition, clients: int) -> list[str]:
    """Replace each label by the client that gets it: the largest label first, each to the client with the fewest.

    Raises:
        DataError: there are fewer labels than clients.
    """
    counts = Counter(labels)
    if len(counts) < clients:
        raise DataError(
            f'column "{partition.by}" has {len(counts)} different values for {clients} clients',
            where='data.partition = {kind = "natural"}',
            mend="lower data.clients or partition by another column",
        )
    sizes = [0] * clients
    owner = {}
    # Ties are broken by the label itself, so that the order of the documents has no part in it.
    for label, size in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        owner[label] = sizes.index(min(sizes))
        sizes[owner[label]] += size
    return [str(owner[label]) for label in labels]


def _partitioner(name: str, **arguments: Any) -> Any:
    from flwr_datasets import partitioner

    return getattr(partitioner, name)(**arguments)


_PARTITIONERS: dict[str, Callable[[Partition, int, int], Any]] = {
    "linear": lambda _, clients, seed: _partitioner("LinearPartitioner", num_partitions=clients),
    "square": lambda _, clients, seed: _partitioner("SquarePartitioner", num_partitions=clients),
    "exponential": lambda _, clients, seed: _partitioner("ExponentialPartitioner", num_partitions=clients),
    "natural": lambda _, clients, seed: _partitioner("NaturalIdPartitioner", partition_by="label"),
    "dirichlet": lambda partition, clients, seed: _partitioner(
        "DirichletPartitioner",
        num_partitions=clients,
        partition_by="label",
        alpha=partition.alpha,
        min_partition_size=1,
        seed=seed,
    ),
    "shard": lambda partition, clients, seed: _partitioner(
        "ShardPartitioner",
        num_partitions=clients,
        partition_by="label",
        num_shards_per_partition=partition.shards_per_client,
        seed=seed,
    ),
}


def hold_out(documents: list[Document], share: float, seed: int) -> ClientDocuments:
    """Set a share of a client's documents aside; of two documents or more at least one, unless the share is 0."""
    shuffled = random.Random(seed).sample(documents, len(documents))
    count = round(len(shuffled) * share)
    if share > 0 and len(shuffled) > 1:
        count = min(max(count, 1), len(shuffled) - 1)
    return ClientDocuments(train=tuple(shuffled[count:]), holdout=tuple(shuffled[:count]))


def audit_splits(
    central: Sequence[Document], clients: Sequence[ClientDocuments], near_duplicate: float, *, drop: bool
) -> tuple[tuple[ClientDocuments, ...], Audit]:
    """Count documents that have a copy on another side; with `drop`, take copies of held-out ones out of training.

    Exact copies have the same text after Unicode NFC and with white space folded. Near copies have a Jaccard similarity
    of word 5-grams of at least `near_duplicate`; MinHash (Broder 1997) finds candidates and the true similarity
    decides. A document that has both counts as exact. The same prompt with another answer is a leak as well, and counts
    where there is no copy. Copies within one side (two clients that train on the same file)
    are no leak and are not looked for.
    """
    held_out = _HeldOut(near_duplicate)
    held_out.add("central", central)
    between_holdouts = Counter(held_out.find(document)["central"] for part in clients for document in part.holdout)
    held_out.add("holdout", (document for part in clients for document in part.holdout))
    cleaned, dropped, leaks = [], [], 0
    by_central, by_holdout = Counter[str](), Counter[str]()
    for part in clients:
        kept = []
        for document in part.train:
            copies = held_out.find(document)
            by_central[copies["central"]] += 1
            by_holdout[copies["holdout"]] += 1
            if not (drop and any(copies.values())):
                kept.append(document)
                leaks += any(copies.values())
        dropped.append(len(part.train) - len(kept))
        cleaned.append(replace(part, train=tuple(kept)))
    overlaps = tuple(
        Overlap(side, other, exact=counts["exact"], near=counts["near"], prompt=counts["prompt"])
        for side, other, counts in (
            ("train", "central", by_central),
            ("train", "holdout", by_holdout),
            ("holdout", "central", between_holdouts),
        )
    )
    num_train = sum(len(part.train) for part in clients)
    num_holdout = sum(len(part.holdout) for part in clients)
    audit = Audit(len(central), num_train, num_holdout, near_duplicate, overlaps, tuple(dropped), leaks)
    return tuple(cleaned), audit


class _HeldOut:
    """An index of the held-out documents of both sides, to find copies among them."""

    def __init__(self, near_duplicate: float) -> None:
        from datasketch import MinHashLSH

        self._near_duplicate = near_duplicate
        self._texts: dict[str, set[str]] = {"central": set(), "holdout": set()}
        self._prompts: dict[str, set[str]] = {"central": set(), "holdout": set()}
        self._shingles: dict[tuple[str, int], set[int]] = {}
        # Candidates are checked exactly, so the index may propose too many but must miss none: it looks well below the
        # threshold (at the threshold itself it would miss one in ten), and its weights (false positives, false
        # negatives) count a missed copy nine times.
        self._index = MinHashLSH(threshold=0.75 * near_duplicate, num_perm=NUM_PERMUTATIONS, weights=(0.1, 0.9))

    def add(self, side: str, documents: Iterable[Document]) -> None:
        """Add documents to a side, `central` or `holdout`; exact copies within it are kept once."""
        for document in documents:
            text = normalise(document.text)
            self._prompts[side].add(normalise(document.prompt))
            if text not in self._texts[side]:
                self._texts[side].add(text)
                key = (side, len(self._shingles))
                self._shingles[key] = _shingles(text)
                self._index.insert(key, _min_hash(self._shingles[key]))

    def find(self, document: Document) -> dict[str, str]:
        """Return the kind of copy that each side has of a document: "exact", "near", "prompt" or ""."""
        text, prompt = normalise(document.text), normalise(document.prompt)
        shingles = _shingles(text)
        candidates = self._index.query(_min_hash(shingles))
        near = {side for side, key in candidates if self._similarity(shingles, (side, key)) >= self._near_duplicate}
        asked = {side for side, prompts in self._prompts.items() if prompt and prompt in prompts}
        return {
            side: "exact" if text in texts else "near" if side in near else "prompt" if side in asked else ""
            for side, texts in self._texts.items()
        }

    def _similarity(self, shingles: set[int], key: tuple[str, int]) -> float:
        """Return the Jaccard similarity: the size of the intersection over that of the union."""
        other = self._shingles[key]
        return len(shingles & other) / len(shingles | other)


def normalise(text: str) -> str:
    """Return a text in Unicode NFC with white space folded: what two exact copies have alike."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _shingles(text: str) -> set[int]:
    """Return hashes of every run of words, or of characters in a script without spaces between words."""
    text = text[:COMPARED_CHARACTERS]
    words = re.findall(r"\w+|[^\w\s]", text)
    if len(text) > LONGEST_MEAN_WORD * len(words):
        words = list(text)
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    # Not hash(): Python salts it, so the candidates would differ from process to process.
    return {zlib.crc32(" ".join(words[start : start + SHINGLE_WORDS]).encode()) for start in starts}


def _min_hash(shingles: set[int]) -> Any:
    from datasketch import MinHash

    # Shingles are 32-bit hashes already: hashed again by SHA-1, as is the default, they would cost more and gain
    # nothing.
    sketch = MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=int)
    sketch.update_batch(shingles)
    return sketch
