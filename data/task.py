"""What a prepared folder is to be made of, and whether it is made already."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chats import template_for
from data.config import TRAINED_SPEC, PrepareConfig
from data.decontamination import NGrams
from data.errors import DataError
from data.prepared import FILES, MANIFEST, is_yet_to_be_prepared, open_prepared
from data.resume import identity
from data.survey import TOKEN_KINDS, Survey, is_path, suffix_of, survey, with_beside, without_held_out
from data.tokenizer import load_tokenizer


def _options(config: PrepareConfig, sequence_length: int, ngrams: NGrams | None) -> dict[str, Any]:
    """Return what decides the result, and so what must agree for a prepared folder to serve."""
    tokenizer: dict[str, Any] = {"tokenizer": config.tokenizer}
    if not TRAINED_SPEC.fullmatch(config.tokenizer):
        loaded = load_tokenizer(config.tokenizer, config.end_of_document)
        tokenizer = {"tokenizer": f"sha256:{loaded.fingerprint}", "end_of_document": loaded.end_of_document}
        if config.content != "text":
            template = hashlib.sha256(template_for(config, loaded).self_contained().encode()).hexdigest()
            tokenizer |= {"chat_template": f"sha256:{template}", "too_long": config.too_long}
            tokenizer["prefix_after_special_tokens"] = loaded.prefixes_parts
    return {
        "inputs": list(config.inputs),
        "content": config.content,
        **tokenizer,
        "add_tokens": list(config.add_tokens),
        "lossy_tokenizer": config.lossy_tokenizer,
        "validation_fraction": config.validation_fraction,
        "validation_inputs": list(config.validation_inputs),
        "sequence_length": sequence_length,
        "deduplicate": config.deduplicate,
        "decontaminate": ngrams and {"sets": list(ngrams.names), "sha256": ngrams.fingerprint},
        "packing": config.packing if config.content == "text" else "best-fit",
        "compression": config.compression,
    }


def find_done(config: PrepareConfig, sequence_length: int, out: Path, ngrams: NGrams | None) -> dict[str, Any] | None:
    """Return the manifest of `out` if it is what would be made, None if there is nothing yet.

    Raises:
        DataError: it is something else, or an input has other files by now; says what differs.
    """
    if is_yet_to_be_prepared(out):
        return None
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: exists but is not a folder of prepared data; choose another --out, or remove it")
    manifest = open_prepared(out)
    before = {
        "content": "text",
        "add_tokens": [],
        "lossy_tokenizer": False,
        "packing": "stream",
        "compression": "none",
        "deduplicate": False,
        "decontaminate": None,
        "prefix_after_special_tokens": False,
        "end_of_document": manifest["end_of_document"],
    }  # of older versions
    there, wanted = (
        options | {key: [*map(_spelled_plainly, options[key])] for key in ("inputs", "validation_inputs")}
        for options in (before | manifest["options"], _options(config, sequence_length, ngrams))
    )
    differing = [
        f"{key} (there {there.get(key)!r}, wanted {wanted[key]!r})" for key in wanted if there.get(key) != wanted[key]
    ]
    if differing:
        raise DataError(f"{out}: was prepared with a different {'; '.join(differing)}; choose another, or remove it")
    inputs = (*config.inputs, *config.validation_inputs)
    found = survey(source for source in inputs if is_path(source) and Path(source).exists())
    stats = stats_of(found)
    now, older = listings(found, stats), listings(found, stats, has_beside=False)
    then = {_spelled_plainly(source): each for source, each in manifest.get("listings", now).items()}  # older: none
    if changed := [each for each in now if then.get(_spelled_plainly(each)) not in (now[each], older[each])]:
        raise DataError(
            f"{out}: was prepared when {', '.join(changed)} had other files, or files of other sizes; {FILES} there "
            "lists those that were read. Choose another, or remove it"
        )
    return manifest


def _spelled_plainly(source: str) -> str:
    """An input without what does not change a path, such as the `/` that a shell puts at its end."""
    return os.path.normpath(source) if is_path(source) else source


def stats_of(files: Survey) -> dict[Path, os.stat_result]:
    """What the file system says of each file; asked once, since it may be far away."""
    return {each: each.stat() for path in files.read for each in with_beside(path)}


def listings(files: Survey, stats: Mapping[Path, os.stat_result], *, has_beside: bool = True) -> dict[str, str]:
    """A digest of each input's files: their places below it, and sizes. A copy of the input has the same.

    Args:
        files: of the inputs.
        stats: of `stats_of`.
        has_beside: whether files that are read with others count; folders of earlier versions have digests without.
    """
    found = {}
    for source, paths in files.files.items():
        paths = [each for path in paths for each in (with_beside(path) if has_beside else [path])]
        listing = "".join(f"{os.path.relpath(path, source)}\0{stats[path].st_size}\n" for path in paths)
        found[source] = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
    return found


@dataclass(frozen=True, slots=True)
class Task:
    """All that a prepared folder is made of."""

    config: PrepareConfig
    sequence_length: int
    files: Survey
    listings: dict[str, str]
    """See `listings`."""
    options: dict[str, Any]
    ngrams: NGrams | None
    """Of the evaluation sets; None if there are none."""
    made_by: dict[str, Any]
    """See `data.resume.identity`."""


def task_of(config: PrepareConfig, sequence_length: int, ngrams: NGrams | None) -> Task:
    """Look up the inputs.

    Raises:
        DataError: one does not exist, is held out and trained on, or holds what filters cannot read.
    """
    inputs = (*config.inputs, *config.validation_inputs)
    found = survey(inputs)
    files = without_held_out(found, config.inputs, config.validation_inputs)
    options = _options(config, sequence_length, ngrams)
    tokens = [path for path in files.read if suffix_of(path) in TOKEN_KINDS]
    if tokens and (config.deduplicate or ngrams):
        raise DataError(f"{tokens[0]}: is tokens, and filters read text; prepare token files without filters")
    stats = stats_of(found)
    made_by = identity(options, files, inputs, stats)
    return Task(config, sequence_length, files, listings(found, stats), options, ngrams, made_by)
