"""Processes of this host."""

import os
from pathlib import Path


def process_exists(pid: int) -> bool:
    """Return whether a process of this host has this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


def began(pid: int) -> str | None:
    """When a process of this host began, in ticks of its kernel; None if it has ended, "" where no kernel says when."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may have blanks
    except OSError:
        return None if Path("/proc/self/stat").exists() or not process_exists(pid) else ""
    return None if fields[0] in "ZX" else fields[19]
