"""Find the files of a source: in its folder or, for a remote source, in a cache that is filled as needed."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from data.config import Content
from data.errors import DataError
from data.light_streaming import import_streaming
from data.marks import ids_of
from data.mixture import Source
from data.new_paths import NO_ROOM, file_being_replaced
from data.prepared import (
    COLUMN,
    INDEX,
    MANIFEST,
    SHARD_HASH,
    TOKEN_BYTES,
    TRAIN,
    content_of,
    fit_problems,
    holds_chats,
    is_compressed,
    open_prepared,
    read_index,
    read_manifest,
    stored_file,
    unlike_problem,
)
from data.shared_memory import is_local_leader
from data.urls import redacted


@dataclass(frozen=True)
class OpenSource:
    """A source whose manifest, tokenizer and indexes are on this machine and have been checked."""

    source: Source
    folder: Path
    """The prepared folder itself, or the cache of a remote one."""
    manifest: dict[str, Any]
    is_cached: bool
    """Whether shards are fetched from the source into `folder` when they are needed."""

    @property
    def holds_chats(self) -> bool:
        """Whether rows are chats, or pairs of them, with marks (`data.marks`)."""
        return self.content != "text"

    @property
    def content(self) -> Content:
        """What rows are."""
        return content_of(self.manifest)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that made the tokens."""
        return self.folder / self.manifest["tokenizer"]["file"]

    def num_rows(self, split: str) -> int:
        """Return the rows of a split, 0 if there is none."""
        return self.manifest["splits"][split]["rows"] if split in self.manifest["splits"] else 0

    def stream(self, choose: int) -> Any:
        """Return the `streaming.Stream` of the training rows, of which an epoch takes `choose`."""
        import_streaming()
        from streaming import Stream

        return Stream(
            remote=self.source.path if self.is_cached else None,
            local=str(self.folder),
            split=TRAIN,
            choose=choose,
            validate_hash=SHARD_HASH,  # of downloads; what is there already is not read for it
        )

    def read_first_rows(self, split: str, num_rows: int) -> NDArray:
        """Return the first rows of a split, [num_rows, sequence_length + 1], fetching the shards that hold them.

        Those of chats have their marks.
        """
        import_streaming()
        from streaming.base.format import reader_from_json

        rows: list[NDArray] = []
        for shard in read_index(self.folder / split):
            if len(rows) == num_rows:
                break
            if self.is_cached:
                self._fetch_shard(split, shard)
            reader = reader_from_json(str(self.folder), split, shard)
            try:
                rows += [reader[row][COLUMN] for row in range(min(reader.size, num_rows - len(rows)))]
            except (ValueError, IndexError) as error:
                path = self.folder / split / shard["raw_data"]["basename"]
                raise DataError(f"{path}: damaged: a row cannot be read ({error}); copy the folder again") from error
        largest = max((int((ids_of(row) if self.holds_chats else row).max()) for row in rows), default=0)
        if largest >= self.manifest["vocab_size"]:
            raise DataError(
                f"{self.folder / split}: holds token {largest}, but its tokenizer has {self.manifest['vocab_size']} "
                "tokens; copy or prepare the folder again"
            )
        return np.stack(rows)

    def _fetch_shard(self, split: str, shard: dict[str, Any]) -> None:
        """Make sure that a shard is in the cache, and decompressed."""
        stored, raw = stored_file(shard), self.folder / split / shard["raw_data"]["basename"]
        if raw.exists():
            return
        _fetch(self.source, self.folder, f"{split}/{stored['basename']}", stored["hashes"][SHARD_HASH])
        if stored is shard["raw_data"]:
            return
        path = self.folder / split / stored["basename"]
        content = path.read_bytes()
        with file_being_replaced(raw) as partial:
            partial.write_bytes(decompress(content, shard["raw_data"]["bytes"], path))
        path.unlink()


def decompress(content: bytes, num_bytes: int, path: Path) -> bytes:
    """The content of a zstd-compressed shard.

    Args:
        content: as compressed.
        num_bytes: of the shard; no more is decompressed.
        path: for messages.

    Raises:
        DataError: it is another number of bytes, or none that zstd has written.
    """
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(content) as reader:
            found = reader.read(num_bytes + 1)
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: cannot be decompressed ({error}); copy or prepare the folder again") from error
    if len(found) != num_bytes:
        raise DataError(f"{path}: does not hold {num_bytes} bytes, as {INDEX} says; copy or prepare the folder again")
    return found


@contextlib.contextmanager
def local_leader_first(rank: int) -> Iterator[None]:
    """Let the first rank of each node do what the body does, such as to download, before the others of the node."""
    if dist.is_initialized() and not is_local_leader(rank):
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and is_local_leader(rank):
            dist.barrier()


def open_sources(
    sources: Sequence[Source], cache: str | None, sequence_length: int, vocab_size: int
) -> list[OpenSource]:
    """Open every source and check that the sources, the model and the configuration agree.

    Only one process of a machine at a time may do this with a remote source.

    Raises:
        DataError: a folder is missing or damaged, was prepared with another sequence length, with a vocabulary larger
            than `vocab_size`, or with another tokenizer or end of documents than the first one.
    """
    opened = [open_source(source, cache) for source in sources]
    first = opened[0]
    for source in opened:
        path, manifest = source.source.path, source.manifest
        if problems := list(fit_problems(path, manifest, sequence_length, vocab_size)):
            raise DataError("\n".join(problems))
        if problem := unlike_problem(path, manifest, first.source.path, first.manifest, first.tokenizer_path):
            raise DataError(problem)
    return opened


