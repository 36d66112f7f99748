"""Prepare data for a store: what is there is complete, or has no manifest, which goes last."""

import hashlib
import shutil
from pathlib import Path

from data.config import PrepareConfig
from data.decontamination import NGrams
from data.errors import DataError
from data.prepared import MANIFEST, is_yet_to_be_prepared, open_prepared
from launcher.checkpoint.location import check_writable, create, is_local, reaching, to_location
from launcher.commands.prepare import prepare_with_progress
from launcher.errors import ConfigError
from launcher.process.console import Console

BEGUN = "sending"
"""Mark in a store: the SHA-256 of the manifest of the folder that is sent there."""


def is_url(text: str) -> bool:
    """Return whether a folder is named by a URL of a store."""
    return "://" in text and not is_local(to_location(text))


def prepare_in_store(
    config: PrepareConfig,
    sequence_length: int,
    url: str,
    scratch: Path | None,
    console: Console,
    on: str | None = None,
    ngrams: NGrams | None = None,
) -> None:
    """Prepare a local folder and send it to a store.

    Args:
        config: inputs, tokenizer and held-out text.
        sequence_length: tokens of a sequence.
        url: of the folder in the store.
        scratch: the local folder; it stays.
        console: where to print.
        on: as of `data.shards.prepare`.
        ngrams: as of `data.shards.prepare`.

    Raises:
        ConfigError: there is no local folder.
    """
    if scratch is None:
        raise ConfigError("--out: is a URL; name a local folder for the files until they are sent, with --scratch")
    check_store(url, scratch)
    prepare_with_progress(config, sequence_length, scratch, console, on=on, ngrams=ngrams)
    upload_prepared(scratch, url, console)


def check_store(url: str, local: Path) -> None:
    """Make sure, before hours of work, that a store takes files and that the folder there is not another one.

    Raises:
        DataError: there is another prepared folder, or something else.
        CheckpointError: the store cannot be written.
    """
    location = to_location(url)
    check_writable(location)
    with reaching(location):
        manifest = location / MANIFEST
        if manifest.exists() and (
            is_yet_to_be_prepared(local) or manifest.read_bytes() != (local / MANIFEST).read_bytes()
        ):
            raise DataError(f"{url}: holds other prepared data; choose another --out, or remove it")


def upload_prepared(local: Path, url: str, console: Console) -> None:
    """Copy a prepared folder to a store; files that an earlier attempt has sent whole are not sent again.

    While it is sent, a mark says which folder it is: full shards of another one have the same size.

    Raises:
        DataError: the folder is damaged.
        CheckpointError: the store fails; the same command goes on.
    """
    open_prepared(local)
    location = to_location(url)
    files = sorted(path for path in local.rglob("*") if path.is_file() and path.name != MANIFEST)
    digest = hashlib.sha256((local / MANIFEST).read_bytes()).hexdigest()
    mark, sent = location / BEGUN, 0
    with reaching(location):
        is_begun = (mark.is_file() and mark.read_text() == digest) or (location / MANIFEST).is_file()
        if not is_begun:
            mark.write_text(digest)
        for path in [*files, local / MANIFEST]:
            target = location / path.relative_to(local).as_posix()
            is_there = is_begun and target.is_file() and target.stat().st_size == path.stat().st_size
            if not is_there or path.name == MANIFEST:
                with path.open("rb") as source, create(target) as file:
                    shutil.copyfileobj(source, file, 1 << 22)
                sent += 1
        mark.unlink(missing_ok=True)
    console.line(f"{url}: {sent} of {len(files) + 1} files sent; {local} may be removed")
