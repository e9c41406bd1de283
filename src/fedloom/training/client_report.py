"""Report of a client's work in a round, which is told, kept and read back. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClientReport:
    """Report of a client's work in a round. Losses are nats per token; times have no effect."""

    round: int
    client: int
    examples: int
    tokens: int
    """Real tokens trained on, every epoch counted; 0 with a ration, as their number tells of the documents."""
    steps: int
    proximal_mu: float
    loss_first: float | None
    """Loss of the first step; with a ration, no loss is told."""
    loss_last: float | None
    loss_mean: float | None
    """Mean loss over steps; the proximal term is left out."""
    proximal_loss: float
    """μ/2 ‖w − w_global‖², the mean over steps, as it stood in the objective."""
    proximal_ratio: float
    """The norm of the proximal gradient over that of the (noised) loss gradient, the mean over steps."""
    drift: float
    """‖w − w_global‖ after the last step."""
    seconds: float
    """Seconds of training."""
    evaluate_seconds: float = 0.0
    """Seconds of evaluation on the client's own hold-out, after training."""
    holdout_loss_before: float | None = None
    holdout_loss_after: float | None = None
