"""A server that lies and a client that lies: both speak frames themselves, and are held to nothing.

What they send is honest but for what a test changes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np

from fedloom.adapters.adapter import Adapter
from fedloom.deployment.messages import COUNTS, hide_documents, pack_adapter, pack_recipe, pack_task, pack_update
from fedloom.deployment.server.exchange import Answer, Exchange, Node
from fedloom.deployment.server.facts import check_facts
from fedloom.deployment.server.remote_fleet import RemoteFleet
from fedloom.experiment.building import load_adapted_model
from fedloom.host.frames import Frame
from fedloom.model.source import open_model
from fedloom.recipe.recipe import Recipe
from fedloom.training.jobs import ClientTask
from support.tiny import make_adapted, make_recipe, make_update


def facts_of(name: str, **changed: Any) -> Frame:
    """What a client of a name tells of itself."""
    words = {"name": name, "version": "1.0.0", "base": "b" * 64, "documents": sha256(name.encode()).hexdigest()}
    return Frame({**dict.fromkeys(COUNTS, 4), **words, **changed})


class LyingServer:
    """Server that asks one client whatever it likes, as its relay would."""

    def __init__(self, ask: Callable[[Frame], Frame], recipe: Recipe) -> None:
        self.ask, self.recipe, self.told = ask, recipe, pack_recipe(recipe)
        self._adapter: Adapter | None = None

    @property
    def adapter(self) -> Adapter:
        if self._adapter is None:
            self._adapter = load_adapted_model(self.recipe, open_model(self.recipe.model.source)).read()
        return self._adapter

    def meet(self, sections: Mapping[str, Any] | None = None, **fields: Any) -> Mapping[str, Any]:
        """Ask who the client is, with other keys in the recipe, and other fields beside it."""
        return self.ask(self.question("meet", sections, **fields)).manifest

    def evaluate(self, sections: Mapping[str, Any] | None = None, **fields: Any) -> Mapping[str, Any]:
        return self.ask(self.question("evaluate", sections, **fields)).manifest

    def train(self, round: int = 1, sections: Mapping[str, Any] | None = None, **fields: Any) -> Mapping[str, Any]:
        return self.ask(self.question("train", sections, round=round, **fields)).manifest

    def question(self, do: str, sections: Mapping[str, Any] | None = None, **fields: Any) -> Frame:
        """Write a question: a field that is None is left out."""
        frame = Frame({})
        if do != "meet":
            frame = pack_adapter(self.adapter)
        if do == "train":
            task = ClientTask(1, 0, self.adapter, self.recipe.training, self.recipe.federation.rounds, seed=7)
            frame = replace(pack_task(task, frame), manifest={**pack_task(task, frame).manifest, "judge": False})
        more = {"tasks": {"base": True}, "keep": {"round": self.recipe.federation.rounds + 1, "client": 0}}
        told = {
            **frame.manifest,
            **more.get(do, {}),
            "do": do,
            "seconds": 600.0,
            "recipe": merged(self.told, sections or {}),
            **fields,
        }
        return replace(frame, manifest={name: value for name, value in told.items() if value is not None})


def merged(told: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as it is told, with other keys in its sections."""
    changed = {
        name: {**told.get(name, {}), **section} if isinstance(section, Mapping) else section
        for name, section in sections.items()
    }
    return {**told, **changed}


Lie = Callable[[str, Frame, Frame], Frame]
"""What a lying client makes of a question's kind, the question and its own honest answer."""


class LyingClient:
    """Transport to honest clients and to one that lies: the last."""

    def __init__(self, lie: Lie, clients: int = 2) -> None:
        self._lie, self._names = lie, [str(number) for number in range(clients)]
        self._answers: dict[str, Frame] = {}
        self.asked: list[Frame] = []

    def nodes(self) -> Sequence[Node]:
        return [Node(name, name, "1") for name in self._names]

    def send(self, node: Node, frame: Frame, seconds: float) -> str:
        self.asked.append(frame)
        message, do = str(len(self.asked)), frame.manifest["do"]
        answer = honest_answer(node.name, frame)
        self._answers[message] = self._lie(do, frame, answer) if node.name == self._names[-1] else answer
        return message

    def pull(self, messages: Collection[str]) -> Answer | None:
        found = next((message for message in messages if message in self._answers), None)
        return Answer(found, self._answers.pop(found), "") if found else None

    def reopen(self) -> None:
        raise AssertionError("the link was lost")

    def fleet(
        self, wait_seconds: float = 5.0, privacy: Mapping[str, Any] | None = None, **federation: Any
    ) -> tuple[RemoteFleet, list[str]]:
        """The server's fleet of these clients, and what is said."""
        said: list[str] = []
        count = len(self._names)
        bound = {"privacy": dict(privacy)} if privacy else {}
        recipe = make_recipe(data={"clients": count}, federation={"round_deadline": 20.0, **federation}, **bound)
        exchange = Exchange(
            self,
            pack_recipe(recipe),
            20.0,
            lambda what, detail: said.append(f"{what} {detail}"),
            lambda phases: None,
            partial(check_facts, recipe),
        )
        names = exchange.assemble(count, wait_seconds)
        return RemoteFleet(exchange, names, recipe.federation, range(count), Path(gettempdir())), said


def honest_answer(name: str, asked: Frame) -> Frame:
    """Answer as a client that adds its number, and one, to every weight; in a private run it tells no more."""
    private = "privacy" in asked.manifest["recipe"]
    answer = _open_answer(name, asked, {"noise_multiplier": 9.0} if private else {})
    return hide_documents(answer, asked.manifest["do"]) if private else answer


def _open_answer(name: str, asked: Frame, facts: Mapping[str, Any]) -> Frame:
    if asked.manifest["do"] == "meet":
        return facts_of(name, **facts)
    if asked.manifest["do"] == "evaluate":
        return Frame({"score": [2.0, 1, 4]})
    if asked.manifest["do"] == "tasks":
        rows = [["quiz", 8, int(name) + 2, None], ["say", 5, 1, 3]]
        return Frame({"tasks": rows, "base": rows if asked.manifest["base"] else None})
    if asked.manifest["do"] == "keep":
        return Frame({"before": 2.0, "after": 1.0})
    start = np.frombuffer(asked.payload, dtype="<f4") + np.float32(int(name) + 1)
    report = pack_update(make_update(make_adapted().read(), int(name), round=asked.manifest["round"]), None)
    return replace(report, payload=start.tobytes())
