"""Shared federation for all tests that only look at what it did: to start one takes as long as all else here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.federation_here import Served


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Needs Flower, and `pytest.mark.xdist_group("served")`, so that one test worker alone starts it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert any(item.nodeid.endswith("@served") for item in request.session.items), "pytest-xdist lost the group"
    # Not before: it imports torch, which the process that hands out tests does without.
    from support.federation_here import serve_for_many_tests

    return serve_for_many_tests(tmp_path_factory.mktemp("served"))


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that doesn't wait between two looks for answers."""
    monkeypatch.setattr("fedloom.deployment.server.exchange.POLL_SECONDS", 0.001)
    monkeypatch.setattr("fedloom.deployment.server.exchange.ATTEND_SECONDS", 0.0)