def open_source(source: Source, cache: str | None) -> OpenSource:
    """Check a source; of a remote or compressed one fetch the small files first, if the cache lacks them.

    Raises:
        DataError: it is missing or damaged, or the cache holds another version of it.
    """
    if not source.is_remote:
        folder = Path(os.path.abspath(source.path))
        manifest = open_prepared(folder)
        if not is_compressed(folder, manifest):
            return OpenSource(source, folder, manifest, is_cached=False)
        if cache is None:
            raise DataError(
                f"{source.path}: has compressed shards, which are decompressed into data.cache; set it to a folder on "
                "each node's own disk"
            )
        source = replace(source, path=str(folder))
    assert cache is not None
    folder = Path(os.path.abspath(cache)) / hashlib.sha256(source.path.encode()).hexdigest()[:16]
    _fetch_manifest(source, folder)
    manifest = read_manifest(folder)
    _fetch(source, folder, manifest["tokenizer"]["file"])
    if holds_chats(manifest):
        _fetch(source, folder, manifest["chat_template"]["file"])
    _fetch(source, folder, TOKEN_BYTES)
    for split in manifest["splits"]:
        _fetch(source, folder, f"{split}/{INDEX}")
        _drop_cut_shards(folder / split)
    return OpenSource(source, folder, open_prepared(folder, may_lack_shards=True), is_cached=True)


def template_path(source: Source, cache: str | None) -> Path:
    """The chat template of a source that was opened before."""
    opened = open_source(source, cache)
    return opened.folder / str(opened.manifest["chat_template"]["file"])


def _fetch(source: Source, folder: Path, name: str, digest: str | None = None) -> None:
    """Download one file of a remote source into `folder`, unless it exists; its SHA-256 is compared if it is given."""
    path = folder / name
    _refuse_links(folder, path)
    if path.exists():
        _check_digest(source, name, path, digest)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_being_replaced(path) as partial:
        _download(source, folder, name, partial)
        _check_digest(source, name, partial, digest)


def _fetch_manifest(source: Source, folder: Path) -> None:
    """Download the manifest, or make sure that the one in `folder` is still the source's.

    All other files in the cache are those that this one names.
    """
    path = folder / MANIFEST
    if not path.exists():
        _fetch(source, folder, MANIFEST)
        return
    _refuse_links(folder, path)
    with tempfile.TemporaryDirectory() as place:
        current = Path(place, MANIFEST)
        _download(source, folder, MANIFEST, current)
        if current.read_bytes() != path.read_bytes():
            raise DataError(
                f"{folder}: holds another version of {source.path}, which was prepared anew since; remove the folder, "
                "or choose another data.cache"
            )


def _download(source: Source, folder: Path, name: str, path: Path) -> None:
    """Download one file of a remote source to a path; `folder`, its cache, is for messages."""
    import_streaming()
    from streaming.base.storage.download import CloudDownloader

    try:
        CloudDownloader.direct_download(f"{source.path.rstrip('/')}/{name}", str(path))
    except Exception as error:  # every kind of storage has its own
        raise DataError(
            f"{source.path}/{name}: cannot be downloaded ({type(error).__name__}: {redacted(str(error))}); "
            f"{_advice(error, folder)}"
        ) from error


def _check_digest(source: Source, name: str, path: Path, digest: str | None) -> None:
    """Compare a file with its SHA-256, if that is given; one that differs is removed."""
    if digest is None:
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == digest:
            return
    path.unlink()
    raise DataError(f"{source.path}/{name}: is damaged; copy or prepare the folder again")


def _refuse_links(folder: Path, path: Path) -> None:
    """Raise DataError if the cache of a source, or what leads from it to a file, is a symbolic link.

    Downloads make none. Through one that somebody else left there, files would be written and deleted elsewhere.
    """
    for part in (path, *path.parents):
        if part.is_symlink():
            raise DataError(
                f"{part}: is a symbolic link in the cache of downloads; remove it, or choose another data.cache"
            )
        if part == folder:
            return


def _advice(error: Exception, folder: Path) -> str:
    """Say what to look at; where there is one, the code of the answer tells more than the client's message."""
    if isinstance(error, ImportError):
        return "install what reads this kind of store"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"make room for {folder}, in data.cache"
    reason = f"{type(error).__name__} {getattr(error, 'response', {}).get('Error', {}).get('Code', error)}"
    if any(word in reason for word in ("Credentials", "403", "Forbidden", "AccessDenied", "InvalidAccessKeyId")):
        return "check the credentials and what they may read"
    if any(word in reason for word in ("404", "NoSuch", "NotFound", "not found", "No such file")):
        return "check the bucket and the path, and that all of the prepared folder was copied there"
    return "check the network and the store's address"


def _drop_cut_shards(folder: Path) -> None:
    """Remove shards of the wrong size from a cache: downloads that were cut, which `streaming` would read."""
    for path in folder.iterdir():
        _refuse_links(folder, path)  # `streaming` would write through it
    for shard in read_index(folder):
        for file in (shard["raw_data"], stored_file(shard)):
            path = folder / file["basename"]
            if path.exists() and path.stat().st_size != file["bytes"]:
                path.unlink()
