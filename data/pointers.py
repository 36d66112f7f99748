"""Recognize files that stand for others: what git-lfs and git-annex leave where content was not fetched."""

from pathlib import Path

MAX_POINTER_BYTES = 1024
"""Pointers of git-lfs are smaller (github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""

PROGRAMS = {
    b"version https://git-lfs.github.com/spec/": ("git-lfs", "git lfs pull"),
    b"version https://hawser.github.com/spec/": ("git-lfs", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
"""What a pointer begins with, the program that wrote it, and its command that fetches content."""


def pointer_problem(path: Path) -> str | None:
    """Say what to do about a file that is only a pointer to its content; None if it is not one or cannot be read."""
    try:
        if path.stat().st_size >= MAX_POINTER_BYTES:
            return None
        with path.open("rb") as file:
            start = file.read(MAX_POINTER_BYTES)
    except OSError:
        return None
    for beginning, (program, command) in PROGRAMS.items():
        if start.startswith(beginning):
            return f"is a pointer of {program}, and its content was not fetched; run `{command}` in its folder"
    return None
