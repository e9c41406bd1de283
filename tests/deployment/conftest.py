"""Shared federation for all tests that only look at what it did: to start one takes as long as all else here."""

import pytest
from support.federation_here import Served, serve_for_many_tests


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Needs Flower, and `pytest.mark.xdist_group("served")`, so that one test worker alone starts it."""
    return serve_for_many_tests(tmp_path_factory.mktemp("served"))
