"""Pickled weights as safetensors: converted once, in a process of their own, and kept in the cache with both hashes.

Nothing is converted unasked. `find_weights` first looks for what the hub's own bot made of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedloom.downloads import fetch_files, parts_of
from fedloom.errors import ModelError
from fedloom.host.files import hash_file, hash_json, replace_file, replace_folder
from fedloom.host.machine import cache_folder
from fedloom.hub import (
    Snapshot,
    find_cached,
    find_conversion,
    find_model,
    has_safetensors,
    hub_address,
    mend_for,
)
from fedloom.model import unpickle

PICKLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""Names of pickled weights that transformers reads: all in one file, or by an index of several."""
SAFETENSORS, RECORD = "model.safetensors", "conversion.json"
BYTES_PER_SECOND = 20e6
"""Speed below which reading is given up, after the seconds that any reading has."""
LEAST_SECONDS = 60
LEAST_BYTES = 2**28
"""Memory that any reading has, beside twice the size of the pickles."""


@dataclass(frozen=True)
class Weights:
    """Weights that do not lie beside the model's configuration: a conversion by the hub, or one that was made here."""

    location: str
    """Folder or hub id."""
    revision: str
    """Commit of the conversion; `main` for a folder."""
    record: Mapping[str, str] = field(default_factory=dict)
    """Origin as a plan has it: the `commit` on the hub, or the SHA-256 of each pickle and of the safetensors."""

    @property
    def told(self) -> str:
        """The weights in words, for messages."""
        return f"the files of {self.revision[:12]}" if "commit" in self.record else f"the files in {self.location}"


def list_pickles(names: Iterable[str], read: Callable[[str], Path]) -> list[str]:
    """Return the pickles among a model's files that can be converted; none if it has none of transformers' names.

    `read` gives the path of one of the files, to look into the index with.

    Raises:
        ModelError: the index is damaged.
    """
    names = set(names)
    if PICKLE in names:
        return [PICKLE]
    if INDEX not in names:
        return []
    try:
        pickles = parts_of(read(INDEX))
        if not pickles or any(Path(pickle).name != pickle for pickle in pickles):
            raise ValueError("a name that leads elsewhere")
    except ValueError:
        raise ModelError(f"{INDEX} is damaged", mend="get the model's files again") from None
    return pickles


def find_weights(
    name: str, model: Snapshot, *, online: bool, convert: bool, say: Callable[[str], object]
) -> Weights | None:
    """Return the safetensors that stand for a hub model's pickles; None if it needs none.

    A conversion that was made here comes first: somebody asked for it. Then the hub's own, which is pinned when it is
    first found. With neither, one is made with `convert`.

    Raises:
        ModelError: it has only pickles, and there is no conversion; or the making of one failed.
    """
    if has_safetensors(model.files):
        return None
    if made := _find_converted(_folder_of(name, model.commit)):
        return made
    found = _recall(name, model.commit)
    pickles = list_pickles(model.files, partial(_download, name, model.commit))
    if not found and pickles and online:
        with suppress(Exception):  # a hub that has none, or does not say
            found = find_conversion(name, model, pickles)
        if found:
            _remember(name, model.commit, found)
    if found:
        say(f"its weights are pickles; reading the hub's own conversion instead, commit {found[:12]}")
        return Weights(name, found, {"commit": found})
    if not pickles:
        return None
    if not convert:
        raise _refuse(name, pickles, ", and the hub has no conversion of its own")
    return _convert_hub(name, model.commit, pickles, say)


def weights_of_folder(name: str, folder: Path, convert: bool, say: Callable[[str], object]) -> Weights:
    """Return the safetensors that stand for a folder's pickles: made before, or now with `convert`.

    Raises:
        ModelError: there are none, or the making of them failed.
    """
    pickles = list_pickles((path.name for path in folder.iterdir()), folder.joinpath)
    if not pickles:
        raise _nothing_to_convert(name)
    paths = [folder / pickle for pickle in pickles]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ModelError(f"{missing[0]} is missing", where=f'model.source = "{name}"', mend="get the model again")
    hashes = {path.name: hash_file(path) for path in paths}
    kept = _folder_of(folder.resolve().name, hash_json(hashes))
    if (made := _find_converted(kept)) and made.record.items() >= hashes.items():
        return made
    if made:
        raise ModelError("the converted weights are another model's", where=str(kept), mend="remove this folder")
    if not convert:
        raise _refuse(name, pickles)
    return _convert(paths, hashes, kept, {"model": name}, say)


