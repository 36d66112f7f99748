"""Limits of what a test may take."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MORE_MEMORY_BYTES = 6 * 2**30  # of addresses, most of which threads reserve
SECONDS = 20


@contextmanager
def limited() -> Iterator[None]:
    """Let nothing allocate gigabytes or take long."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_MEMORY_BYTES, hard))
    began = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.monotonic() - began < SECONDS
