"""Shortage of memory: the errors by which a device says that it ran out."""

from __future__ import annotations

import torch

SHORT = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""Errors by which a shortage of memory may show; `is_shortage` tells which of the last kind it is."""
_WORDS = (
    *("can't allocate memory", "not enough memory", "CUDA out of memory", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED"),
)


def is_shortage(error: Exception) -> bool:
    """Return whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
