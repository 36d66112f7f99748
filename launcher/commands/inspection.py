"""`tritrain inspect`: what a folder of prepared data holds."""

import json
import tempfile
from dataclasses import asdict

from data.config import Content
from data.inspection import Inspection, inspect_split
from data.mixture import Source
from data.prepared import content_of
from data.sources import open_source
from launcher.commands.prepare import filter_sentences
from launcher.errors import ConfigError
from launcher.process.console import Console, human_count

BAR_CHARS = 40
UNITS: dict[Content, tuple[str, str]] = {
    "text": ("documents", "documents"),
    "chats": ("chats", "chats"),
    "pairs": ("pairs", "answers, each after its prompt,"),
}
"""What a split counts, by what its rows hold, and what its lengths are of."""


def inspect(folder: str, console: Console, *, num_rows: int, num_samples: int, as_json: bool) -> None:
    """Print counts, lengths of documents, padding, use of the vocabulary and samples of each split.

    Args:
        folder: a prepared folder, or the URL of one, of which the first shards are fetched.
        console: where to print.
        num_rows: rows of each split that are read.
        num_samples: rows that are decoded.
        as_json: print JSON.
    """
    try:
        location = Source(path=folder)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error.args[0]['path']}") from error
    with tempfile.TemporaryDirectory() as cache:
        source = open_source(location, cache)
        splits = {split: inspect_split(source, split, num_rows, num_samples) for split in source.manifest["splits"]}
    manifest = source.manifest
    facts = {key: manifest[key] for key in ("sequence_length", "vocab_size", "end_of_document")}
    facts["content"] = content_of(manifest)
    facts["packing"] = manifest["options"].get("packing", "stream")
    facts["filters"] = manifest.get("filters", {})
    if as_json:
        print(json.dumps(facts | {"splits": {split: asdict(found) for split, found in splits.items()}}))  # noqa: T201
        return
    rows = "rows" if facts["content"] == "text" else f"{facts['content']} in rows"
    console.line(
        f"{folder}: {rows} of {facts['sequence_length']:,} tokens, packing {facts['packing']}, {facts['vocab_size']:,} "
        f"tokens in the vocabulary; token {facts['end_of_document']} ends documents"
    )
    for line in filter_sentences(facts["filters"]):
        console.line(line)
    for split, found in splits.items():
        for line in described(split, found, content_of(manifest)):
            console.line(line)


def described(split: str, found: Inspection, content: Content) -> list[str]:
    """One split, for a person."""
    counted, measured = UNITS[content]
    most = max(found.lengths.values(), default=1)
    fullest = ", the fullest" if found.is_sorted and found.read_rows < found.rows else ""
    none = "; no document is whole in them" if not found.whole_documents else ""
    return [
        "",
        f"{split}: {found.rows:,} rows, {human_count(found.tokens)} tokens, {found.documents:,} {counted}, "
        f"{found.bytes_per_token:.2f} bytes per token, {found.padding:.2%} padding",
        f"In the first {found.read_rows:,} rows{fullest}: {found.used_tokens:,} of {found.vocab_size:,} tokens of the "
        f"vocabulary used, the largest is {found.largest_token}{none}",
        *([] if none else [f"Lengths in tokens of the {found.whole_documents:,} {measured} that are whole in them:"]),
        *(
            f"  {f'{power:,} to {2 * power - 1:,}':>24} {count:>9,} {'#' * round(count / most * BAR_CHARS)}"
            for power, count in found.lengths.items()
        ),
        *(f"> {sample!r}" for sample in found.samples),
    ]