def convert_model(name: str, revision: str | None, say: Callable[[str], object]) -> Weights:
    """Convert the pickles of a hub model or a folder, where that is not done yet.

    Raises:
        ModelError: there is no such model, or it has no pickles that have to be converted.
    """
    folder = Path(name).expanduser()
    is_folder = folder.is_dir()
    if is_folder and revision is not None:
        raise ModelError("a folder has no revisions", where=name, mend="leave --revision out")
    model = Snapshot("", {path.name: "" for path in folder.iterdir()}) if is_folder else _look_up(name, revision)
    if has_safetensors(model.files):
        raise ModelError("it has safetensors weights: there is nothing to convert", where=name, mend="use it as it is")
    if is_folder:
        return weights_of_folder(name, folder, True, say)
    if made := _find_converted(_folder_of(name, model.commit)):
        return made
    pickles = list_pickles(model.files, partial(_download, name, model.commit))
    if not pickles:
        raise _nothing_to_convert(name)
    return _convert_hub(name, model.commit, pickles, say)


def _look_up(name: str, revision: str | None) -> Snapshot:
    """Ask the hub for a model, or the local cache where the hub is not to be asked.

    Raises:
        ModelError: the hub does not say.
    """
    try:
        return find_model(name, revision) or find_cached(name, revision or "main")
    except Exception as error:  # the hub's client raises a dozen kinds
        raise ModelError(
            f"it is no folder here, and asking {hub_address()} failed ({type(error).__name__})",
            where=name,
            mend=mend_for(error) or "check the name and the network",
        ) from error


def _convert_hub(name: str, commit: str, pickles: list[str], say: Callable[[str], object]) -> Weights:
    say(f"downloading {', '.join(pickles[:3])}")
    fetch_files(name, commit, pickles, say)
    paths = [_download(name, commit, pickle) for pickle in pickles]
    hashes = {path.name: hash_file(path) for path in paths}
    return _convert(paths, hashes, _folder_of(name, commit), {"model": name, "commit": commit}, say)


