"""Export of a run's adapter, or of the model with it merged in, proven to give the run's logits."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch

from fedloom.errors import RunError
from fedloom.handover.gguf import DEFAULT_KIND, write_file
from fedloom.handover.merging import merge, open_merged, open_with_peft, save_merged
from fedloom.handover.ollama import export_for_ollama
from fedloom.handover.proof import TEMPLATE_FILE, TOLERANCES, Subject, open_subject
from fedloom.host.files import new_file, replace_folder, writing
from fedloom.model.gguf_writer import KINDS
from fedloom.monitoring.observer import Observer

GGUF = ".gguf"


def export(
    folder: str | Path,
    to: str | Path,
    *,
    merged: bool = False,
    kind: str | None = None,
    ollama: bool = False,
    which: str | int = "best",
    display: Observer | None = None,
) -> float:
    """Copy a run's adapter, or write the base model with it merged in, and prove the export by its logits.

    A target that ends in `.gguf` is a file for llama.cpp, and with `ollama` the folder is one for Ollama; `kind` is the
    format of a whole model's weights there.
    Returns how far the export's logits are from the run's on a few hold-out blocks, relative to their norm: 0.0 for a
    copied adapter.

    Raises:
        RunError: there is no such run or adapter, the target exists or can't be written, PEFT can't merge this method,
            llama.cpp can't hold it, or the export does not give the same logits.
        ModelError: the base model or the export can't be read.
    """
    display = display or Observer()
    to = Path(to)
    check_target(to)
    if kind and not (ollama or (is_gguf(to) and merged)):
        raise RunError("only a merged .gguf file has a choice of formats", where="--as", mend="leave it out")
    if kind and kind not in KINDS:
        raise RunError(f'no format "{kind}"', where="--as", mend=f"known: {', '.join(KINDS)}")
    subject = open_subject(Path(folder), which, display)
    if ollama:
        return export_for_ollama(subject, to, merged=merged, kind=kind, display=display)
    return write_export(subject, to, merged=merged, kind=kind, display=display)


def is_gguf(to: Path) -> bool:
    """Return whether a target is a file for llama.cpp: by its ending, in capitals too."""
    return to.suffix.lower() == GGUF


def check_target(to: Path) -> None:
    """Refuse a target that exists.

    Raises:
        RunError
    """
    try:
        exists = to.exists()
    except OSError as error:  # a name that is too long, say
        raise RunError(f"not a possible target ({error.strerror})", mend="name another") from error
    if exists:
        raise RunError("the target exists", where=str(to), mend="name another, or remove it")


def write_export(
    subject: Subject, to: Path, *, merged: bool = False, kind: str | None = None, display: Observer
) -> float:
    """Write an export of an opened run as `export` does."""
    # Written and proven beside the target, and renamed only then: what is at the target is always proven.
    place = new_file(to) if is_gguf(to) else replace_folder(to, existing="refuse")
    with writing(to, "name another with --to"), place as written:
        display.show_step("writing", str(to))
        whole = merged or subject.adapted.is_whole
        if is_gguf(to):
            opened, tolerance = write_file(subject, written, kind or DEFAULT_KIND, whole=whole)
        else:
            opened, tolerance = _write_folder(subject, written, merged=merged)
        display.show_step("proof", f"logits of {len(subject.tokens_BT)} hold-out blocks")
        return subject.prove(opened, to, tolerance)


def _others(folder: str, names: list[str]) -> list[str]:
    """Return what in an adapter's folder is none of the run's: links, and hidden files that an editor left."""
    return [name for name in names if name.startswith(".") or Path(folder, name).is_symlink()]


def _write_folder(subject: Subject, written: Path, *, merged: bool) -> tuple[torch.nn.Module, float]:
    """Write a folder that PEFT or transformers opens, and open it; return it with how far its logits may be."""
    adapted = subject.adapted
    if merged and not adapted.is_whole:
        with warnings.catch_warnings():
            # Libraries warn about each other, which nobody here can mend.
            warnings.simplefilter("ignore")
            save_merged(merge(subject), written)
        subject.source.tokenizer.save_pretrained(written)
    else:
        shutil.copytree(subject.folder, written, dirs_exist_ok=True, ignore=_others)
    if subject.chat_template is not None:
        (written / TEMPLATE_FILE).write_text(subject.chat_template, encoding="utf-8")
    if merged or adapted.is_whole:
        opened = open_merged(written, subject)
    else:
        with warnings.catch_warnings():
            # PEFT warns about layers that it knows less well.
            warnings.simplefilter("ignore")
            opened = open_with_peft(subject, written)
    # A residual is read back as further ranks of the adapter, which also sum in another order.
    rounds_otherwise = (merged and not adapted.is_whole) or subject.adapter.residual is not None
    # A GPU's kernels are chosen by where in memory a tensor begins, too.
    rounds_otherwise |= adapted.device.type == "cuda"
    return opened, TOLERANCES[subject.dtype] if rounds_otherwise else 0.0
