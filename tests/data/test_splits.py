"""Hold-out first, then partitions; and the audit finds exactly the copies that were planted."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import datasketch
import pytest
from datasketch import MinHash
from support.tiny import make_recipe

from fedloom.data import copies
from fedloom.data.documents import Document, Documents, load_documents
from fedloom.data.formats import Form
from fedloom.data.splits import (
    Audit,
    ClientDocuments,
    Splits,
    _place,
    audit_splits,
    documents_needed,
    hold_out,
    holdout_key,
    partition_documents,
    split_documents,
)
from fedloom.errors import DataError

# Of datasets, when flwr-datasets sorts for shards.
pytestmark = pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning")

PARTITIONS = {
    "iid": {"kind": "iid"},
    "dirichlet": {"kind": "dirichlet", "by": "label", "alpha": 0.5},
    "natural": {"kind": "natural", "by": "label"},
    "shard": {"kind": "shard", "by": "label", "shards_per_client": 2},
    "linear": {"kind": "linear"},
    "square": {"kind": "square"},
    "exponential": {"kind": "exponential"},
}

SIZES = {
    "iid": [20, 20, 20],
    "natural": [24, 24, 12],
    "shard": [20, 20, 20],
    "linear": [10, 20, 30],
    "square": [4, 17, 39],
    "exponential": [5, 14, 41],
}
"""What 60 documents with 5 labels make for 3 clients: 1:2:3, 1:4:9 and e:e²:e³, rest to the last."""

SIDES = ["train", "holdout", "central"]

every_partition = pytest.mark.parametrize("kind", PARTITIONS)


def make_text(name: object, num_words: int = 8) -> str:
    """Words that stand in no other text."""
    return " ".join(f"{name}w{word}" for word in range(num_words))


def make_documents(count: int, labels: int = 5, name: str = "d", num_words: int = 8) -> tuple[Document, ...]:
    return tuple(
        Document(make_text(f"{name}{number}", num_words), f"{name}{number}", f"label {number % labels}")
        for number in range(count)
    )


def split(documents: Sequence[Document], seed: int = 7, **data: object) -> Splits:
    section = make_recipe(data={"documents_per_client": None, "central_holdout": 6, **data}).data
    return split_documents(Documents(tuple(documents), {}, "planted", "none"), section, seed)


def sizes(splits: Splits) -> list[int]:
    return [len(part.train) + len(part.holdout) for part in splits.clients]


def everything(splits: Splits) -> list[str]:
    documents = [*splits.central, *(document for part in splits.clients for document in (*part.train, *part.holdout))]
    return [document.origin for document in documents]


def found(audit: Audit) -> dict[str, tuple[int, int]]:
    """Exact and near copies of each pair of sides where there are any."""
    counts = {f"{overlap.side}/{overlap.other}": (overlap.exact, overlap.near) for overlap in audit.overlaps}
    assert list(counts) == ["train/central", "train/holdout", "holdout/central"]
    return {sides: count for sides, count in counts.items() if any(count)}


def audit(
    train: Sequence[Document] = (),
    holdout: Sequence[Document] = (),
    central: Sequence[Document] = (),
    *,
    near_duplicate: float = 0.8,
    drop: bool = True,
) -> tuple[tuple[Document, ...], Audit]:
    """What is left of the training documents of a single client, and the audit."""
    client = ClientDocuments(tuple(train), tuple(holdout))
    (cleaned,), audited = audit_splits(central, [client], near_duplicate, drop=drop)
    assert cleaned.holdout == client.holdout
    return cleaned.train, audited


def respace(text: str) -> str:
    return "\r\n\t" + text.replace(" ", " \n  ") + "\u00a0 "


def reword(text: str, num_words: int = 2) -> str:
    """The same text with a few words changed, far apart."""
    words = text.split()
    for number in range(num_words):
        words[20 + number * len(words) // (num_words + 1)] = f"changed{number}"
    return " ".join(words)


@every_partition
def test_central_is_held_out_before_anything_is_partitioned(kind: str) -> None:
    documents = make_documents(66)
    assert split(documents, partition=PARTITIONS[kind]).central == documents[:6]


@every_partition
def test_every_document_stands_on_one_side(kind: str) -> None:
    documents = make_documents(66)
    splits = split(documents, partition=PARTITIONS[kind])
    assert sorted(everything(splits)) == sorted(document.origin for document in documents)
    assert found(splits.audit) == {}


@pytest.mark.parametrize(("kind", "expected"), SIZES.items(), ids=SIZES)
def test_each_partition_has_its_shape(kind: str, expected: list[int]) -> None:
    assert sizes(split(make_documents(66), partition=PARTITIONS[kind])) == expected


@every_partition
def test_a_split_is_the_same_for_the_same_seed(kind: str) -> None:
    documents = make_documents(66)
    first = split(documents, seed=1, partition=PARTITIONS[kind])
    assert split(documents, seed=1, partition=PARTITIONS[kind]) == first
    assert split(documents, seed=2, partition=PARTITIONS[kind]) != first


@pytest.mark.parametrize("kind", ["dirichlet", "shard"])
def test_partitions_by_chance_draw_it_from_the_seed(kind: str) -> None:
    section = make_recipe(data={"partition": PARTITIONS[kind]}).data.partition
    first, again, other = (partition_documents(make_documents(60), section, 3, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_natural_gives_every_label_to_one_client() -> None:
    documents = [Document(make_text(f"{label}{n}"), f"{label}{n}", label) for label in "abcdefg" for n in range(9)]
    splits = split(documents, central_holdout=0, partition=PARTITIONS["natural"])
    labels = [{document.label for document in (*part.train, *part.holdout)} for part in splits.clients]
    assert sorted(label for owned in labels for label in owned) == list("abcdefg")
    assert sorted(sizes(splits)) == [18, 18, 27]


def test_a_small_alpha_is_skewed_and_a_large_one_is_even() -> None:
    def largest_share(alpha: float) -> float:
        """The mean over labels of the share of a label's documents that one client holds."""
        partition = {"kind": "dirichlet", "by": "label", "alpha": alpha}
        section = make_recipe(data={"partition": partition}).data.partition
        parts = partition_documents(make_documents(300), section, 3, seed=3)
        counts = [Counter(document.label for document in part) for part in parts]
        return sum(max(count[f"label {label}"] for count in counts) / 60 for label in range(5)) / 5

    assert largest_share(0.05) > 0.8
    assert largest_share(1000) < 0.4


