"""Page of an audit, and its lines for a terminal: what was tried on updates, and what it means. No torch here.

Whoever answers for the documents reads it, who need not know what a gradient is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fedloom.host.files import write_json, write_text, writing
from fedloom.recipe.privacy_section import DOCUMENT
from fedloom.records.privacy import NOT_PRIVATE, each_unit
from fedloom.records.run import Record
from fedloom.report.document import Block, Bullets, Document, Section, Table, Text, to_html
from fedloom.text import count, format_seconds, format_share, sentence

YES, NO, NOT_TRIED = "yes", "no", "not tried"


class Words(NamedTuple):
    """Words for an attack."""

    line: str
    """First word of its line."""
    question: str
    tried: str
    yes: str
    no: str
    not_meant: str


WORDS: Mapping[str, Words] = {
    "alignment": Words(
        "told apart",
        "Can whoever sees the updates tell which documents were trained on?",
        "For each document, the change that it asks of the model was set beside the change that was sent. Documents"
        " that were trained on should point its way more than others of the same kind.",
        "Whoever sees the updates and has, or guesses, a document can find out whether it was among those trained on.",
        "By this attack, documents that were trained on look like those that were not.",
        "It does not say that the text of a document that nobody has can be read.",
    ),
    "loss": Words(
        "by loss",
        "Does the trained model know the documents better than others like them?",
        "For each document, how much better the model predicts it after training than before.",
        "Whoever has the trained model, and has or guesses a document, can find out whether it was trained on. That"
        " holds for everybody whom the model is given to, not for the server alone.",
        "By this attack, the model has gained as much on other documents of the kind as on those trained on.",
        "It does not say that the model writes the documents out.",
    ),
    "canaries": Words(
        "remembered",
        "Does the model remember a number that it saw once, or four times?",
        "Made-up codes (“The access code of … is …”) were added to the documents, once or four times each, and training"
        " was done again. A code is remembered where its loss fell more than that of every one of the codes that were"
        " never added.",
        "What stands in a document as often as these codes (a number, a name, a password) can be remembered, and picked"
        " out of a list by whoever has the trained model.",
        "Codes that were added are no better known than codes that were not.",
        "It does not say that a real secret was found: only what was made up for this was looked for.",
    ),
    "tokens": Words(
        "read",
        "Can words be read out of the update itself?",
        "In some models the first layer's update is a mixture of the words trained on. It was searched for every word"
        " of the vocabulary.",
        "Words of the documents can be read from the update alone, by somebody who has none of the documents.",
        "This attack does not tell words that were trained on from others.",
        "It does not give the order of words. Attacks that were not tried here may read more.",
    ),
    "verbatim": Words(
        "repeated",
        "Does the model write documents out, word by word?",
        "The trained model was given the first 20 tokens of each document. It repeats one where the next 20 are what"
        " it would write, and the model before training would not have.",
        "Whoever has the trained model and the beginning of a document can have it go on with the document's words.",
        "Of enough documents, none was repeated.",
        "It does not rule out that other questions bring a document's words out.",
    ),
}
"""Words for each attack, in the order in which they are told."""
FEW = "There are too few documents here to say: it was looked for, and what was found may be chance either way."
READING = (
    "Members are the documents trained on; others are of the same owner, or held out. AUC is the probability that a"
    " member scores above another: 0.5 is a coin, 1 is certain. In brackets stands what it may be by chance (95 %, of"
    " all clients together)."
)
NOBODY_CAN_TELL = {
    "rehearsal": (
        "what the other clients' documents would add: here the owner trains alone",
        "what all of the documents would give: half was trained on, so each counts for more, and the noise of a bound"
        " was chosen for so many",
        "what a server learns that sends other adapters than its recipe makes",
        "what attacks do that are not among these five",
        "anything of single documents that are unlike all others: figures are of the documents together",
    ),
    "run": (
        "what each client's own update told: no run keeps it, and the adapters here are of all clients together, so"
        " whoever saw the updates knows at least as much",
        "what adapters of rounds tell that were not kept (federation.keep_every)",
        "whether a rare number or name is remembered: nothing was planted",
        "what attacks do that are not among these",
    ),
}


def write_audit(record: Record, folder: Path) -> Path:
    """Write `audit.json` and `audit.html` into a folder, which is made; return the page's path.

    Raises:
        RunError: a file can't be written.
    """
    with writing(folder, "choose another folder with --to"):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "audit.json", record)
    write_text(folder / "audit.html", to_html(build_page(record), {}), "choose another folder with --to")
    return folder / "audit.html"


def describe_audit(record: Record) -> list[str]:
    """Return the lines for a terminal: one for each attack, and the verdict."""
    lines = []
    several = len(record["clients"]) > 1
    for client, attacks in record["clients"].items():
        for attack in attacks:
            who = f"client {client}: " if several and client.isdigit() else ""
            lines.append(f"{WORDS[attack['name']].line:<14}{who}{attack['word']}: {tell(attack)}")
    if record.get("privacy"):
        lines.append(f"{'bound':<14}{_tell_bound(record['privacy'])}")
    if record.get("of_clients"):
        lines.append(f"{'bound':<14}{_tell_bound_of_clients(record['of_clients'])}")
    return [*lines, f"{'verdict':<14}{give_verdict(record)}"]


def tell(attack: Record) -> str:
    """Return what an attack found in figures, with the bound beside it where there is one."""
    found, bound = attack.get("found", {}), attack.get("bound", {})
    if attack["word"] == NOT_TRIED:
        return str(attack["why"])
    if attack["name"] in ("alignment", "loss"):
        some = round(found["recognised"] * found["members"])
        above = (
            "every other" if not found["false_alarms"] else f"all but {format_share(found['false_alarms'])} of others"
        )
        most = f"; at most {bound['auc']:.2f} for any attack" if bound else ""
        return (
            f"AUC {_interval(found, 'auc')}{most}; {some} of {found['members']} members above {above}"
            f" ({found['others']})"
        )
    if attack["name"] == "canaries":
        most = f"; of those put in once, at most {format_share(bound['remembered_of_once'])}" if bound else ""
        return (
            f"{found['remembered']} of {found['planted']} made-up codes before all {found['references']} others"
            f" (chance {_probability(found['chance'])}, exposure up to {max(found['exposures']):.1f} bits);"
            f" {found['extracted']} so well known that they could be written out{most}"
        )
    if attack["name"] == "tokens":
        return (
            f"{found['read']} of {found['distinct']} words for certain, {found['false']} falsely; all words ranked: AUC"
            f" {_interval(found, 'auc')}, by chance {found['auc_random']:.2f}"
        )
    return (
        f"{found['repeated']} of {found['members']} documents, 20 tokens and more; of others {found['repeated_others']}"
        f" of {found['others']}"
    )


def give_verdict(record: Record) -> str:
    """Return what to do about what was found."""
    words = {name: {attack["word"] for attack in _attacks(record) if attack["name"] == name} for name in WORDS}
    asked = [name for name in WORDS if YES in words[name]]
    private, of_clients = _is_bounded(record.get("privacy")), _is_bounded(record.get("of_clients"))
    how = (
        "a smaller privacy.epsilon makes that less"
        if private or of_clients
        else "ask for [privacy], or trust the server and whoever gets the model"
    )
    if any(_exceeds(attack) for attack in _attacks(record)):
        return (
            "more was found than the bound allows: documents have copies, or the noise has a fault; do not rely on it"
        )
    if {"alignment", "loss"} & set(asked):
        return f"whoever sees the updates can tell which documents are in: {how}"
    if asked:
        return f"the updates tell something of the documents ({', '.join(WORDS[name].line for name in asked)}): {how}"
    nothing = all(found <= {NO, NOT_TRIED} for found in words.values())
    found_nothing = "these attacks found nothing" if nothing else "too few documents to say that nothing is told"
    if private:
        return f"{found_nothing}; what no attack can exceed is the bound"
    if of_clients:
        return f"{found_nothing}; what is bounded is what a client's documents together do to the adapters"
    return f"{found_nothing}, and nothing bounds what others find ([privacy] does)"


def build_page(record: Record) -> Document:
    """Build the page of an audit's record."""
    rehearsal = record["kind"] == "rehearsal"
    what = (
        f"What whoever sees a client's updates could learn of its documents: {count(record['members'], 'document')}"
        f" of yours were trained on as the recipe says, {record['others']} were left out, and what a server would have"
        " been sent was attacked. Nothing has left this machine."
        if rehearsal
        else "What the adapters that a run has kept tell of its clients' documents."
    )
    sections = [
        Section("In short", [Text(sentence(give_verdict(record)), note=True), _overview(record), Text(READING)]),
        *(Section(WORDS[name].question, _explain(record, name)) for name in WORDS if _of(record, name)),
        Section("Bound", _explain_bound(record)),
        Section(
            "What this can't tell",
            [
                Text("An audit finds leaks; it never proves that there are none. It can't tell:"),
                Bullets(NOBODY_CAN_TELL[record["kind"]]),
            ],
        ),
        Section("How it was done", _how(record)),
    ]
    return Document(f"Audit of {record['recipe']}", what, give_verdict(record).partition(":")[0], sections)


