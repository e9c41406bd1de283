"""Clients of a deployment in this process: real workers, each with its own folder, and no Flower around them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.worker import Worker
from fedloom.deployment.server.exchange import Answer, Node
from fedloom.deployment.server.serving import RemoteClients, check_deployable, with_limits
from fedloom.deployment.server.superlink import SuperLink
from fedloom.experiment.run import run
from fedloom.host.frames import Frame
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run
from support.federation_here import split


@dataclass
class Owner:
    """Owner of a client, as `fedloom join` is typed."""

    data: Path
    policy: Policy = field(default_factory=Policy)
    tasks: str = ""
    keep: Path | None = None

    def start(self, name: str, folder: Path) -> Worker:
        (folder / name).mkdir(parents=True, exist_ok=True)
        journal = Journal(folder / name / f"{name}.journal.jsonl")
        return Worker(name, self.data, self.policy, journal, keep=self.keep, tasks=self.tasks)


class LinkHere:
    """Transport from a server to workers of this process; each begins anew where a test says so."""

    def __init__(self, owners: Mapping[str, Owner], folder: Path) -> None:
        self.owners, self._folder = owners, folder
        self.workers = {name: owner.start(name, folder) for name, owner in owners.items()}
        self.asked: list[tuple[str, Frame]] = []
        self.answered: list[tuple[str, Frame]] = []
        self.on_question: Callable[[str, Frame], object] = lambda name, frame: None
        self._answers: dict[str, Frame] = {}
        self._check: Callable[[], object] = bool

    def restart(self, name: str) -> None:
        """Let a client's process end, and another begin in its folder."""
        self.workers[name] = self.owners[name].start(name, self._folder)

    def watch(self, check: Callable[[], object]) -> None:
        """Take what the run is interrupted by, at each look."""
        self._check = check

    is_open = False

    def open(self) -> None:
        """Be there."""
        self.is_open = True

    def nodes(self) -> Sequence[Node]:
        self._check()
        return [Node(name, name, "1") for name in self.workers]

    def send(self, node: Node, frame: Frame, seconds: float) -> str:
        self.on_question(node.name, frame)
        self.asked.append((node.name, frame))
        answer = self.workers[node.name].answer(frame)
        self.answered.append((node.name, answer))
        message = str(len(self.asked))
        self._answers[message] = answer
        return message

    def pull(self, messages: Collection[str]) -> Answer | None:
        self._check()
        found = next((message for message in messages if message in self._answers), None)
        return Answer(found, self._answers.pop(found), "") if found else None

    def reopen(self) -> None:
        raise AssertionError("the link was lost")


def link_of(recipe: Recipe, folder: Path, policies: Mapping[int, Policy] | None = None, **owner: Any) -> LinkHere:
    """Return a link to clients that hold a recipe's documents; `policies` are by number, `owner` is of them all."""
    owners = {}
    for number, data in enumerate(split(recipe, folder / "split")):
        told = {**owner, "policy": policies[number]} if policies and number in policies else owner
        owners[f"client-{number}"] = Owner(data, **told)
    return LinkHere(owners, folder / "clients")


def serve_here(recipe: Recipe, link: LinkHere, out: Path, observer: Observer | None = None, **how: Any) -> Run:
    """Carry out a recipe as `fedloom serve` does, with clients that are there already."""
    check_deployable(recipe)
    clients = RemoteClients(cast(SuperLink, link), 20.0)
    return run(with_limits(recipe), out, observer or Observer(), clients=clients, **how)


def asked_to(link: LinkHere, do: str) -> list[tuple[str, Frame]]:
    """Return the questions of a kind, and to whom they were."""
    return [(name, frame) for name, frame in link.asked if frame.manifest["do"] == do]


def told_of(link: LinkHere, do: str) -> list[tuple[str, Frame]]:
    """Return the answers to questions of a kind, and whose they are."""
    pairs = zip(link.asked, link.answered, strict=True)
    return [answer for (_, frame), answer in pairs if frame.manifest["do"] == do]
