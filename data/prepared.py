"""Read and check folders of prepared data.

FOLDER/train/, FOLDER/validation/    MDS: index.json and shards; one sample is one row
FOLDER/tokenizer.model or .json      the tokenizer that made the rows
FOLDER/token_bytes.npy               bytes of text of each token, for losses in bits per byte
FOLDER/manifest.json                 what went in and what came out; written last
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN_BYTES = "token_bytes.npy"
INDEX = "index.json"
COLUMN = "tokens"
SHARD_HASH = "sha256"
TRAIN, VALIDATION = "train", "validation"


def open_prepared(folder: Path, *, may_lack_shards: bool = False) -> dict[str, Any]:
    """Check a prepared folder and return its manifest.

    Every file that the manifest and the indexes name must be there, in full size; contents of shards are not read.

    Args:
        folder: what `prepare` made, or a copy of it.
        may_lack_shards: whether shards may be absent, as in a cache that fetches them when they are needed.

    Raises:
        DataError: names the file, and for a wrong size the bytes expected and found.
    """
    manifest = read_manifest(folder)
    tokenizer = folder / manifest["tokenizer"]["file"]
    _expect_file(tokenizer, "the tokenizer that made the tokens")
    _expect_file(folder / TOKEN_BYTES, "the bytes of text of each token")
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest["tokenizer"]["fingerprint"]:
        raise DataError(f"{tokenizer}: is not the tokenizer of the tokens in this folder; copy the folder again")
    for split, facts in manifest["splits"].items():
        _check_split(folder / split, facts, may_lack_shards)
    return manifest


def is_yet_to_be_prepared(folder: Path) -> bool:
    """Return whether there is nothing yet where prepared data are to be: no file or folder, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a prepared folder, unchecked but for its version and the names of the files beside it.

    Raises:
        DataError: there is no such folder, or it is not a prepared one.
    """
    how = "`tritrain prepare INPUT... --out DIR --tokenizer FILE|bpe:VOCAB` makes one"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of prepared data; {how}")
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: has no {MANIFEST}, so it is not a folder of prepared data; {how}")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: not a manifest of prepared data; copy or prepare the folder again")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: has format_version {manifest.get('format_version')}, but this program reads {FORMAT_VERSION}; "
            "prepare the data again"
        )
    for name in (manifest["tokenizer"]["file"], *manifest["splits"]):
        if Path(name).name != name:  # what is fetched from elsewhere must not be written elsewhere
            raise DataError(f"{path}: names {name!r}, which is not a file name in this folder; prepare the data again")
    return manifest


def fit_problems(path: str, manifest: dict[str, Any], sequence_length: int, vocab_size: int) -> Iterator[str]:
    """Why a prepared folder is not for a model; nothing if it is.

    Args:
        path: of the folder.
        manifest: of the folder.
        sequence_length: tokens of a sequence, as the configuration has it.
        vocab_size: of the model.
    """
    if manifest["sequence_length"] != sequence_length:
        yield (
            f"{path}: was prepared with sequence_length {manifest['sequence_length']}, but the configuration says "
            f"{sequence_length}; change data.sequence_length, or prepare the text again"
        )
    if manifest["vocab_size"] > vocab_size:
        yield (
            f"{path}: its tokenizer has {manifest['vocab_size']} tokens, but the model has {vocab_size}; set "
            f"model.vocab_size to {manifest['vocab_size']} or more"
        )


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the shards of a split's folder, each as MDS describes it.

    Raises:
        DataError: there is no index or it is not one.
    """
    path = folder / INDEX
    _expect_file(path, "the list of the shards")
    try:
        return json.loads(path.read_bytes())["shards"]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not an index of MDS shards ({error!r}); copy or prepare the folder again") from error


def _check_split(folder: Path, facts: dict[str, Any], may_lack_shards: bool) -> None:
    shards = read_index(folder)
    for shard in shards:
        path = folder / shard["raw_data"]["basename"]
        if may_lack_shards and not path.exists():
            continue
        _expect_file(path, f"a shard that {INDEX} lists")
        expected, found = shard["raw_data"]["bytes"], path.stat().st_size
        if expected != found:
            raise DataError(
                f"{path}: has {found} bytes, but {INDEX} says {expected}; the copy is incomplete or damaged: copy or "
                "prepare the folder again"
            )
    if (rows := sum(shard["samples"] for shard in shards)) != facts["rows"]:
        raise DataError(f"{folder / INDEX}: lists {rows} rows, but {MANIFEST} says {facts['rows']}; copy both again")
    if hashlib.sha256((folder / INDEX).read_bytes()).hexdigest() != facts["fingerprint"]:
        raise DataError(f"{folder / INDEX}: changed since {MANIFEST} was written; copy or prepare the folder again")


def _expect_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: missing; it is {what}")
