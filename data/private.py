"""Files with known names in folders that all users of a machine share, such as /tmp and /dev/shm.

Another user may have put a link of such a name there, to a file that would be emptied, or a folder whose content would
be trusted. So they lie in a folder that only its owner can enter, and are never opened through a link.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data.errors import DataError

SECONDS_BEFORE_MESSAGE = 3.0
SECONDS_BETWEEN_TRIES = 0.05
MOST_SECONDS = 24 * 3600.0
"""Whoever holds a lock for longer is taken to hang."""


class HeldError(DataError):
    """Another process, which the message names, holds a lock."""


def users_folder(shared: Path) -> Path:
    """Return this user's folder in a shared one; make it if it does not exist.

    Raises:
        DataError: others may have written there.
    """
    folder = shared / f"tritrain-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise DataError(
            f"{folder}: must be a folder that only you (user {os.getuid()}) can enter; it is "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}. Others may have written there: have it removed"
        )
    return folder


def no_follow(path: str, flags: int) -> int:
    """Open a file that is not a link, as an `opener` of `open`.

    Raises:
        OSError: it is a link, or cannot be opened.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        reason = f"is a link to {os.readlink(path)}, which would be written; remove the link"
        raise OSError(errno.ELOOP, reason, path) from error


@contextlib.contextmanager
def locked(path: Path, purpose: str, *, wait: bool = True) -> Iterator[IO[str]]:
    """Hold a lock of this machine while the block runs; a process that dies lets go.

    Args:
        path: a file for it, made if it does not exist.
        purpose: why to wait, for the message that names the holder.
        wait: for a process that holds it, instead of raising an error.

    Returns:
        The file, open.

    Raises:
        HeldError: another process holds it, after `MOST_SECONDS` if it was waited for; names that process.
        OSError: the file can be neither made nor read, or is a link.
    """
    with _open_lock(path) as lock:
        waited = 0.0  # not by a clock, which would count the time in which both processes are suspended
        has_told = os.environ.get("LOCAL_RANK", "0") != "0"  # a rank's first neighbor says it, or is the one waited for
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read() or "another process"
                if not wait:
                    raise HeldError(holder) from None
                if waited >= MOST_SECONDS:
                    raise HeldError(f"{holder}, and this one has waited for {MOST_SECONDS / 3600:g} hours") from None
                if not has_told and waited >= SECONDS_BEFORE_MESSAGE:
                    print(f"Waiting for {holder}, which holds {path}: {purpose}.", file=sys.stderr, flush=True)  # noqa: T201
                    has_told = True
                time.sleep(SECONDS_BETWEEN_TRIES)
                waited += SECONDS_BETWEEN_TRIES
        if lock.writable():
            os.ftruncate(lock.fileno(), 0)
            with contextlib.suppress(OSError):  # of a full disk; the lock holds all the same
                os.write(lock.fileno(), os.fsencode(holder_text()))
        yield lock


def holder_text() -> str:
    """This process, as a lock names its holder."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def is_at(file: IO[str], path: Path) -> bool:
    """Return whether an open file is still the one of this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    return False


def _open_lock(path: Path) -> IO[str]:
    try:
        return open(path, "a+", opener=no_follow)
    except PermissionError:
        if not os.path.exists(path):
            raise
        # Another user has left it, perhaps; to lock a file, reading it is enough.
        return open(path, opener=no_follow)
