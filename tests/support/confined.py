"""Generated programs are confined by namespaces, which not every machine gives."""

import pytest

from fedloom.errors import RunError
from fedloom.evaluation.code_runs import run_program


def need_confinement() -> None:
    """Skip a test where this machine can't confine a program."""
    try:
        run_program("")
    except RunError as error:
        pytest.skip(str(error))
