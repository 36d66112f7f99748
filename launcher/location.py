"""Folders that may lie elsewhere: a local path, or a URL of any store that fsspec knows (`s3://`, `gs://`, ...)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from launcher.source import CheckpointError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def to_location(text: str | Path) -> Path:
    """A path; of a URL, a `upath.UPath`, which has the same methods.

    Raises:
        CheckpointError: what is needed to reach the store is not installed.
    """
    scheme, separator, rest = str(text).partition("://")
    if not separator:
        return Path(text)
    if scheme == "file":
        return Path(rest)
    from upath import UPath

    try:
        location: Any = UPath(str(text), use_listings_cache=False)
        location.fs  # noqa: B018  (made when asked for; until then nothing is known to be missing)
    except (ImportError, ValueError) as error:
        advice = f"; `pip install {PACKAGES[scheme]}`" if scheme in PACKAGES else ""
        raise CheckpointError(f"{text}: this kind of store cannot be reached: {error}{advice}") from error
    return cast(Path, location)


def is_local(location: Path) -> bool:
    """Whether a location is on this machine's file systems."""
    return isinstance(location, Path)


@contextmanager
def reaching(location: Path) -> Iterator[None]:
    """Turn what goes wrong with a store into one clear error; clients of remote stores raise errors of many kinds.

    Raises:
        CheckpointError: with the location, what the store says and what may help.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if is_local(location) and not isinstance(error, OSError):
            raise
        advice = ""
        if not is_local(location):
            name = type(error).__name__
            if isinstance(error, PermissionError) or "Credentials" in name or "403" in str(error):
                advice = " Check the credentials and what they may do there."
            elif isinstance(error, FileNotFoundError) or "NoSuchBucket" in str(error):
                advice = " Check that the bucket exists and is spelled right."
            else:
                advice = " Check the network and the endpoint."
        raise CheckpointError(f"{location}: {type(error).__name__}: {error}.{advice}") from error


def check_writable(folder: Path) -> None:
    """Make sure that files can be written below a folder, before hours of work depend on it.

    Raises:
        CheckpointError: they cannot.
    """
    with reaching(folder):
        if is_local(folder):
            folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"writable-{os.getpid()}"
        probe.write_bytes(b"yes")
        probe.unlink()


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing; it has reached the disk, or the store, when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        if is_local(path):
            os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make sure that the names in a local folder have reached the disk."""
    if is_local(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    if is_local(folder):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)  # type: ignore[attr-defined]
