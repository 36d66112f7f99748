"""Make new files and folders: complete under their name, or not at all.

What is made gets a private name beside its own, no other process or user has it, and is renamed when it has reached
the disk. A lock keeps two processes from making the same at once; it ends with its process, however that ends. What a
killed process left behind under a private name is removed by the next one that makes the same.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data.errors import DataError
from data.private import HeldError, locked

SUFFIX = ".tritrain-tmp"


class TakenError(DataError):
    """A new file or folder cannot have its name; says why."""


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that gets its name when the block ends without an error.

    Args:
        path: of the folder; a link is followed to where it leads. Missing folders above it are made.

    Returns:
        An empty folder beside it, to be filled.

    Raises:
        TakenError: there is something of that name, now or at the end, or another process is making it.
        OSError: it cannot be made.
    """
    with exclusive(path, wait=False), private_folder(path) as building:
        yield building


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file that gets its name when the block ends without an error; as `new_folder`.

    Returns:
        Its private name, of which there is no file yet.
    """
    with exclusive(path, wait=False), _renamed(path, is_folder=False) as building:
        yield building


@contextmanager
def private_folder(path: Path) -> Iterator[Path]:
    """As `new_folder`, where the caller has locked the path with `exclusive`."""
    with _renamed(path, is_folder=True) as building:
        building.mkdir()
        yield building


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[None]:
    """Let one process at a time make a path.

    Args:
        path: of what is made, by any of its names.
        wait: for a process that is making it, instead of raising an error.

    Raises:
        TakenError: another process is making it.
        OSError: nothing can be written beside it.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.tritrain-lock")
    with contextlib.ExitStack() as stack:
        while True:
            try:
                held = stack.enter_context(locked(lock, f"one process at a time makes {path}", wait=wait))
            except HeldError as holder:
                raise TakenError(f"{path}: {holder} is writing it; wait for that, or choose another name") from None
            if _is_at(held, lock):
                break
            stack.close()  # whoever had it has removed the file meanwhile
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _is_at(file: IO[str], path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    return False


@contextmanager
def _renamed(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """A private name, renamed to ``path`` at the end; it is the only one, because the path is locked."""
    path = Path(os.path.realpath(path))
    check_free(path, is_folder=is_folder)
    own_names = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{16}" + re.escape(SUFFIX))
    for name in os.listdir(path.parent):
        if own_names.fullmatch(name):
            _remove(path.parent / name)
    building = path.with_name(f".{path.name}.{secrets.token_hex(8)}{SUFFIX}")
    try:
        yield building
        _flush(building)
        check_free(path, is_folder=is_folder)
        building.rename(path)
        _flush(path.parent, inside=False)
    except BaseException:
        _remove(building)
        raise


def check_free(path: Path, *, is_folder: bool) -> None:
    """Check that a name can be given to what is yet to be made: nothing has it, or, for a folder, an empty one.

    Raises:
        TakenError: it cannot.
    """
    if os.path.lexists(path) and not (is_folder and path.is_dir() and not any(path.iterdir())):
        raise TakenError(f"{path}: already exists; choose another name, or remove it")


def _flush(path: Path, *, inside: bool = True) -> None:
    """Make sure that a file, or a folder with everything in it, has reached the disk."""
    if inside and path.is_dir():
        for child in path.iterdir():
            _flush(child)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