def _attacks(record: Record) -> list[Record]:
    return [attack for attacks in record["clients"].values() for attack in attacks]


def _of(record: Record, name: str) -> list[tuple[str, Record]]:
    return [(who, one) for who, attacks in record["clients"].items() for one in attacks if one["name"] == name]


def _exceeds(attack: Record) -> bool:
    """Return whether an attack found more than its bound, beyond chance."""
    most = attack.get("bound", {}).get("auc")
    return most is not None and attack["found"]["auc_low"] > most


def _overview(record: Record) -> Table:
    rows = []
    for name, words in WORDS.items():
        for who, attack in _of(record, name):
            client = f" (client {who})" if who.isdigit() else ""
            rows.append([f"{words.question}{client}", attack["word"], tell(attack)])
    return Table(["Question", "Found", "In figures"], rows, text_columns=3)


def _explain(record: Record, name: str) -> list[Block]:
    words, attacks = WORDS[name], _of(record, name)
    found = {attack["word"] for _, attack in attacks}
    meaning = words.yes if YES in found else words.no if found == {NO} else FEW
    blocks: list[Block] = [Text(f"What was tried: {words.tried}")]
    for who, attack in attacks:
        client = f"Client {who}: " if who.isdigit() else ""
        blocks.append(Text(f"{client}Found: {attack['word']}. {sentence(tell(attack))}"))
    if found != {NOT_TRIED}:
        blocks += [Text(f"What it means: {meaning}"), Text(f"What it does not mean: {words.not_meant}")]
    return blocks


