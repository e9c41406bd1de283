"""What a server says before it waits for anybody."""

import pytest

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from fedloom.deployment.server.ground import describe_room


@pytest.mark.parametrize(
    ("payload", "free", "says"),
    [
        (6_300_000, 2**30, ""),
        (
            100_000_000,
            24 * 10**9,
            "an adapter of 100.0 MB takes up to 1.2 GB here while it travels, of 24.0 GB that are free; up to 900.0 MB"
            " on each client, beside its model",
        ),
        (
            500_000_000,
            5 * 10**9,
            "takes up to 6.0 GB here while it travels, of 5.0 GB that are free; it is likely to fail",
        ),
    ],
)
def test_what_an_adapter_takes_on_its_way_is_said_before_anybody_trains(payload: int, free: int, says: str) -> None:
    assert says in describe_room(payload, free)
    assert bool(describe_room(payload, free)) == bool(says)
