"""Federated fine-tuning of language models with adapters held together by FedProx.

A first run, from Python:

from fedloom import load_recipe, run, read_run
finished = run(load_recipe("tiny", ["federation.rounds=2"]))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.experiment.recognition import open_recipe as load_recipe
    from fedloom.experiment.run import plan, run
    from fedloom.records.run import read_run

__version__ = "0.1.0"

_HOMES = {
    "load_recipe": ("experiment.recognition", "open_recipe"),
    "plan": ("experiment.run", "plan"),
    "read_run": ("records.run", "read_run"),
    "run": ("experiment.run", "run"),
}
__all__ = ["load_recipe", "plan", "read_run", "run"]


def __getattr__(name: str) -> Any:
    # Looked up when used: importing fedloom must not import torch.
    if name in _HOMES:
        from fedloom.host.imports import quick_imports

        module, there = _HOMES[name]
        with quick_imports():
            return getattr(import_module(f"fedloom.{module}"), there)
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
