"""Let `prepare` go on where a killed one stopped.

While a folder is being made, it holds a record of what was written by a moment between two pieces of work: the shards
with their digests, the rows that fill no shard yet, and the place in the inputs. The shards have reached the disk
before the record does, and the record takes its name at once or not at all, so a crash at any moment leaves one that is
true. What was written after that moment is written again, to the same bytes. The record is removed at the end.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data import quickstart_corpus
from data.encoding import Piece
from data.fast_encoding import NAME as FAST
from data.filters import SEEN
from data.new_paths import replace_file
from data.prepared import SHARD_HASH, stored_file
from data.survey import HF_PREFIX, Survey, split_hub_name, with_beside
from data.transformers_files import CHAT_TEMPLATE
from data.writers import State

RECORD = "progress"
RECORD_VERSION = 4
NOTHING_READ = (-1, 0, 0)
"""The place before all others."""
SECONDS_BETWEEN_RECORDS = 30.0
LIBRARIES = ("sentencepiece", "tokenizers", "mosaicml-streaming", "numpy")
"""Other versions of these might write other bytes."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What `prepare` has done by a moment."""

    tokenizer: str
    """Name of the tokenizer's file."""
    fingerprint: str
    """Its SHA-256."""
    read: tuple[int, int, int]
    """Place of the last piece that was read."""
    waiting: dict[str, list[Piece]]
    """Pieces of each split that were read and not written."""
    writers: dict[str, State]
    """Of each split."""
    removal: dict[str, Any] | None = None
    """Of `data.filters.Removal`, if there are filters."""

    @property
    def documents(self) -> int:
        """Documents that are written."""
        return sum(facts["documents"] for facts, _ in self.writers.values())

    @property
    def text_bytes(self) -> int:
        """The bytes of their text."""
        return sum(facts["text_bytes"] for facts, _ in self.writers.values())


def identity(
    options: dict[str, Any], files: Survey, inputs: Sequence[str], stats: Mapping[Path, os.stat_result]
) -> dict[str, Any]:
    """What decides every byte: two attempts of one identity write the same.

    Of files, it takes path, size and time of change, from `stats`; what a hub holds is not looked at.
    """
    paths = list(files.read)
    for source in inputs:
        if source.startswith(HF_PREFIX) and (folder := Path(split_hub_name(source)[0][0])).is_dir():
            paths += sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in (each for named in paths for each in with_beside(named)):
        found = stats.get(path) or path.stat()
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    names = [*LIBRARIES, *([FAST] if find_spec(FAST) else [])]
    versions = {name: version(name) for name in names} | {"record": RECORD_VERSION}
    if quickstart_corpus.NAME in inputs:
        versions["python"] = sys.version
    return {**options, "files": digest.hexdigest(), "versions of libraries": versions}


def record(folder: Path, made_by: dict[str, Any], progress: Progress) -> None:
    """Write the record of a folder, in the place of an earlier one."""
    arrays = {
        f"{split}/{name}": array for split, (_, parts) in progress.writers.items() for name, array in parts.items()
    }
    facts = {
        "identity": made_by,
        "tokenizer": progress.tokenizer,
        "fingerprint": progress.fingerprint,
        "read": progress.read,
        "waiting": {split: [_listed(piece) for piece in pieces] for split, pieces in progress.waiting.items()},
        "writers": {split: facts for split, (facts, _) in progress.writers.items()},
        "removal": progress.removal,
    }
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
    content = file.getvalue()
    replace_file(folder / RECORD, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _listed(piece: Piece) -> list[Any]:
    tokens = None if piece.tokens is None else piece.tokens.tolist()
    findings = piece.findings and [piece.findings[0].hex(), piece.findings[1]]
    return [piece.text, piece.origin, piece.place, piece.ends, tokens, findings]


def _piece_of(text: str, origin: str, place: Any, ends: bool, tokens: Any, findings: Any) -> Piece:
    found = findings and (bytes.fromhex(findings[0]), findings[1])
    return Piece(text, origin, tuple(place), ends, None if tokens is None else np.array(tokens), found)


def read_record(folder: Path, made_by: dict[str, Any]) -> Progress | str:
    """Return the progress of a folder that another process has left, or why it cannot go on from there.

    What was written after the record is removed.
    """
    try:
        digest, _, content = (folder / RECORD).read_bytes().partition(b"\n")
    except OSError:
        return "it had not come far enough"
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return "its record is damaged"
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        facts = json.loads(arrays["facts"].tobytes())
        parts: dict[str, dict[str, Any]] = {split: {} for split in facts["writers"]}
        for key in arrays.files:
            split, _, name = key.partition("/")
            if name:
                parts[split][name] = arrays[key]
    before, now = facts["identity"], json.loads(json.dumps(made_by))
    if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        return f"since then, other are: {', '.join(changed)}"
    progress = Progress(
        tokenizer=facts["tokenizer"],
        fingerprint=facts["fingerprint"],
        read=tuple(facts["read"]),
        waiting={split: [_piece_of(*each) for each in pieces] for split, pieces in facts["waiting"].items()},
        writers={split: (of_split, parts[split]) for split, of_split in facts["writers"].items()},
        removal=facts["removal"],
    )
    return _damage(folder, progress, made_by.get("chat_template")) or progress


def _damage(folder: Path, progress: Progress, template: str | None) -> str | None:
    """Name a file that is not what the record says; remove those that it does not name."""
    digests = {folder / progress.tokenizer: progress.fingerprint}
    if template is not None:
        digests[folder / CHAT_TEMPLATE] = template.removeprefix("sha256:")
    for split, (facts, _) in progress.writers.items():
        files = [stored_file(shard) for shard in facts["shards"]]
        digests |= {folder / split / file["basename"]: file["hashes"][SHARD_HASH] for file in files}
    if progress.removal and (seen := progress.removal[SEEN]):
        digests[folder / SEEN] = seen["sha256"]
        with suppress(OSError):  # it is looked at below
            os.truncate(folder / SEEN, seen["bytes"])
    for path, digest in digests.items():
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return f"{path.name} is missing"
        if found != digest:
            return f"{path.name} is damaged"
    for path in folder.rglob("*"):
        if path.is_file() and path not in digests and path != folder / RECORD:
            path.unlink()
    return None
