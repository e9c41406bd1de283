"""Imports what is no part of the package: a script, an example."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


def import_file(path: Path) -> ModuleType:
    """Return a file of the repository as a module, made anew; it finds what lies beside it, as a script does."""
    spec = spec_from_file_location(f"imported_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look for the names in their types
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module
