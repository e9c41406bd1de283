"""Disk that takes no more, for the file that grows: the kernel's limit of a file's size stands for it, without root."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_file_above(most_bytes: int) -> Iterator[None]:
    """Let this process write no file beyond so many bytes: a part of what is written there is taken, as by a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
