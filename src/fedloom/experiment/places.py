"""Places where clients of a run train: devices of this machine, and of nodes that are reached by ssh."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fedloom.errors import RunError
from fedloom.model.devices import choose_devices

NODE = re.compile(r"(?P<host>([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9_][\w.-]*)(/(?P<device>cpu|cuda(:\d+)?))?")


class Place(NamedTuple):
    """Device, of this machine or of a node."""

    device: str
    host: str = ""
    """Name of the node as ssh knows it; empty for this machine."""

    def __str__(self) -> str:
        return f"{self.host}/{self.device}" if self.host else self.device

    @property
    def where(self) -> str:
        """Return what names it: an option of the command, or a key of the recipe."""
        return "--node" if self.host else "training.devices"


def choose_places(wanted: Sequence[str] | None, own: torch.device, nodes: Sequence[str]) -> tuple[Place, ...]:
    """Return where clients are dealt out to; nothing where the run's own process trains them all, on its device `own`.

    `wanted` are devices of this machine as `choose_devices` takes them; `nodes` are named HOST or HOST/DEVICE, whose
    device is the first of the kind of `own` if left out.

    Raises:
        FedloomError: one is not there, is none, or is of another kind than `own`, and so would give other results.
    """
    devices = choose_devices(wanted, own) or ((own,) if nodes else ())
    return *(Place(str(device)) for device in devices), *(_read_node(name, own.type) for name in nodes)


def here(places: Sequence[Place]) -> list[torch.device]:
    """Return the devices of this machine."""
    return [torch.device(place.device) for place in places if not place.host]


def name_processes(places: Sequence[Place]) -> str:
    """Say which processes train, as plan and run do."""
    return f"a process with the model for each of {', '.join(map(str, places))}"


def _read_node(name: str, kind: str) -> Place:
    found = NODE.fullmatch(name)
    if not found:
        raise RunError(f'"{name}" is no node', where="--node", mend="name one as HOST, or HOST/cuda:1")
    device = found["device"] or kind
    if device.partition(":")[0] != kind:
        raise RunError(
            f"{name} is of another kind than {kind}, which the run itself is on",
            where="--node",
            mend="name devices of one kind there and in model.device",
        )
    return Place("cuda:0" if device == "cuda" else device, found["host"])