def _is_bounded(privacy: Record | None) -> bool:
    """Return whether there is a bound, and its noise is not one that everybody can take off."""
    return privacy is not None and privacy["noise"] != "seed"


def _explain_bound(record: Record) -> list[Block]:
    privacy, of_clients = record.get("privacy"), record.get("of_clients")
    if of_clients:
        return [Text(sentence(_tell_bound_of_clients(of_clients)))]
    if not privacy:
        return [Text("None: the recipe has no [privacy], so what another attack finds is not bounded by anything.")]
    blocks: list[Block] = [Text(sentence(_tell_bound(privacy)))]
    rows = []
    for name in WORDS:
        for who, attack in _of(record, name):
            found = attack.get("found", {})
            for key, most in attack.get("bound", {}).items():
                of = max(1, found["copies"].count(1)) if key == "remembered_of_once" else 1
                client = f", client {who}" if who.isdigit() else ""
                rows.append([f"{WORDS[name].line}{client}: {BOUNDED[key]}", f"{found[key] / of:.3f}", f"{most:.3f}"])
    blocks.append(Table([f"Of one {privacy.get('unit', DOCUMENT)}", "Found", "At most, by any attack"], rows))
    blocks.append(
        Text(
            "What was found is measured on a few documents and may lie above the bound by chance, within the intervals"
            " above. A document that is there twice counts twice, and so does ε for it. Reading and repeating have no"
            " figure of their own here: the same ε bounds how much more often either happens to one document than"
            " without it."
        )
    )
    return blocks


BOUNDED = {
    "auc": "AUC",
    "recognised": "share recognised",
    "remembered_of_once": "codes put in once that come first",
}
"""Words for each figure that has a bound."""


def _tell_bound(privacy: Record) -> str:
    if privacy["noise"] == "seed":
        return NOT_PRIVATE
    return (
        f"ε = {privacy['epsilon']:.3g}, δ = {privacy['delta']:g} for {each_unit(privacy.get('unit', DOCUMENT))} over"
        f" {privacy['steps']:,} steps;"
        f" noise of {privacy['noise_multiplier']:.3g} times a gradient's largest norm"
    )


def _tell_bound_of_clients(privacy: Record) -> str:
    if privacy["noise"] == "seed":
        return NOT_PRIVATE
    return (
        f"ε = {privacy['epsilon']:.3g}, δ = {privacy['delta']:g} for each client as a whole, against whoever sees the"
        " adapters; against the server, which sees each update as it is, nothing is bounded, and neither is it reckoned"
        " here what follows for a single document"
    )


def _how(record: Record) -> list[Block]:
    facts = [
        ["recipe", record["recipe"]],
        ["base model", record["model"]],
        ["what is trained", record["method"]],
        ["rounds", str(record["rounds"])],
        *([["documents trained on", str(record["members"])]] if "members" in record else []),
        *([["documents left out", str(record["others"])]] if "others" in record else []),
        *([["adapters kept, of rounds", ", ".join(map(str, record["adapters"]))]] if "adapters" in record else []),
        *([["clients not looked at", str(record["clients_left_out"])]] if "clients_left_out" in record else []),
        ["took", format_seconds(record["seconds"])],
        ["fedloom", record["fedloom"]],
        ["finished", record["finished"]],
    ]
    return [
        Table(["", ""], facts, text_columns=2),
        Text(
            "Yes, where the whole 95 % interval says so: an AUC above 0.6, or more than 5 % of the members above all"
            " but 1 % of at least 100 others; codes that come first by less than 1 % of chance; a word read for"
            " certain, or words ranked better than by a random guess by 0.1; a document that is repeated where others"
            " are not, or fewer by more than chance. No, where it says the opposite (for codes an AUC below 0.75, for"
            " repeated documents fewer than"
            " 5 %). Otherwise too few documents to say. Intervals: Hanley and McNeil 1982, Clopper and Pearson 1934."
        ),
    ]


def _interval(found: Record, name: str) -> str:
    return f"{found[name]:.2f} ({found[f'{name}_low']:.2f}–{found[f'{name}_high']:.2f})"


def _probability(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"