Sides = Callable[[Sequence[Document], float, bytes], ClientDocuments]
KEY = holdout_key(7)


def strictly(documents: Sequence[Document], share: float, key: bytes) -> ClientDocuments:
    return hold_out(documents, share, key, strictly=True)


def by_place(documents: Sequence[Document], share: float, key: bytes) -> ClientDocuments:
    """As it was: shuffled by the seed, and the first of them."""
    shuffled = random.Random(key).sample(documents, len(documents))
    cut = round(share * len(shuffled))
    return ClientDocuments(tuple(shuffled[cut:]), tuple(shuffled[:cut]))


def by_number(documents: Sequence[Document], share: float, key: bytes) -> ClientDocuments:
    """A fixed number, those with the smallest hashes."""
    ordered = sorted(documents, key=lambda document: _place(document, key))
    cut = round(share * len(ordered))
    return ClientDocuments(tuple(ordered[cut:]), tuple(ordered[:cut]))


def moved(sides: Sides, documents: Sequence[Document], share: float = 0.2) -> int:
    """The most documents that one that is taken away takes along, into training or out of it."""
    whole = sides(documents, share, KEY)
    most = 0
    for place in range(len(documents)):
        left = sides([*documents[:place], *documents[place + 1 :]], share, KEY)
        others = {document.origin for document in whole.train} - {documents[place].origin}
        most = max(most, len(others ^ {document.origin for document in left.train}))
    return most


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("number", [1, 2, 4, 30, 100])
def test_a_document_that_is_taken_away_moves_itself_alone(number: int, share: float) -> None:
    documents = make_documents(number)
    assert moved(strictly, documents, share) == 0
    # Where chance meets its bounds at a client of few documents, one or two more may move.
    assert moved(hold_out, documents, share) <= 2
    if number == 100 and 0.2 <= share < 0.99:
        assert moved(hold_out, documents, share) == 0


