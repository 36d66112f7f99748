"""Locations of folders: local paths, or URLs of any store that fsspec supports (`s3://`, `gs://`, ...)."""

import atexit
import contextlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.new_paths import TakenError, flush, new_folder
from data.urls import redacted, url_problem
from launcher.errors import CheckpointError

FLOW_BYTES = 32 * 2**20


PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def to_location(text: str | Path) -> Path:
    """Turn text into a path; a URL becomes a `launcher.checkpoint.remote_path.RemotePath`, with the same methods.

    Raises:
        CheckpointError: the text is blank, which to a path is the current folder; or the URL has credentials or no
            bucket in it, or what is needed to reach the store is missing.
    """
    url = str(text)
    if not url.strip():
        raise CheckpointError("the name of a folder is blank; write . for the current one")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Path(text)
    if scheme == "file":
        return Path(rest)
    if problem := url_problem(url):
        raise CheckpointError(problem)
    if scheme in PACKAGES and not rest.strip("/"):
        raise CheckpointError(f"{url}: names no bucket; write {scheme}://BUCKET/FOLDER")
    try:
        from launcher.checkpoint.remote_path import remote_path

        return cast(Path, remote_path(url))
    except (ImportError, ValueError) as error:
        advice = f"; `pip install {PACKAGES[scheme]}`" if scheme in PACKAGES else ""
        raise CheckpointError(f"{url}: this kind of store cannot be reached: {error}{advice}") from error


def is_local(location: Path) -> bool:
    """Return whether a location is on this machine's file systems."""
    return isinstance(location, Path)


@contextmanager
def reaching(location: Path) -> Iterator[None]:
    """Turn any failure of a store into one clear error; clients of remote stores raise many kinds.

    Raises:
        CheckpointError: with the location, what the store says and what may help.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and (is_local(location) or type(error).__module__ == "builtins"):
            raise  # a defect
        name = type(error).__name__
        advice = "" if is_local(location) else " Check the network and the endpoint."
        if not is_local(location):
            if isinstance(error, PermissionError) or "Credentials" in name:
                advice = " Check the credentials and what they may do there."
            elif isinstance(error, FileNotFoundError):
                advice = " Check that the bucket exists and is spelled right."
        raise CheckpointError(f"{location}: {name}: {redacted(str(error))}.{advice}") from error


def check_writable(folder: Path) -> None:
    """Make sure that files can be written below a folder, before hours of work depend on it.

    Raises:
        CheckpointError: they cannot.
    """
    with reaching(folder):
        if is_local(folder):
            folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"writable-{os.getpid()}"
        try:
            probe.write_bytes(b"yes")
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing; it has reached the disk, or the store, when the block ends."""
    opened = io.BufferedWriter(_Flowing(path, "wb")) if is_local(path) else path.open("wb")
    with opened as file:
        try:
            yield cast(BinaryIO, file)
        except BaseException:
            if not is_local(path):
                _discard(file)
            raise
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())


class _Flowing(io.FileIO):
    """A file that is flushed to the disk while it is being written, instead of all at once at its end."""

    behind = 0

    def write(self, data: Any) -> int:
        """Write, and now and then have the kernel begin to flush; it also gives up the pages that are done."""
        count = super().write(data)
        self.behind += count
        if self.behind >= FLOW_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.behind = 0
        return count


def _discard(file: Any) -> None:
    """Cancel an upload; closing the file would send the part that was written, as if it were complete."""
    with contextlib.suppress(Exception):  # the reason to give up is the error to tell
        file.discard()
    file.closed = True


@contextmanager
def new_location(folder: Path) -> Iterator[Path]:
    """Fill a new folder; on this machine's file systems it has its name when it is complete, see `data.new_paths`.

    Returns:
        What is to be filled; what has been written there is removed after an error.

    Raises:
        CheckpointError: there is something already, or another process is writing it.
    """
    if is_local(folder):
        try:
            with new_folder(folder) as building:
                yield building
        except TakenError as error:
            raise CheckpointError(str(error)) from error
        return
    if folder.exists():
        raise CheckpointError(f"{folder}: already exists; choose another name, or remove it")
    try:
        yield folder
    except BaseException:
        remove_folder(folder)
        raise


def local_folder(folder: Path, names: Iterable[str]) -> Path:
    """A folder on this machine with small files: itself, or a copy that is removed when the process ends.

    Args:
        folder: local or remote.
        names: of the files that are copied, if they exist.

    Raises:
        CheckpointError: the store cannot be reached.
    """
    if is_local(folder):
        return folder
    copy = Path(tempfile.mkdtemp(prefix="tritrain-"))
    atexit.register(remove_folder, copy)
    with reaching(folder):
        for name in names:
            if (folder / name).is_file():
                (copy / name).write_bytes((folder / name).read_bytes())
    return copy


def flush_folder(folder: Path) -> None:
    """Make sure that the names in a local folder have reached the disk."""
    if is_local(folder):
        flush(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder and everything in it, if it exists."""
    if is_local(folder):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)  # type: ignore[attr-defined]