def _download(name: str, commit: str, file: str) -> Path:
    """Return the path of a file of a hub model in the hub's own cache.

    Raises:
        ModelError: it can't be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=commit))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise ModelError(
            f"{file} can't be downloaded ({type(error).__name__})",
            where=f'model.source = "{name}"',
            mend=mend_for(error) or "check the network and try again",
        ) from error


def _refuse(name: str, pickles: list[str], why: str = "") -> ModelError:
    return ModelError(
        f"{pickles[0]} is a pickle, which could run code, and is never opened unasked{why}",
        where=f'model.source = "{name}"',
        mend=f"fedloom convert {name}, or model.convert = true, reads it once, in a process without network, and keeps"
        " safetensors weights",
    )


def _nothing_to_convert(name: str) -> ModelError:
    return ModelError(
        f"it has no {PICKLE} that could be converted",
        where=name,
        mend="name a hub model or a folder with pickled weights",
    )


def _folder_of(name: str, revision: str) -> Path:
    """Return the folder in the cache for the conversion of a model at a revision."""
    return cache_folder() / "converted" / f"{name.replace('/', '--')[:100]}-{revision[:16]}"


def _find_converted(folder: Path) -> Weights | None:
    """Return the conversion that was made here, None if there is none.

    Raises:
        ModelError: it is no longer as it was made.
    """
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        whole = hash_file(folder / SAFETENSORS) == record["hashes"][SAFETENSORS]
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ModelError("the converted weights are damaged", where=str(folder), mend="remove this folder")
    return Weights(str(folder), "main", record["hashes"])


def _convert(
    pickles: list[Path], hashes: Mapping[str, str], folder: Path, about: Mapping[str, str], say: Callable[[str], object]
) -> Weights:
    """Convert a model's pickles to one safetensors file in a folder of the cache, whole or not at all.

    `about` names the model, and is kept in the record beside the hashes.

    Raises:
        ModelError: they hold more than weights, are damaged, or need more memory or time than they should; or the
            cache can't be written to.
    """
    names = ", ".join(pickle.name for pickle in pickles[:3]) + (", ..." if len(pickles) > 3 else "")
    say(f"reading {names}, once, in a process without network; kept as safetensors in {folder.parent}")
    try:
        with replace_folder(folder, existing="keep") as temporary:
            isolated = _read_apart(pickles, temporary / SAFETENSORS)
            hashes = {**hashes, SAFETENSORS: hash_file(temporary / SAFETENSORS)}
            record = {**about, "hashes": hashes, "network_namespace": isolated, "torch": torch.__version__}
            replace_file(temporary / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    except unpickle.NotWeightsError as error:
        raise ModelError(
            f"{names} can't be converted: {error}", where=about["model"], mend="use a model with safetensors weights"
        ) from None
    except OSError as error:
        raise ModelError(
            f"the weights can't be converted ({error.strerror})", where=str(folder.parent), mend="set FEDLOOM_CACHE"
        ) from error
    return Weights(str(folder), "main", hashes)


def _read_apart(pickles: list[Path], to: Path) -> bool:
    """Read pickles in a process of its own and write safetensors; return whether it had a network namespace.

    Raises:
        NotWeightsError: it failed, and why.
    """
    size = sum(pickle.stat().st_size for pickle in pickles)
    seconds = LEAST_SECONDS + int(size / BYTES_PER_SECOND)
    said = to.with_name("said.json")
    with ExitStack() as stack:
        inputs = [stack.enter_context(pickle.open("rb")).fileno() for pickle in pickles]
        output = stack.enter_context(to.open("wb")).fileno()
        answer = stack.enter_context(said.open("wb"))
        asked = {
            # What a sealed interpreter leaves out: whoever installed torch elsewhere named that place.
            "path": [entry for entry in sys.path if os.path.isabs(entry)],
            "inputs": inputs,
            "output": output,
            "memory_bytes": LEAST_BYTES + 2 * size,
            "seconds": seconds,
            "output_bytes": LEAST_BYTES + 2 * size,
        }
        # Isolated (-I), and with nothing of this environment: tokens and proxies are in there.
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        with subprocess.Popen(
            [sys.executable, "-I", unpickle.__file__, json.dumps(asked)],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env={**kept, "OMP_NUM_THREADS": "1"},
            cwd="/",
            pass_fds=[*inputs, output],
        ) as process:
            try:
                code: int | None = process.wait(2 * seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
    with said.open("rb") as file:
        told = _parse(file.read(2**16))
    said.unlink()
    if code == 0 and "isolated" in told:
        with suppress(SafetensorError, OSError), safe_open(to, framework="pt"):
            return bool(told["isolated"])
    stopped = code in (None, -signal.SIGKILL, -signal.SIGXCPU)
    why = told.get("error") or (
        f"it takes more than {seconds} s or too much memory" if stopped else "reading it failed"
    )
    raise unpickle.NotWeightsError(str(why)[:300])


def _parse(text: bytes) -> dict[str, Any]:
    """Read what a process said that may have been taken over: a JSON object, or nothing."""
    with suppress(ValueError, RecursionError):
        told = json.loads(text)
        if isinstance(told, dict):
            return told
    return {}


def _remember(name: str, commit: str, conversion: str) -> None:
    """Keep which conversion of the hub stands for a model's commit: for later runs, and for those without a network."""
    with suppress(OSError):  # it is asked for again
        path = _pin(name, commit)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"model": name, "commit": commit, "conversion": conversion}).encode())


def _recall(name: str, commit: str) -> str | None:
    """Return the commit of the hub's conversion that `_remember` kept, None if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(_pin(name, commit).read_text(encoding="utf-8"))["conversion"])
    return None


def _pin(name: str, commit: str) -> Path:
    folder = _folder_of(name, commit)
    return folder.with_name(f"{folder.name}.json")
