"""Make files and folders that are complete under their name, or not there at all.

What is made gets a private name beside its own, no other process or user has it, and is renamed when it has reached
the disk. A lock keeps two processes from making the same new one at once; it ends with its process, however that ends.
Some file systems of clusters keep such locks within a host, so a private name says whose it is: what a killed process
left behind is removed by the next one on the same host that makes the same, and nothing else is.
"""

import contextlib
import errno
import hashlib
import os
import pwd
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data.errors import DataError
from data.private import HeldError, is_at, locked
from data.processes import began

SUFFIX = ".tritrain-tmp"
LOCK_SUFFIX = ".tritrain-lock"

MOUNTS = Path("/proc/self/mountinfo")
"""One mount a line, its place in the fifth field (proc_pid_mountinfo(5))."""

STEM_BYTES = 64
"""A private name keeps this much of a long name, so that it fits into the 255 bytes that file systems allow."""

CANNOT_LOCK = (errno.EACCES, errno.EPERM, errno.EBADF)
"""Errors of a file that may not be opened, or, on NFS, not be locked because it may only be read."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing, whose system call names no file."""


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
    with exclusive(path, wait=False), folder_being_made(path) as building:
        yield building


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file that gets its name when the block ends without an error; as `new_folder`.

    Returns:
        Its private name, of which there is no file yet.
    """
    with exclusive(path, wait=False), _new(path, is_folder=False) as building:
        yield building


@contextmanager
def folder_being_made(
    path: Path,
    *,
    adopt: Callable[[Path], bool] | None = None,
    keep: tuple[type[BaseException], ...] = (),
    drop: Sequence[str] = (),
) -> Iterator[Path]:
    """As `new_folder`, where the caller has locked the path with `exclusive`.

    Args:
        path: of the folder.
        adopt: says of a folder that a dead process has left whether it can be completed; the first such one is given
            to the block, and others are removed.
        keep: exceptions that leave what was made, for `adopt`.
        drop: files in it that only `adopt` needs; they are removed when all has reached the disk.
    """
    with _new(path, is_folder=True, adopt=adopt, keep=keep, drop=drop) as building:
        building.mkdir(exist_ok=True)
        yield building


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a whole file in the place of an earlier one, or of none.

    Args:
        path: of the file; a link is replaced, not followed.
        content: of it.
        durable: whether it must have reached the disk before it takes the name, and the name before this returns.

    Raises:
        OSError: it cannot be written; the earlier one is unchanged.
    """
    kept = None
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        kept = stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None

    def with_permissions(name: str, flags: int) -> int:
        return os.open(name, flags, 0o666 if kept is None else kept)  # less what the umask forbids

    with file_being_replaced(path, durable=durable) as building, open(building, "xb", opener=with_permissions) as file:
        if kept is not None and stat.S_IMODE(os.fstat(file.fileno()).st_mode) != kept:
            os.fchmod(file.fileno(), kept)
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def file_being_replaced(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """As `replace_file`, for a file that the block writes; an earlier one's permissions are not kept.

    Returns:
        Its private name, of which there is no file yet.
    """
    with _renamed(path, durable=durable) as building:
        yield building


@contextmanager
def exclusive(path: Path, *, wait: bool) -> Iterator[None]:
    """Let one process at a time make a path.

    Args:
        path: of what is made, by any of its names.
        wait: for a process that is making it, instead of raising an error.

    Raises:
        TakenError: another process is making it, or it is a mount point, whose name nothing new can take.
        OSError: nothing can be written beside it.
    """
    path = Path(os.path.realpath(path))
    if is_mount_point(path):
        raise TakenError(f"{path}: is a mount point; name a new folder in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise TakenError(f"{path}: {error.filename} is a file, not a folder; choose another name") from None
    lock = path.with_name(f".{_stem(path)}{LOCK_SUFFIX}")
    with contextlib.ExitStack() as stack:
        while True:
            try:
                held = stack.enter_context(locked(lock, f"one process at a time makes {path}", wait=wait))
            except HeldError as holder:
                raise TakenError(f"{path}: is being written by {holder}; wait, or choose another name") from None
            except OSError as error:
                if error.errno not in CANNOT_LOCK:
                    raise OSError(error.errno, error.strerror, str(path)) from error
                if not os.path.exists(lock):
                    raise PermissionError(error.errno, error.strerror, str(path)) from None
                raise TakenError(
                    f"{path}: its lock {lock} belongs to user {_owner(lock)}, and you may not lock it. If that user "
                    "is not making it, have the lock removed; otherwise choose another name"
                ) from None
            if is_at(held, lock):
                break
            stack.close()  # whoever had it has removed the file meanwhile
        try:
            yield
        finally:
            _remove(lock)


def is_mount_point(path: Path) -> bool:
    """Return whether something is mounted on a real path, even if it is of the same file system.

    Linux lists such mounts as it lists all; `os.path.ismount` sees only that another file system begins.
    """
    if os.path.ismount(path):
        return True
    try:
        mounts = MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    wanted = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(path))
    return any(mount.split()[4:5] == [wanted] for mount in mounts)


def _owner(path: Path) -> str:
    uid = path.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@contextmanager
def _new(
    path: Path,
    *,
    is_folder: bool,
    adopt: Callable[[Path], bool] | None = None,
    keep: tuple[type[BaseException], ...] = (),
    drop: Sequence[str] = (),
) -> Iterator[Path]:
    """A private name of a path that is locked, renamed to it at the end."""
    path = Path(os.path.realpath(path))
    check_free(path, is_folder=is_folder)
    begun: Path | None = None
    for name in sorted(os.listdir(path.parent)):
        if _is_leftover(name, path):
            if begun is None and adopt is not None and adopt(path.parent / name):
                begun = path.parent / name
            else:
                _remove(path.parent / name)
    check = partial(check_free, path, is_folder=is_folder)
    with _renamed(path, check=check, begun=begun, keep=keep, drop=drop) as building:
        yield building


@contextmanager
def _renamed(
    path: Path,
    *,
    durable: bool = True,
    check: Callable[[], None] = lambda: None,
    begun: Path | None = None,
    keep: tuple[type[BaseException], ...] = (),
    drop: Sequence[str] = (),
) -> Iterator[Path]:
    """A private name, of ``begun`` if there is one, renamed to ``path`` if ``check`` raises no error at the end."""
    number = f"{os.getpid()}-{began(os.getpid())}"
    building = path.with_name(f"{_private_prefix(path)}{number}.{secrets.token_hex(8)}{SUFFIX}")
    if begun is not None:
        os.replace(begun, building)
    try:
        yield building
        if durable:
            _flush_all(building)
        check()
        for name in drop:
            (building / name).unlink(missing_ok=True)
        try:
            os.replace(building, path)
        except OSError:
            check()  # of two that come this far, one says that the other was first
            raise
        if durable:
            flush(path.parent)
    except BaseException as error:
        named = _named(error, building, path)
        if not isinstance(error, keep):
            _remove(building)
        if named is not None:
            raise named from error
        raise


def _named(error: BaseException, building: Path, path: Path) -> OSError | None:
    """An error with the name that the user gave, for one with a private name or none; None if it is to stay as it is.

    Libraries report that a write was cut short, but not that the disk is full; so that is looked up.
    """
    code, name = (error.errno, str(error.filename or "")) if isinstance(error, OSError) else (None, "")
    if type(error) in (OSError, RuntimeError) and code is None and os.statvfs(path.parent).f_bavail == 0:
        code = errno.ENOSPC
    if code is None or not (name.startswith(str(building)) or (not name and code in NO_ROOM)):
        return None
    return OSError(code, os.strerror(code), f"{path}{name.removeprefix(str(building))}")


def _private_prefix(path: Path) -> str:
    """How the private names begin that processes of this host give to a path."""
    return f".{_stem(path)}.{socket.gethostname()[:STEM_BYTES].replace('/', '-')}."


def _stem(path: Path) -> str:
    """The name of a path; of a long one the first part and a digest."""
    name = os.fsencode(path.name)
    if len(name) <= STEM_BYTES:
        return path.name
    return f"{name[:STEM_BYTES].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:16]}"


def _is_leftover(name: str, path: Path) -> bool:
    """Return whether a name is one that a process of this host gave to a path, which is locked, and has left behind."""
    prefix, suffix = re.escape(_private_prefix(path)), re.escape(SUFFIX)
    found = re.fullmatch(rf"{prefix}(\d+)(?:-(\d*))?\.[0-9a-f]{{16}}{suffix}", name)
    return found is not None and not _is_at_work(int(found[1]), found[2])


def _is_at_work(pid: int, start: str | None) -> bool:
    """Return whether another process of this host has this number, and began then; where that is not known, it may."""
    # A container gives its processes the numbers of those of the one before.
    now = None if pid == os.getpid() else began(pid)
    return now is not None and (not start or not now or now == start)


def check_free(path: Path, *, is_folder: bool) -> None:
    """Check that a name can be given to what is yet to be made: nothing has it, or, for a folder, an empty one.

    Raises:
        TakenError: it cannot.
        OSError: no file can have it, because it is too long, for example.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return
    if not (is_folder and path.is_dir() and not any(path.iterdir())):
        raise TakenError(f"{path}: already exists; choose another name, or remove it")


def _flush_all(path: Path) -> None:
    """Make sure that a file, or a folder with everything in it, has reached the disk."""
    if path.is_dir():
        for child in path.iterdir():
            _flush_all(child)
    flush(path)


def flush(path: Path) -> None:
    """Make sure that the content of a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or folder, as far as this user may."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
