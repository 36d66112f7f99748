"""`data.shards.prepare` with something to watch."""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from data.config import Content
from data.decontamination import NGRAM_WORDS, NGrams
from data.prepared import FILES, INDEX, MANIFEST, read_manifest
from data.shards import PrepareConfig, PrepareProgress, prepare
from data.survey import Survey
from launcher.process.console import Console, human_count

SECONDS_BETWEEN_LINES = 5.0
DOING = {"tokenizer": "reading text for the tokenizer", "tokens": "tokenizing", "merging": "merging the parts"}
MAX_GROUPS = 20
"""Inputs and evaluation sets that are shown with what was left out."""
MAX_REASONS = 8
"""Reasons to leave files out that are shown."""


def prepare_with_progress(
    config: PrepareConfig,
    sequence_length: int,
    out: Path,
    console: Console,
    *,
    on: str | None = None,
    ngrams: NGrams | None = None,
) -> None:
    """Prepare a folder, with a line every few seconds and the result; silent if the folder already exists.

    Args:
        config: inputs, tokenizer and held-out text.
        sequence_length: tokens of a sequence.
        out: the folder.
        console: where to print.
        on: as of `data.shards.prepare`.
        ngrams: as of `data.shards.prepare`.
    """
    started = time.perf_counter()
    shown: float | None = None
    parts_before = -1

    def show(progress: PrepareProgress) -> None:
        nonlocal shown, parts_before
        if progress.stage == "parts" and parts_before < 0:
            parts_before = progress.parts[0]
        if shown is None:
            console.line(f"Preparing {out} from {', '.join(config.inputs)}")
            if files := files_sentence(progress.files, out):
                console.line(files)
            for sentence in dropped_sentences(progress.files):
                console.line(sentence)
            if progress.earlier:
                console.line(progress.earlier)
        elif time.perf_counter() - shown < SECONDS_BETWEEN_LINES:
            return
        shown = time.perf_counter()
        if progress.stage == "parts":
            complete, parts = progress.parts
            time_left = remaining(progress, parts_before)
            waiting = f"; waiting for {progress.waited_for}" if progress.waited_for else time_left
            console.line(f"tokenizing: {complete} of {parts} parts are complete{waiting}")
            return
        doing = DOING[progress.stage]
        doing += f" with {progress.library}" if progress.library else ""
        left_out = f"; {progress.removed_documents:,} documents left out" if progress.removed_documents else ""
        console.line(
            f"{doing}: {human_count(progress.documents)} documents, {human_count(progress.text_bytes)}B of text, "
            f"{human_count(progress.tokens)} tokens, {progress.bytes_per_second / 1e6:.2f} MB/s{left_out}"
        )

    try:
        manifest = prepare(config, sequence_length, out, show, on, ngrams)
    except KeyboardInterrupt:
        console.line(f"Stopped. The same command goes on from what is done, which is kept hidden beside {out}.")
        raise
    if shown is None:
        return
    if config.content == "text":
        console.line(
            f"Each document ends with {manifest['end_of_document_token']} (token {manifest['end_of_document']})"
        )
    compared, changed = manifest["compared_documents"], manifest["changed_documents"]
    if config.content != "text":
        for name, split in manifest["splits"].items():
            console.line(chats_sentence(name, split, config.content))
    elif config.lossy_tokenizer:
        console.line(
            f"The tokenizer changes text: {changed:,} of {compared:,} documents that were decoded and compared"
        )
    else:
        console.line(
            f"The tokenizer gives text back: {compared:,} documents were decoded and compared, and all bytes add up"
        )
    for line in filter_sentences(manifest.get("filters", {})):
        console.line(line)
    for name, split in manifest["splits"].items():
        rows = f"{split['rows']:,} rows of {sequence_length} tokens from {split['documents']:,} documents"
        if "padding_tokens" in split:
            rows += f", {split['padding_tokens'] / (split['rows'] * sequence_length):.2%} of them padding"
        console.line(f"{out}/{name}: {rows}")
    console.line(f"Prepared in {time.perf_counter() - started:.1f} s")


def filter_sentences(filters: dict[str, Any]) -> Iterator[str]:
    """The documents that each filter has left out, and where they were.

    Args:
        filters: of a manifest.
    """
    titles = {"duplicates": "Duplicates of earlier documents", "evaluation": "Documents with evaluation examples"}
    for name, counts in filters.items():
        yield f"{titles[name]}: {_left_out(counts)}"
        groups = counts.get("sets", {}) | (counts["inputs"] if len(counts["inputs"]) > 1 else {})
        shown = sorted(groups.items(), key=lambda each: -each[1]["documents"])[:MAX_GROUPS]
        for group, of_group in shown:
            yield f"  {group}: {_left_out(of_group)}"
        if len(groups) > MAX_GROUPS:
            yield f"  and {len(groups) - MAX_GROUPS:,} others; {MANIFEST} has all"
        short = sum(of_set["short_examples"] for of_set in counts.get("sets", {}).values())
        if short:
            examples = sum(of_set["examples"] for of_set in counts["sets"].values())
            yield f"  {short:,} of {examples:,} examples have no {NGRAM_WORDS} words of their own, and are not found"


def _left_out(counts: dict[str, Any]) -> str:
    return f"{counts['documents']:,} left out, {human_count(counts['bytes'])}B of text"


def chats_sentence(name: str, split: dict[str, Any], content: Content) -> str:
    """The tokens of a split of chats or pairs that are to be predicted, and those that were too long."""
    share = split["counted_tokens"] / split["tokens"]
    long = {"dropped": split["dropped_chats"], "truncated": split["truncated_chats"]}
    more = "".join(f"; {count:,} too long, {done}" for done, count in long.items() if count)
    return f"{name}: {split['documents']:,} {content}, {share:.2%} of their tokens are answers{more}"


def remaining(progress: PrepareProgress, parts_before: int) -> str:
    """The time that is left for the other parts, if those so far took as long; empty if it is too early to say.

    Args:
        progress: of this attempt.
        parts_before: those that were complete when it began.
    """
    complete, parts = progress.parts
    if not parts_before < complete < parts:
        return ""
    seconds = progress.seconds / (complete - parts_before) * (parts - complete)
    return f", {timedelta(seconds=round(seconds))} left"


def dropped_sentences(files: Survey) -> Iterator[str]:
    """What is missing in splits of prepared data that are read as text."""
    for split in (path.parent for path in files.read if path.name == INDEX):
        if dropped := read_manifest(split.parent)["splits"][split.name].get("dropped_tokens"):
            yield (
                f"{split}: its last {dropped:,} tokens, which filled no row, are not there, nor are the documents that "
                "end in them"
            )


def files_sentence(files: Survey, out: Path) -> str:
    """The number of files that are read and of those that are left out; empty if no input is a file or a folder."""
    if not files.read:
        return ""
    sentence = f"{len(files.read):,} file{'s' if len(files.read) > 1 else ''} read"
    if not files.left_out:
        return f"{sentence}, none left out"
    reasons = files.reasons()
    more = ", ..." if len(reasons) > MAX_REASONS else ""
    return (
        f"{sentence}; {len(files.left_out):,} left out: {', '.join(reasons[:MAX_REASONS])}{more}. "
        f"All are listed in {out / FILES}"
    )
