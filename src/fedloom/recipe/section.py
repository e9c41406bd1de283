"""Base of every section of a recipe, and of a policy. No torch here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

NAME, DEVICE, ANY_DEVICE = r"^[A-Za-z0-9][A-Za-z0-9._-]*$", r"^(cpu|cuda(:\d+)?)$", r"^(auto|cpu|cuda(:\d+)?)$"
IN_WORDS = {
    NAME: "letters, digits, '.', '_' and '-', the first a letter or a digit",
    DEVICE: "'cpu', 'cuda' or one GPU as 'cuda:0'",
    ANY_DEVICE: "'auto', 'cpu', 'cuda' or one GPU as 'cuda:0'",
}
"""Account of the values that follow a pattern, for errors."""
MOST = 2**53 - 1
"""Largest count: up to here floats, and every reader of JSON, have each whole number exactly."""
LARGEST = 1e30
"""Most that a step of weights in float32 may be multiplied by: torch refuses a factor that float32 can't hold, in the
middle of a round. Whatever trains is far below."""


class Section(BaseModel):
    """A part of the recipe: frozen, without unknown keys, without silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
