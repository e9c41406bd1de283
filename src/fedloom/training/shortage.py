"""Memory that runs out while clients train: how to tell it, and what to say of it."""

from __future__ import annotations

import torch

from fedloom.errors import TrainingError
from fedloom.training.jobs import ClientJob

SHORT = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""What it may come as; `is_shortage` tells which of the last it is."""
WORDS = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_shortage(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def too_large(job: ClientJob, error: Exception) -> TrainingError:
    """For one client there is not enough."""
    training = job.training
    keys = f"training.batch_size ({training.batch_size}) or data.max_length ({job.blocks.tokens_NT.shape[1]})"
    more = "" if training.gradient_checkpointing else ", or set training.gradient_checkpointing"
    return TrainingError(
        f"there is not enough memory to train a single client ({type(error).__name__})",
        round=job.round,
        client=job.client,
        stage="training",
        mend=f"lower {keys}{more}",
    )
