"""Splits of the documents: first the central hold-out, then the clients' parts, then each client's own hold-out.

An audit proves them disjoint. The program behind the published experiment took its evaluation rows from the head of the
same split that the clients drew from: 9.9 % of them could be trained on. Here a document can't stand on both sides, and
copies of it, exact or near, are counted and dropped from training.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fedloom.data.copies import HeldOut
from fedloom.data.documents import Document, Documents, normalise
from fedloom.errors import DataError
from fedloom.seeds import derive_seed
from fedloom.text import count

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data, Partition

FEW_HELD_OUT = 2
"""Texts to hold out at least where a share of all is as many: of one, a loss is that document's own."""
HOLDS_OUT = "by keyed hash"
"""Way of choosing what a client holds out, on record in a run: one that began with another can't go on."""


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
    given_up: tuple[int, ...] = ()
    """Held-out documents taken from each client because somebody trains on a copy, in a private run."""

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


def _settings_for(documents: int, data: Data) -> str:
    """Return settings for which so few documents are enough, a fifth of them for the central hold-out at most."""
    central = min(data.central_holdout, documents // 5)
    each = (documents - central) // data.clients
    if not each:
        return "bring more of them, or lower data.clients"
    asked = {"central_holdout": (data.central_holdout, central)}
    if data.documents_per_client is not None:
        asked["documents_per_client"] = data.documents_per_client, min(each, data.documents_per_client)
    lower = [f"data.{key} = {less}" for key, (value, less) in asked.items() if less < value]
    return f"they are enough for {' and '.join(lower)}"


def split_documents(found: Documents, data: Data, seed: int, *, private: bool = False) -> Splits:
    """Give each document to one place: the central hold-out, a client's training or a client's hold-out.

    With `private`, none of a client's documents has a part in where another one of its goes.

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
            mend=_settings_for(len(documents), data),
        )
    central, pool = documents[: data.central_holdout], documents[data.central_holdout :]
    clients = tuple(
        hold_out(part, data.client_holdout, holdout_key(seed), strictly=private)
        for part in partition_documents(pool, data.partition, data.clients, seed)
    )
    clients, audit = audit_splits(
        central, clients, data.near_duplicate, drop=data.duplicates == "drop", private=private
    )
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


def holdout_key(seed: int) -> bytes:
    """Return the key by which a run's seed chooses what is held out, the same for all clients."""
    return hashlib.sha256(f"{seed}/client-holdout".encode()).digest()


def hold_out(documents: Sequence[Document], share: float, key: bytes, *, strictly: bool = False) -> ClientDocuments:
    """Set a share of a client's documents aside, each by a keyed hash of its own text, or of its unit's name.

    So one document more or less moves itself alone, copies of a text are on one side as a unit is, and how many are
    held out is a matter of chance (binomial), `strictly` even none or all. Otherwise chance has bounds, which only
    clients of few documents meet: half the number that the share makes and half as many again, two at least where it
    makes as many, and one on each side. Those nearest to the limit change sides then.
    """
    places = [_place(document, key) for document in documents]
    limit, order = share, sorted(set(places))
    if order and share and not strictly:
        wanted = max(1, round(share * len(order)))
        most = min(wanted + wanted // 2, len(order) - 1)
        least = min(max(wanted - wanted // 2, min(wanted, FEW_HELD_OUT)), most)
        limit = min(max(share, order[least]), order[most])
    train, holdout = (
        tuple(document for document, place in zip(documents, places, strict=True) if (place < limit) == held)
        for held in (False, True)
    )
    return ClientDocuments(train, holdout)


def _place(document: Document, key: bytes) -> float:
    """Return a number from [0, 1) that comes from a document's text or unit alone, and that the key alone tells."""
    digest = hmac.digest(key, (document.unit or normalise(document.text)).encode(), "sha256")
    return int.from_bytes(digest[:6], "big") / 2**48


def audit_splits(
    central: Sequence[Document],
    clients: Sequence[ClientDocuments],
    near_duplicate: float,
    *,
    drop: bool,
    private: bool = False,
) -> tuple[tuple[ClientDocuments, ...], Audit]:
    """Count documents that have a copy on another side; with `drop`, take copies of held-out ones out of training.

    Exact copies have the same text after Unicode NFC and with white space folded. Near copies have a Jaccard similarity
    of word 5-grams of at least `near_duplicate`; MinHash (Broder 1997) finds candidates and the true similarity
    decides. A document that has both counts as exact. The same prompt with another answer is a leak as well, and counts
    where there is no copy. Copies within one side (two clients that train on the same file)
    are no leak and are not looked for.

    With `private`, a client's hold-out loses what is trained on, and training what is held out centrally alone: one
    document that is held out would else decide over all its copies that are trained on.
    """
    held_out = HeldOut(near_duplicate)
    held_out.add("central", central)
    between_holdouts = Counter(held_out.find(document)["central"] for part in clients for document in part.holdout)
    held_out.add("holdout", (document for part in clients for document in part.holdout))
    kept_parts, leaks = [], 0
    by_central, by_holdout = Counter[str](), Counter[str]()
    for part in clients:
        kept = []
        for document in part.train:
            copies = held_out.find(document, remember=private)
            by_central[copies["central"]] += 1
            by_holdout[copies["holdout"]] += 1
            if not (drop and (copies["central"] if private else any(copies.values()))):
                kept.append(document)
                leaks += not drop and any(copies.values())
        kept_parts.append(tuple(kept))
    holdouts = [
        tuple(document for document in part.holdout if not (drop and private and held_out.was_found(document)))
        for part in clients
    ]
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
    dropped, given_up = (
        tuple(len(getattr(part, side)) - len(kept) for part, kept in zip(clients, left, strict=True))
        for side, left in (("train", kept_parts), ("holdout", holdouts))
    )
    audit = Audit(len(central), num_train, num_holdout, near_duplicate, overlaps, dropped, leaks, given_up)
    return tuple(map(ClientDocuments, kept_parts, holdouts)), audit