def test_what_moves_others_is_found() -> None:
    documents = make_documents(100)
    assert moved(by_place, documents) > 20
    assert moved(by_number, documents) == 1


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_how_many_are_held_out_is_a_matter_of_chance_around_the_share(share: float) -> None:
    documents = make_documents(400)
    sizes = [len(hold_out(documents, share, holdout_key(seed)).holdout) for seed in range(40)]
    deviation = (400 * share * (1 - share)) ** 0.5
    assert abs(sum(sizes) / 40 - 400 * share) < 4 * deviation / 40**0.5
    assert 0.6 < (sum((size - 400 * share) ** 2 for size in sizes) / 40) ** 0.5 / deviation < 1.4


@pytest.mark.parametrize(
    ("share", "number", "least", "most"),
    [(0.2, 0, 0, 0), (0.2, 1, 0, 0), (0.2, 2, 1, 1), (0.2, 4, 1, 1), (0.5, 2, 1, 1), (0.2, 8, 2, 3), (0.2, 15, 2, 4),
     (0.2, 50, 5, 15), (0.01, 20, 1, 1), (0.99, 20, 10, 19), (0.0, 20, 0, 0)],
)  # fmt: skip
def test_chance_has_bounds_at_a_client_of_few_documents(share: float, number: int, least: int, most: int) -> None:
    found = {len(hold_out(make_documents(number), share, holdout_key(seed)).holdout) for seed in range(300)}
    assert least <= min(found) <= max(found) <= most


def test_copies_are_held_out_together() -> None:
    documents = make_documents(60)
    doubled = [*documents, *(Document(respace(document.text), f"again {document.origin}") for document in documents)]
    parts = hold_out(doubled, 0.2, KEY)
    for side in (parts.train, parts.holdout):
        names = Counter(document.origin.removeprefix("again ") for document in side)
        assert set(names.values()) == {2}
    assert hold_out(make_documents(1) * 4, 0.5, KEY).holdout == (), "one text is trained on"
    once = {document.origin for document in hold_out(documents, 0.2, KEY).holdout}
    assert once == {document.origin for document in parts.holdout if "again" not in document.origin}


def test_another_key_holds_out_others() -> None:
    documents = make_documents(100)
    assert hold_out(documents, 0.2, KEY) != hold_out(documents, 0.2, b"a client's own")


@pytest.mark.parametrize("sides", [hold_out, strictly])
def test_a_unit_is_held_out_whole_or_not_at_all(sides: Sides) -> None:
    documents = [replace(document, unit=f"u{n % 20}") for n, document in enumerate(make_documents(100))]
    parts = sides(documents, 0.3, KEY)
    units = [{document.unit for document in side} for side in (parts.train, parts.holdout)]
    assert all(units)
    assert not units[0] & units[1]
    # More of one unit's, or other words of it, change nothing of the others.
    more = [*(replace(one, text="other words") if one.unit == "u3" else one for one in documents),
            replace(documents[3], text="more words")]  # fmt: skip
    again = sides(more, 0.3, KEY)
    assert {document.unit for document in again.holdout} == units[1]


def test_a_private_split_is_strict_and_takes_copies_out_of_hold_outs() -> None:
    documents = make_documents(66, num_words=200)
    near = [Document(reword(document.text), f"near {document.origin}") for document in documents]
    plain, private = (
        split_documents(
            Documents((*documents, *near), {}, "planted", "none"),
            make_recipe(data={"documents_per_client": None, "central_holdout": 6, "client_holdout": 0.3}).data,
            7,
            private=private,
        )
        for private in (False, True)
    )
    assert sum(plain.audit.dropped) > sum(private.audit.dropped) > 0, "of the central hold-out alone"
    assert sum(private.audit.given_up) > 0 == sum(plain.audit.given_up)
    assert private.audit.to_json()["given_up"] == private.audit.given_up
    assert private.audit.leaks == plain.audit.leaks == 0
    for splits in (plain, private):
        held = {document.origin.removeprefix("near ") for part in splits.clients for document in part.holdout}
        trained = {document.origin.removeprefix("near ") for part in splits.clients for document in part.train}
        assert held
        assert not held & trained


