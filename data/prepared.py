"""Read and check folders of prepared data.

FOLDER/train/, FOLDER/validation/    MDS: index.json and shards; one sample is one row
FOLDER/tokenizer.model or .json      the tokenizer that made the rows
FOLDER/chat_template.jinja           of chats, the template that wrote them
FOLDER/token_bytes.npy               bytes of text of each token, for losses in bits per byte
FOLDER/files.json                    files read and left out, for a person; nothing reads it
FOLDER/manifest.json                 what went in and what came out; written last
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.config import Content
from data.errors import DataError
from data.messages import looked_for_in
from data.names import bare_name
from data.pointers import pointer_problem

VERSIONS: dict[Content, int] = {"text": 1, "chats": 2, "pairs": 3}
"""Of the format by what rows hold, so that a program that does not know the marks (`data.marks`) reads none."""
MANIFEST = "manifest.json"
FILES = "files.json"
TOKEN_BYTES = "token_bytes.npy"
INDEX = "index.json"
COLUMN = "tokens"
SOURCE = "source"
"""Beside the column of a row that is read: the index of its source in the mixture."""
SHARD_HASH = "sha256"
ZSTD = "zstd"
TRAIN, VALIDATION = "train", "validation"
ROW_TYPES = {"uint16": 2, "uint32": 4}
"""Types of a row's tokens, and their bytes."""
MAX_SHARD_BYTES = 2**32
"""MDS counts the bytes of a shard in 32 bits."""


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
    if holds_chats(manifest):
        template = folder / manifest["chat_template"]["file"]
        _expect_file(template, "the template that wrote the chats")
        if hashlib.sha256(template.read_bytes()).hexdigest() != manifest["chat_template"]["fingerprint"]:
            raise DataError(f"{template}: is not the template of the chats in this folder; copy the folder again")
    for split, facts in manifest["splits"].items():
        _check_split(folder / split, facts, manifest["sequence_length"], may_lack_shards)
    return manifest


def holds_chats(manifest: dict[str, Any]) -> bool:
    """Return whether the rows of a prepared folder are chats, or pairs of them, with marks."""
    return content_of(manifest) != "text"


def content_of(manifest: dict[str, Any]) -> Content:
    """Return what the rows of a prepared folder are."""
    return next(content for content, version in VERSIONS.items() if version == manifest["format_version"])


def is_yet_to_be_prepared(folder: Path) -> bool:
    """Return whether there is nothing yet where prepared data are to be: no file or folder, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def is_prepared(folder: Path) -> bool:
    """Return whether a folder has a sound manifest of prepared data."""
    try:
        read_manifest(folder)
    except DataError:
        return False
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a prepared folder, with the types of its values and the names in it checked.

    Raises:
        DataError: there is no such folder, or it is not a prepared one.
    """
    how = "`tritrain prepare INPUT... --out DIR --tokenizer FILE|bpe:VOCAB` makes one"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of prepared data{looked_for_in(folder)}; {how}")
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: has no {MANIFEST}, so it is not a folder of prepared data; {how}")
    _expect_file(path, "the record of what went in and what came out")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: not a manifest of prepared data; copy or prepare the folder again")
    if manifest.get("format_version") not in VERSIONS.values():
        raise DataError(
            f"{path}: has format_version {manifest.get('format_version')!r:.80}, but this program reads "
            f"{', '.join(map(str, VERSIONS.values()))}; prepare the data again"
        )
    try:
        bare_name(manifest["tokenizer"]["file"])
        if holds_chats(manifest):
            bare_name(manifest["chat_template"]["file"])
        for split in manifest["splits"]:
            bare_name(split)
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = error if isinstance(error, ValueError) else f"not a manifest of prepared data ({error!r})"
        raise DataError(f"{path}: {problem}; copy or prepare the folder again") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise a ValueError, KeyError or TypeError if a value that is used is none that `prepare` writes."""
    counts = {key: manifest[key] for key in ("sequence_length", "vocab_size", "end_of_document")}
    for split, facts in manifest["splits"].items():
        counts |= {f"splits.{split}.rows": facts["rows"]}
        if "largest_token" in facts:  # older versions did not record it
            counts |= {f"splits.{split}.largest_token": facts["largest_token"]}
    for key, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"its {key} is {value!r:.80}, which is not a count")
    for split, facts in manifest["splits"].items():
        if (largest := facts.get("largest_token", 0)) >= manifest["vocab_size"]:
            raise ValueError(
                f"its {split} split holds token {largest}, but the vocabulary has {manifest['vocab_size']} tokens"
            )
    texts = [manifest["tokenizer"]["fingerprint"], *(facts["fingerprint"] for facts in manifest["splits"].values())]
    if not all(isinstance(text, str) for text in texts) or not isinstance(manifest["options"], dict):
        raise ValueError("its fingerprints are not text, or its options not a mapping")
    if not {TRAIN} <= manifest["splits"].keys() <= {TRAIN, VALIDATION}:
        raise ValueError(f"its splits must be {TRAIN} and, if text is held out, {VALIDATION}")


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


def no_held_out_text(paths: Iterable[str]) -> str:
    """What is wrong with prepared folders of which none has a validation split, if a run asks for one."""
    return (
        f"{', '.join(paths)}: has no held-out text; prepare it with validation_fraction or validation_inputs, or set "
        "data.validation_rows to 0"
    )


def unlike_problem(
    path: str, manifest: dict[str, Any], other: str, of_other: dict[str, Any], tokenizer: Path
) -> str | None:
    """Say why two prepared folders cannot be read in one run; None if they can.

    Args:
        path: of a folder.
        manifest: of that folder.
        other: path of the other one.
        of_other: manifest of that one.
        tokenizer: file of that one.
    """
    if manifest["tokenizer"]["fingerprint"] != of_other["tokenizer"]["fingerprint"]:
        return (
            f"{path}: was prepared with a different tokenizer than {other}; prepare it again with "
            f"--tokenizer {tokenizer}"
        )
    template, theirs = (each.get("chat_template", {}).get("fingerprint") for each in (manifest, of_other))
    if template and theirs and template != theirs:
        return f"{path}: was prepared with a different chat template than {other}; prepare both with the same one"
    if manifest["end_of_document"] != of_other["end_of_document"]:
        return (
            f"{path}: ends documents with token {manifest['end_of_document']}, but {other} with token "
            f"{of_other['end_of_document']}; prepare it again with the --end-of-document of {other}"
        )
    return None


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the shards of a split's folder, each as MDS describes it, all of a kind that `prepare` writes.

    Raises:
        DataError: there is no index, it is not one, or a shard's name or size or type is none that may be there.
    """
    path = folder / INDEX
    _expect_file(path, "the list of the shards")
    try:
        shards = json.loads(path.read_bytes())["shards"]
        for shard in shards:
            _check_shard(shard)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = error if isinstance(error, ValueError) else repr(error)
        raise DataError(f"{path}: not an index of MDS shards ({problem}); copy or prepare the folder again") from error
    return shards


