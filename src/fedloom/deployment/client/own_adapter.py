"""Parts of adapters that are a client's own, on its own disk between rounds, and whole adapters that it keeps.

A part is told to nobody. Its keyed hash is: over the run, the round and the part, so that another run's or another
round's, or one that was damaged, is an error and is never trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.errors import DeploymentError
from fedloom.federation.own_parts import OwnParts
from fedloom.host.files import flush, replace_file, writing
from fedloom.records.state import hash_tensors

KEPT = 10
"""Parts that are kept, the newest of all runs: a server may go back by the two states that it keeps of its own, and
begin another run in between."""
DIGITS = 16
"""Digits of a hash that stand in names."""
MEND = "go on with fedloom join: it is asked again"
Sign = Callable[[str, str], str]
"""A function from a round and the hash of a part to what a server is told of it."""


@dataclass(frozen=True)
class Places:
    """Places on a client's disk."""

    data: Path
    """Documents."""
    parts: Path
    """Folder of its parts of adapters."""
    adapters: Path
    """Folder of the adapters that it keeps."""

    @classmethod
    def of(cls, data: Path, journal: Path, adapters: Path | None) -> Places:
        """Return those beside a journal, where its owner names no other for adapters."""
        return cls(data, journal.with_suffix(".parts"), adapters or journal.with_suffix(".adapters"))


class Part(NamedTuple):
    """Part of an adapter that is a client's own, on disk."""

    round: int
    own: Tensor


class OwnPart:
    """Part of the adapter that is this client's own, in one run: as it was after each of its last rounds."""

    def __init__(self, initial: Adapter, shared_P: Tensor, folder: Path, sign: Sign) -> None:
        """Begin with what everybody's adapter begins with; parts lie in the folder, which is this client's alone."""
        self._parts = OwnParts(initial, shared_P)
        self._folder, self._sign = folder, sign

    def adapter_of(self, adapter: Adapter, stamp: str | None) -> Adapter:
        """Return the client's adapter: what is shared of this one, and its own part with a stamp, or the first one's.

        Raises:
            DeploymentError: there is no such part of this run, or it is not what it was.
        """
        self._parts.restore({} if stamp is None else {0: self._read(stamp)})
        return self._parts.adapter_of(0, adapter)

    def keep(self, round: int, adapter: Adapter) -> str:
        """Keep the client's own part of an adapter that it trained, on disk, and return its stamp.

        Raises:
            RunError: it can't be written.
        """
        self._parts.keep(0, adapter)
        part = self._parts.parts[0]
        stamp = self._stamp(Part(round, part))
        file = self._place(stamp)
        with writing(file, MEND):
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, save({"own": part, "round": torch.tensor(round)}), 0o600)
            # It is on the disk before anybody is told that it is there.
            flush(file)
            flush(self._folder)
            # By when they were written: an earlier run may have had more rounds.
            for old in sorted(self._folder.glob("*.safetensors"), key=lambda one: -one.stat().st_mtime_ns)[KEPT:]:
                old.unlink()
        return stamp

    def _read(self, stamp: str) -> Tensor:
        try:
            found = load_file(self._place(stamp))
            part = Part(int(found["round"]), found["own"])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
            part = None
        if part is None or self._stamp(part) != stamp:
            raise DeploymentError(
                "this client's own part of the adapter, as it was when it last trained, is not there or was changed",
                where=str(self._place(stamp)),
                mend="bring it back from a copy, or take part in a later run: it is in nobody else's hands",
            )
        return part.own

    def _stamp(self, part: Part) -> str:
        return self._sign(str(part.round), hash_tensors([part.own]))

    def _place(self, stamp: str) -> Path:
        return self._folder / f"{stamp[:DIGITS]}.safetensors"


def keep_adapter(adapted: AdaptedModel, adapter: Adapter, home: Path, card: str) -> None:
    """Keep a whole adapter in a folder of its own, as PEFT opens it.

    Raises:
        RunError: it can't be written; what was there before is still there.
    """
    # What a kill leaves half written is left there: the folder that it lies in may be its owner's for other things.
    with writing(home, MEND):
        adapted.save(adapter, home, card)