def test_what_is_held_out_decides_over_nothing_in_a_private_run() -> None:
    train, (held,) = make_documents(3, num_words=200), make_documents(1, name="h", num_words=200)
    copies = tuple(Document(reword(held.text, number), f"copy {number}") for number in range(3))
    for holdout in ((), (held,)):
        ((left,), audited) = audit_splits(
            (), [ClientDocuments((*train, *copies), holdout)], 0.8, drop=True, private=True
        )
        assert left == ClientDocuments((*train, *copies), ())
        assert (audited.dropped, audited.given_up, audited.leaks) == ((0,), (len(holdout),), 0)
    ((left,), audited) = audit_splits((), [ClientDocuments((*train, *copies), (held,))], 0.8, drop=False, private=True)
    assert left == ClientDocuments((*train, *copies), (held,))
    assert (audited.given_up, audited.leaks) == ((0,), 3)


def test_the_same_question_is_taken_out_of_a_private_hold_out() -> None:
    asked, other = (
        Document(f"why? {answer}", answer, form=Form(f"why? {answer}", ((5, 9),))) for answer in ("because", "thus")
    )
    ((left,), audited) = audit_splits((), [ClientDocuments((asked,), (other,))], 0.8, drop=True, private=True)
    assert left == ClientDocuments((asked,), ())
    assert [overlap.prompt for overlap in audited.overlaps] == [0, 1, 0]


def test_a_client_with_one_document_trains_on_it() -> None:
    splits = split(make_documents(3), central_holdout=0, client_holdout=0.5)
    assert [(len(part.train), len(part.holdout)) for part in splits.clients] == [(1, 0)] * 3


def test_as_many_documents_are_split_as_the_recipe_asks_for() -> None:
    data = make_recipe(data={"clients": 4, "documents_per_client": 10, "central_holdout": 7}).data
    assert documents_needed(data) == 47
    loaded = load_documents(data, 7, documents_needed(data))
    splits = split_documents(loaded, data, 7)
    assert len(splits.central) == 7
    assert sum(sizes(splits)) + sum(splits.audit.dropped) == 40


def test_all_documents_are_taken_where_no_number_is_asked_for() -> None:
    assert documents_needed(make_recipe(data={"documents_per_client": None}).data) is None
    assert sizes(split(make_documents(66))) == [20, 20, 20]


@pytest.mark.parametrize(
    ("documents_per_client", "clients", "asked", "fitting"),
    [
        (20, 3, "66 (6 central + 3 clients × 20)", {"central_holdout": 1, "documents_per_client": 2}),
        (2, 3, "12 (6 central + 3 clients × 2)", {"central_holdout": 1}),
        (None, 3, "9 (6 central + 3 clients × at", {"central_holdout": 1}),
        (20, 50, "1006 (6 central + 50 clients × 20)", {}),
    ],
)
def test_too_few_documents_is_an_error_with_both_numbers_and_settings_that_fit(
    documents_per_client: int | None, clients: int, asked: str, fitting: dict[str, int]
) -> None:
    data = make_recipe(data={"documents_per_client": documents_per_client, "clients": clients}).data
    loaded = Documents(make_documents(8), {"empty": 4}, "planted", "none")
    with pytest.raises(DataError) as caught:
        split_documents(loaded, data, 7)
    mend = " and ".join(f"data.{key} = {value}" for key, value in fitting.items())
    enough = f"they are enough for {mend}" if fitting else "bring more of them, or lower data.clients"
    for words in ("8 usable documents", f"asks for {asked}", "skipped 4: 4 empty", enough):
        assert words in str(caught.value)
    if fitting:
        split_documents(loaded, data.model_copy(update=fitting), 7)


def test_a_client_can_be_left_without_documents() -> None:
    documents = make_documents(2)
    splits = split([*documents, *documents], central_holdout=2, clients=1, client_holdout=0.0)
    assert splits.clients[0].train == ()
    assert splits.audit.dropped == (2,)


