"""Positions of a step: which of them are computed, and of which the loss is, beside each other for all clients.

A processor looks up what counts, and what that needs. A GPU has shapes that stay: of each client as many positions as
the room has, those that count among them, and, where most of the padding is left out, as many tokens.

Letters: K clients, S sequences of each, M positions of a client, N sequences of all, R real tokens or equally many of
each client.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.data.tokens import IGNORED
from fedloom.training.client_slots import Room
from fedloom.training.objective import find_real, is_needed


class Positions(NamedTuple):
    """Positions of a step, or of one of its parts, each field as in `StepInputs`."""

    rows_M: Tensor | None
    targets_M: Tensor
    clients_M: Tensor | None
    shares_M: Tensor
    real_R: Tensor | None


def look_up(targets_KM: Tensor, shares_KM: Tensor, sequences: int, *, unpads: bool, multiple: int = 1) -> Positions:
    """Return the positions whose loss counts, and with `unpads` the tokens that these need, a `multiple` of some."""
    rows_M = (targets_KM != IGNORED).flatten().nonzero()[:, 0]
    real_R = find_real(targets_KM.view(len(targets_KM) * sequences, -1), multiple) if unpads else None
    return Positions(
        rows_M=rows_M if real_R is None else torch.searchsorted(real_R, rows_M),
        targets_M=targets_KM.flatten()[rows_M],
        clients_M=rows_M // targets_KM.shape[1],
        shares_M=shares_KM.flatten()[rows_M],
        real_R=real_R,
    )


def fill_room(
    targets_KM: Tensor, shares_KM: Tensor, room: Room, need: int | None = None, *, readout_apart: bool
) -> Positions:
    """Return as many positions of each client as a room has for a step: all whose loss counts, and what these need.

    A step has the size for the client that needs most, or for a `need` that is told. Without a readout apart from the
    model's body, every position that is computed has its loss.
    """
    real_KR = None
    size = room.largest
    if room.has_rows:
        needed_KM = is_needed(targets_KM.view(-1, room.tokens)).view_as(targets_KM)
        size = room.size_for(int(needed_KM.sum(1).max()) if need is None else need)
    if size < room.places:
        real_KR = choose_positions(needed_KM, size)
        targets_KM, shares_KM = (values_KM.gather(1, real_KR) for values_KM in (targets_KM, shares_KM))
        real_KR += torch.arange(len(real_KR))[:, None] * room.places
    rows_M = None
    if readout_apart and room.targets < targets_KM.shape[1]:
        chosen_KM = choose_positions(targets_KM != IGNORED, room.targets)
        rows_M = (chosen_KM + torch.arange(len(chosen_KM))[:, None] * targets_KM.shape[1]).flatten()
    chosen = slice(None) if rows_M is None else rows_M
    return Positions(
        rows_M=rows_M,
        targets_M=targets_KM.flatten()[chosen].clamp(min=0),
        clients_M=None,
        shares_M=shares_KM.flatten()[chosen],
        real_R=real_KR,
    )


def choose_positions(wanted_KM: Tensor, room: int) -> Tensor:
    """Return so many positions of each client, [K, room]: all that are wanted, in order, and then others."""
    assert int(wanted_KM.sum(1).max()) <= room, "more positions than the room has"
    return wanted_KM.long().sort(dim=1, descending=True, stable=True).indices[:, :room]


def targets_of_each(targets_KM: Tensor, sequences: int) -> Tensor:
    """Return, for each of a client's positions, how many of its own sequence count, [K, M], and 1 where none does."""
    counted_KM = targets_KM != IGNORED
    of_each_KS1 = counted_KM.view(len(counted_KM), sequences, -1).sum(-1, keepdim=True).clamp(min=1)
    return of_each_KS1.expand(-1, -1, counted_KM.shape[1] // sequences).flatten(1)
