"""The device that a model is on: which, in what dtype it computes, and that a GPU gives the same result twice."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fedloom.errors import ModelError
from fedloom.host.machine import computes_bfloat16


def choose_dtype(wanted: str, device: torch.device) -> str:
    """Return the wanted dtype; for `auto`, bfloat16 if the device computes it in hardware, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if has_in_hardware("bfloat16", device) else "float32"


def has_in_hardware(dtype: str, device: torch.device) -> bool:
    """Return whether a device computes in a dtype itself, not by way of another."""
    if dtype != "bfloat16":
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else computes_bfloat16()


def choose_device(wanted: str, where: str = "model.device") -> torch.device:
    """Return the wanted device; for `auto`, a GPU if there is one, else the processor. `where` is the key that says so.

    Raises:
        ModelError: the wanted GPU is not there.
    """
    available = torch.cuda.device_count()
    if wanted == "auto":
        wanted = "cuda" if available else "cpu"
    kind, _, number = wanted.partition(":")
    # Before torch sees the number: it takes 256 for 0, as one of 8 bits.
    if kind == "cuda" and (len(number) > 3 or int(number or 0) >= available):
        mend = 'use "auto" or "cpu"' if where == "model.device" else "name those that are there"
        raise ModelError(f"no device {wanted[:20]}: torch sees {available} GPUs", where=where, mend=mend)
    # With its number: torch takes no GPU without one where it is asked about its memory, say.
    return torch.device(kind, int(number or 0)) if kind == "cuda" else torch.device(wanted)


def choose_devices(wanted: Sequence[str] | None, own: torch.device) -> tuple[torch.device, ...]:
    """Return the devices among which clients are dealt out; `own` is that of the run itself. None if left out.

    Raises:
        ModelError: one is not there, or is of another kind than `own`, and so would give other results.
    """
    where = "training.devices"
    if wanted is None:
        return ()
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if wanted == "all" else wanted
    if not names:
        raise ModelError("torch sees no GPU", where=where, mend="leave it out")
    devices = tuple(choose_device(name, where) for name in names)
    if others := [str(device) for device in devices if device.type != own.type]:
        raise ModelError(
            f"{others[0]} is of another kind than {own}, which the run itself is on",
            where=where,
            mend="name devices of one kind there and in model.device",
        )
    return devices


def open_device(wanted: str) -> torch.device:
    """Return the wanted device, ready for use: a GPU is made the current one, and told to repeat its results.

    What torch allocates without a device lands on the current GPU, and so does what it records. Among the kernels that
    it has for one operation, torch takes those that sum in the same order each time; an operation that has none raises
    RuntimeError, unless `allow_differing_results` was called.

    Raises:
        ModelError: the wanted GPU is not there.
    """
    device = choose_device(wanted)
    if device.type == "cuda":
        # Read when the first product of matrices is computed: so before that.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True)
        # It would fill all memory that is about to be written anyway.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # Its backward pass sums in any order, and gives NaN for some lengths under a mask (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def allow_differing_results() -> None:
    """Let operations run that have no kernel with the same result each time."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Torch would say so of each such operation; who calls this says it once.
    warnings.filterwarnings("ignore", message=".*deterministic")


@contextmanager
def without_sorting() -> Iterator[None]:
    """Let a GPU write to places by their numbers inside, none of which is given twice, as it does it fastest.

    Told to repeat its results, torch sorts such numbers first, which takes a dozen kernels in place of one: of two
    values for one place it would not be said which is the last.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)
