"""Paths in remote stores that behave like local ones: "no" means that a file does not exist, never an error."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from upath.extensions import ProxyUPath

STORAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            # A store that is away for some seconds costs time only; one that is not there at all is said soon.
            "retries": {"mode": "standard", "total_max_attempts": 5},
            "connect_timeout": 5,
            "read_timeout": 20,
        }
    }
}
"""What fsspec's clients are made with, by scheme. Credentials are none of it: the clients find them by themselves."""


class RemotePath(ProxyUPath):
    """A `upath.UPath` whose queries raise errors instead of answering no.

    fsspec takes any error for "there is no such file": a run whose store is out of reach for a moment would find no
    checkpoint in it, and begin anew.
    """

    def _type(self) -> str | None:
        try:
            return str(self.fs.info(self.path)["type"])
        except FileNotFoundError:
            return None

    def is_file(self) -> bool:
        """Return whether this is a file."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Return whether anything is stored below this name; that is what a folder is in a store."""
        return self._type() == "directory"

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Return whether this is a file or a folder."""
        return self._type() is not None

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        if self.is_file():
            self.fs.rm_file(self.path)
        elif not missing_ok:
            raise FileNotFoundError(str(self))

    def glob(self, pattern: str, **_: Any) -> "Iterator[RemotePath]":
        """The paths directly in this folder whose names match."""
        assert "/" not in pattern, pattern
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))


def remote_path(url: str) -> RemotePath:
    """Open a store and return the path; raises ImportError if its client is not installed."""
    scheme = url.partition("://")[0]
    path = RemotePath(url, use_listings_cache=False, **STORAGE_OPTIONS.get(scheme, {}))
    path.fs  # noqa: B018  (made when asked for; until then nothing is known to be missing)
    if scheme == "s3":
        path.fs.retries = 2  # on top of the client's own: for answers that break off
    return path
