"""Disk space that a run needs, and what is free."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.plan.course import Course
from launcher.plan.exports import Export
from launcher.plan.memory import checkpoint_bytes


def disk_of(course: Course, checkpoints_kept: int, there: int, exports: Sequence[Export]) -> dict[str, Any]:
    """Bytes for checkpoints still to come (of those kept, and one that is being written), for exports, and bytes free.

    Args:
        course: of the run.
        checkpoints_kept: at the end.
        there: complete ones that are on the disk already.
        exports: that are asked about, one of each; those that cannot be made need no space.

    Returns:
        Numbers by name with unit. `free_bytes` is of the checkpoints' disk, None for a store.
    """
    place = course.config.checkpoints
    checkpoints = max(0, checkpoints_kept + 1 - there) * checkpoint_bytes(course)
    exported = sum(export.num_bytes for export in exports if not export.problems)
    free = None if "://" in place else shutil.disk_usage(existing_part(Path(place))).free
    return {
        "place": place,
        "checkpoints_bytes": checkpoints,
        "exports_bytes": exported,
        "needed_bytes": checkpoints + exported,
        "free_bytes": free,
    }


def existing_part(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists: what is made below lies on the same disk."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