def test_too_few_labels_for_natural_is_an_error_with_both_numbers() -> None:
    with pytest.raises(DataError, match='column "label" has 2 different values for 3 clients'):
        split(make_documents(66, labels=2), partition=PARTITIONS["natural"])


@pytest.mark.parametrize(
    ("partition", "clients"),
    [
        (PARTITIONS["linear"], 30),
        (PARTITIONS["square"], 30),
        (PARTITIONS["exponential"], 30),
        ({"kind": "shard", "by": "label", "shards_per_client": 50}, 3),
        ({"kind": "dirichlet", "by": "label", "alpha": 0.001}, 30),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else str(value),
)
# Of flwr-datasets, at each of the ten draws that leave a client without documents.
@pytest.mark.filterwarnings("ignore:The specified min_partition_size:UserWarning")
def test_a_partition_that_is_not_possible_is_an_error(partition: dict[str, object], clients: int) -> None:
    with pytest.raises(DataError, match=f'data.partition = {{kind = "{partition["kind"]}"}}'):
        split(make_documents(66), clients=clients, partition=partition)


@pytest.mark.parametrize(("side", "other"), [("train", "central"), ("train", "holdout"), ("holdout", "central")])
@pytest.mark.parametrize("drop", [True, False], ids=["drop", "report"])
def test_planted_copies_are_counted_exactly(side: str, other: str, drop: bool) -> None:
    own = {name: make_documents(10, name=name, num_words=200) for name in SIDES}
    targets = [document.text for document in own[other]]
    exact = [*targets[:2], respace(targets[2])]
    near = [reword(targets[3]), reword(targets[4], 1), respace(reword(targets[5])), targets[6] + " and some more"]
    planted = [Document(text, f"planted {number}") for number, text in enumerate([*exact, *near])]
    left, audited = audit(**{**own, side: [*own[side], *planted]}, drop=drop)
    assert found(audited) == {f"{side}/{other}": (3, 4)}
    if side == "train":
        assert left == (own["train"] if drop else (*own["train"], *planted))
        assert audited.dropped == ((7,) if drop else (0,))
        assert audited.leaks == (0 if drop else 7)
    else:
        assert left == own["train"]
        assert audited.dropped == (0,)
        assert audited.leaks == 0


def test_a_copy_on_both_held_out_sides_counts_for_each_and_is_dropped_once() -> None:
    (document,) = make_documents(1)
    left, audited = audit([document, *make_documents(3, name="own")], [document], [document])
    assert found(audited) == dict.fromkeys(("train/central", "train/holdout", "holdout/central"), (1, 0))
    assert len(left) == 3
    assert audited.dropped == (1,)


def test_what_another_client_holds_out_is_not_trained_on() -> None:
    first, second = make_documents(2)
    clients = [ClientDocuments((first,), (second,)), ClientDocuments((second,), (first,))]
    cleaned, audited = audit_splits([], clients, 0.8, drop=True)
    assert [part.train for part in cleaned] == [(), ()]
    assert audited.dropped == (1, 1)


def test_copies_within_a_side_are_no_leak() -> None:
    train, holdout, central = (make_documents(3, name=name) * 2 for name in SIDES)
    left, audited = audit(train, holdout, central)
    assert left == train
    assert found(audited) == {}


def test_composed_and_decomposed_letters_are_the_same_text() -> None:
    _, audited = audit([Document("voilà un café", "a")], (), [Document("voila\u0300 un cafe\u0301", "b")])
    assert found(audited) == {"train/central": (1, 0)}


@pytest.mark.parametrize(
    ("near_duplicate", "near"), [(0.5, 1), (0.8, 1), (0.9, 1), (0.91, 0), (0.99, 0), (1.0, 0)], ids=str
)
def test_the_true_similarity_decides(near_duplicate: float, near: int) -> None:
    text = make_text("a", 200)
    # Two words changed touch 10 of 196 runs of five words: 186 of 206 are common, 0.903.
    _, audited = audit([Document(reword(text), "a")], (), [Document(text, "b")], near_duplicate=near_duplicate)
    assert found(audited) == ({"train/central": (0, near)} if near else {})


def test_texts_that_differ_only_in_white_space_between_signs_are_near_at_any_threshold() -> None:
    central = [Document("def f(x): return x + 1", "a")]
    _, audited = audit([Document("def f( x ):\n    return x+1", "b")], (), central, near_duplicate=1.0)
    assert found(audited) == {"train/central": (0, 1)}


def test_unrelated_texts_have_no_overlap() -> None:
    own = {name: make_documents(50, name=name, num_words=60) for name in SIDES}
    left, audited = audit(**own)
    assert left == own["train"]
    assert found(audited) == {}
    assert (audited.train, audited.holdout, audited.central, audited.leaks) == (50, 50, 50, 0)


def test_the_original_programs_298_rows_are_found_and_dropped() -> None:
    """It evaluated on the first 3,000 rows; of the rows that its clients drew, 298 were among them."""
    central = make_documents(3_000, name="row")
    pool = [*central[:298], *make_documents(1_202, name="own")]
    clients = [ClientDocuments(tuple(pool[start::3]), ()) for start in range(3)]
    cleaned, audited = audit_splits(central, clients, 0.8, drop=True)
    assert found(audited) == {"train/central": (298, 0)}
    assert sum(audited.dropped) == 298
    assert audited.leaks == 0
    assert not {document.text for part in cleaned for document in part.train} & {row.text for row in central}
    assert sum(len(part.train) for part in cleaned) == 1_202


@pytest.mark.parametrize(("duplicates", "dropped", "leaks"), [("drop", 4, 0), ("report", 0, 4)])
def test_the_recipe_says_what_happens_to_copies(duplicates: str, dropped: int, leaks: int) -> None:
    documents = make_documents(26)
    splits = split([*documents, *documents[:4]], client_holdout=0.0, duplicates=duplicates)
    assert found(splits.audit) == {"train/central": (4, 0)}
    assert (sum(splits.audit.dropped), splits.audit.leaks) == (dropped, leaks)
    assert sum(sizes(splits)) == 24 - dropped


def test_an_audit_is_json() -> None:
    _, audited = audit(make_documents(3), make_documents(3, name="h"), make_documents(3, name="c"))
    written = json.loads(json.dumps(audited.to_json()))
    assert written["dropped"] == [0]
    assert [overlap["side"] for overlap in written["overlaps"]] == ["train", "train", "holdout"]


@pytest.mark.parametrize(("count", "clients"), [(10, 4), (11, 3), (80, 3), (7, 7)])
def test_even_shares_are_those_of_flwr_datasets(count: int, clients: int) -> None:
    import datasets
    from flwr_datasets.partitioner import IidPartitioner

    from fedloom.data.splits import partition_documents
    from fedloom.recipe.data_section import Partition

    partitioner = IidPartitioner(num_partitions=clients)
    partitioner.dataset = datasets.Dataset.from_dict({"index": range(count)})
    theirs = [partitioner.load_partition(client)["index"] for client in range(clients)]
    documents = [Document(str(index), "") for index in range(count)]
    ours = partition_documents(documents, Partition(), clients, seed=1)
    assert [[int(document.text) for document in part] for part in ours] == [list(part) for part in theirs]


def test_a_sketch_is_datasketchs_own_and_what_all_share_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index chooses its bands by integrals, a sketch draws its hash functions: once, for all that are alike."""
    one, other = {1, 2, 3, 2**32 - 1}, {5}
    right = []
    for shingles in (one, other):
        made = MinHash(num_perm=copies.NUM_PERMUTATIONS, hashfunc=int)
        made.update_batch(shingles)
        right.append(made)
    index = copies.HeldOut(0.8)
    copies._min_hash(one)

    def refuse(*given: object) -> None:
        raise AssertionError(given)

    monkeypatch.setattr(datasketch.lsh, "_optimal_param", refuse)
    monkeypatch.setattr(MinHash, "_init_permutations", refuse)
    assert [copies._min_hash(one), copies._min_hash(other)] == right
    again = copies.HeldOut(0.8)
    assert (again._index.b, again._index.r) == (index._index.b, index._index.r)
    again.add("central", [Document("one two three four five six seven", "a")])
    assert again.find(Document("one two three four five six seven", "b")) == {"central": "exact", "holdout": ""}
