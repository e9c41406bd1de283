"""Program that reads pickled weights and writes them as safetensors; `conversion` runs it in a process of its own.

A pickle is a program. `torch.load(weights_only=True)` carries out no more of it than tensors need, and that is the
guard. Should it fail, this process has no network where the kernel gives it a namespace of its own, can open no file
and no socket once the reading begins, and has no more memory, time and room for its result than the weights take.
It imports nothing of fedloom, so that a sealed interpreter (`python -I`) can run it by its path.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38
"""Numbers of Linux: of `unshare`, and of `prctl`."""
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Name that torch has for a type of numbers -> name that safetensors has."""
LONGEST_NAME = 100
"""Characters of a name in a pickle that are told."""


class NotWeightsError(Exception):
    """A pickle that holds something else than weights by name; the message is a reason of a few words."""


def main() -> int:
    """Read the pickles that are open at the descriptors given, and write safetensors; say how it went as JSON."""
    asked = json.loads(sys.argv[1])
    # First of all: a process with threads, such as torch starts, gets no namespace of its own.
    isolated = leave_network()
    sys.path[:] = asked["path"]
    try:
        files = [os.fdopen(descriptor, "rb") for descriptor in asked["inputs"]]
        output = os.fdopen(asked["output"], "wb")
        warm_up()
        confine(asked["memory_bytes"], asked["seconds"], asked["output_bytes"])
        tensors = read_all(files)
        write_safetensors(*without_copies(tensors), output)
    except MemoryError:
        return say(error="it takes more memory than its size allows")
    except NotWeightsError as error:
        return say(error=str(error))
    # Whatever a damaged or hostile file makes of the reader: it has errors of any kind.
    except Exception as error:
        return say(error=explain(error))
    return say(isolated=isolated, tensors=len(tensors))


def say(**what: Any) -> int:
    """Print a result as JSON; return the exit code for it."""
    print(json.dumps(what), flush=True)
    return 1 if "error" in what else 0


def explain(error: Exception) -> str:
    """Return the reason why a pickle could not be read, as a few words."""
    words = str(error)
    if "allocate memory" in words or "bad_alloc" in words:
        return "it takes more memory than its size allows"
    if asked := re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", words):
        return f"it asks for {asked[1][:LONGEST_NAME]}, which no weights need, and was not carried out"
    return f"it is damaged, or no pickle of weights ({type(error).__name__})"


def leave_network() -> bool:
    """Move this process to a network namespace of its own, where there is nothing; return whether the kernel let it."""
    linux = ctypes.CDLL(None, use_errno=True)
    linux.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # it ends with the process that started it
    linux.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    # With a namespace of users, anybody may make one of networks; without, only an administrator.
    return any(linux.unshare(flags) == 0 for flags in (NEW_USER | NEW_NETWORK, NEW_NETWORK))


def warm_up() -> None:
    """Import all that reading needs: afterwards no file can be opened."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    for zipped in (True, False):
        small = BytesIO()
        torch.save({"x": torch.zeros(2)}, small, _use_new_zipfile_serialization=zipped)
        small.seek(0)
        np.asarray(torch.load(small, map_location="cpu", weights_only=True)["x"])


def confine(memory_bytes: int, seconds: int, output_bytes: int) -> None:
    """Give up, for good, all that reading does not need: this much memory and time more, and nothing to open."""
    with open("/proc/self/statm") as facts:
        held = int(facts.read().split()[0]) * resource.getpagesize()
    spent = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    limits = {
        resource.RLIMIT_AS: held + memory_bytes,
        resource.RLIMIT_CPU: spent + seconds,
        resource.RLIMIT_FSIZE: output_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        # No descriptor is free any more: files, sockets and pipes that are open stay, and none can be added. This
        # holds where there are no namespaces, too, and is why the pickles are not mapped, which opens them again.
        resource.RLIMIT_NOFILE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def read_all(files: Iterable[IO[bytes]]) -> dict[str, Tensor]:
    """Read weights by name from pickles that belong together.

    Raises:
        NotWeightsError: one holds something else, or two hold the same name.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for file in files:
        found = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not found:
            raise NotWeightsError("it is no table of weights by name")
        for name, value in found.items():
            if not isinstance(name, str) or name == "__metadata__":
                raise NotWeightsError("it is no table of weights by name")
            dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            if not dense or kind_of(value) not in DTYPES:
                raise NotWeightsError(f"{name[:LONGEST_NAME]} is no plain tensor")
            if name in tensors:
                raise NotWeightsError(f"{name[:LONGEST_NAME]} is there twice")
            tensors[name] = value.detach()
    return tensors


def without_copies(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights without those that are others to the byte of memory, and what each of these is.

    A head that is tied to its embedding is one. Transformers ties them again.
    """
    kept: dict[str, Tensor] = {}
    copies: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, value in tensors.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        first = names.setdefault(place, name)
        if first == name or not value.numel():
            kept[name] = value
        else:
            copies[name] = first
    return kept, copies


def write_safetensors(tensors: dict[str, Tensor], copies: dict[str, str], file: IO[bytes]) -> None:
    """Write weights in the format of safetensors: the length of a head, the head as JSON, the weights.

    Its own library opens the file by itself, or needs the weights twice more in memory.
    """
    import torch

    head: dict[str, Any] = {"__metadata__": {**copies, "format": "pt"}}
    end = 0
    # Larger numbers come first, so that each is aligned.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in ordered:
        value = tensors[name]
        begin, end = end, end + value.numel() * value.element_size()
        head[name] = {"dtype": DTYPES[kind_of(value)], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in ordered:
        file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.flush()
    os.fsync(file.fileno())


def kind_of(value: Tensor) -> str:
    """Return torch's name of a tensor's type of numbers."""
    return str(value.dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
