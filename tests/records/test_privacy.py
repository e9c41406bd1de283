"""What pages say of a run's noise: no more than is known."""

import pytest

from fedloom.records.privacy import explain_noise

TERMS = {"units": 100, "rate": 0.1, "noise_multiplier": 1.5, "steps": 6, "epsilon": 8.0, "recognised": 0.3}


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.15, "0.15: worth trying (a rule"),
        (0.5, "0.5: some of what is"),
        (2.2, "2.2: noise moves more than training can"),
    ],
)
def test_a_share_of_noise_is_a_rule_of_thumb_and_no_verdict(share: float, said: str) -> None:
    privacy = {"unit": "document", "max_norm": 1.0, "noise_over_signal": share, "clients": {"0": TERMS}}
    told = explain_noise(privacy)
    assert f"noise over signal after the run {said}" in told
    assert told.endswith("the held-out loss tells what was learnt)")
    assert "learns noise" not in told