def is_compressed(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether the shards of a prepared folder must be decompressed, to somewhere else, to be read."""
    return any(shard["zip_data"] for split in manifest["splits"] for shard in read_index(folder / split))


def stored_file(shard: dict[str, Any]) -> dict[str, Any]:
    """The file of a shard as an index describes it: name, bytes and digests."""
    return shard["zip_data"] or shard["raw_data"]


def _check_shard(shard: Any) -> None:
    """Raise a ValueError, KeyError or TypeError if a shard is none of `prepare`'s.

    `streaming` would also read other formats, compressed shards and columns that are pickles, and it deletes files by
    the names in the index.
    """
    for file in (shard["raw_data"], shard["zip_data"] or {}):
        bare_name(file.get("basename", INDEX))
    kind = (shard["version"], shard["format"], shard["compression"], shard["zip_data"] is not None)
    if kind not in ((2, "mds", None, False), (2, "mds", ZSTD, True)):
        raise ValueError("a shard is no MDS shard of version 2, plain or compressed with zstd")
    name, (column,), (encoding,), (row_bytes,) = (
        shard["raw_data"]["basename"], shard["column_names"], shard["column_encodings"], shard["column_sizes"]
    )  # fmt: skip
    kind, dtype, length = encoding.split(":")
    if (column, kind) != (COLUMN, "ndarray") or row_bytes != ROW_TYPES.get(dtype, 0) * int(length):
        raise ValueError(f"{name} does not hold rows of {COLUMN} alone, but {column!r:.80} as {encoding!r:.80}")
    rows, num_bytes = shard["samples"], shard["raw_data"]["bytes"]
    # A shard has a count, the places of the rows, 4 bytes each, and the rows.
    is_possible = type(rows) is int and rows >= 0 and type(num_bytes) is int and row_bytes > 0
    if not is_possible or 4 * (rows + 2) + rows * row_bytes > num_bytes:
        raise ValueError(f"{name} cannot hold {rows!r:.80} rows of {row_bytes} bytes in {num_bytes!r:.80} bytes")
    if num_bytes >= MAX_SHARD_BYTES:
        raise ValueError(f"{name} has {num_bytes} bytes, more than the format can address")
    stored = stored_file(shard)
    if not isinstance(stored["hashes"].get(SHARD_HASH), str):
        raise ValueError(f"{stored['basename']} has no {SHARD_HASH}")
    if type(stored["bytes"]) is not int or stored["bytes"] <= 0:
        raise ValueError(f"{stored['basename']} has {stored['bytes']!r:.80} bytes")


def _check_split(folder: Path, facts: dict[str, Any], sequence_length: int, may_lack_shards: bool) -> None:
    shards = read_index(folder)
    for shard in shards:
        if (length := int(shard["column_encodings"][0].split(":")[2])) != sequence_length + 1:
            raise DataError(
                f"{folder / INDEX}: has rows of {length} tokens, but {MANIFEST} says sequence_length "
                f"{sequence_length}; copy both again"
            )
        stored = stored_file(shard)
        path = folder / stored["basename"]
        if may_lack_shards and not path.exists():
            continue
        _expect_file(path, f"a shard that {INDEX} lists")
        expected, found = stored["bytes"], path.stat().st_size
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
    if problem := pointer_problem(path):
        raise DataError(f"{path}: {problem}")
