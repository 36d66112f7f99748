"""`tritrain verify`: find damaged files of checkpoints, and what is wrong with models that anyone exported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.readers import read_documents
from data.tokenizer import load_tokenizer
from launcher.checkpoint.folders import checkpoints_under, is_checkpoint
from launcher.checkpoint.location import is_local, reaching, to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.strangers import not_a_model
from launcher.config.averaging import AVERAGED, without_averaged
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.hf_source import CONFIG, is_hf
from launcher.formats.published import Published
from launcher.formats.published_folder import PublishedFolder
from launcher.formats.published_gguf import PublishedGGUF, is_gguf
from launcher.formats.published_onnx import PublishedONNX, is_onnx
from launcher.inference.verdict import MOST_TOKENS, Verdict, judge
from launcher.process.console import Console, print_results

CHARACTERS_OF_A_TOKEN = 16
"""More than a token has on average; what is beyond that of a text is not read."""


def verify(
    texts: Sequence[str], console: Console, *, as_json: bool, text: str | None = None, tokenizer: str | None = None
) -> int:
    """Look at checkpoints and exports, and print for each what is wrong, or that it is sound.

    Args:
        texts: folders or URLs of Tritrain checkpoints, of runs, whose checkpoints are all read, of exports, and files
            of GGUF.
        console: where to print.
        as_json: print JSON.
        text: a file of text to measure exports on.
        tokenizer: file or folder, for exports that have none.

    Returns:
        An exit code: 0, or 1 if anything is wrong.

    Raises:
        CheckpointError: a folder does not exist or holds something else, or a store cannot be reached.
        ConfigError: an option does not belong to what is verified.
        DataError: the text or the tokenizer cannot be read.
    """
    sample = None if text is None else beginning_of(text)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    found: list[dict[str, Any]] = []
    for place in texts:
        location = to_location(place)
        with reaching(location):
            if place.endswith(AVERAGED) and not location.exists():  # the whole checkpoint is verified
                location = to_location(without_averaged(place))
            if is_local(location) and not location.exists():
                raise CheckpointError(f"{place}: there is no such folder")
            inside = checkpoints_under(location)
            is_one = is_checkpoint(location)
        exports = [] if inside or is_one else list(published_in(location))
        with reaching(location):
            if not (inside or exports) and (problem := not_a_model(location)):
                raise CheckpointError(f"{place} {problem}")
        if not exports:
            if text is not None or tokenizer is not None:
                raise ConfigError(f"--text and --tokenizer belong to exports, and {place} is a checkpoint or run")
            found += damage_of(inside if inside and not is_one else [location], console, as_json=as_json)
        for export in exports:
            verdict = judge(export, sample, text or "", loaded)
            found.append(verdict.as_json())
            if not as_json:
                show(verdict, console)
    if as_json:
        print_results("verify", found)
    return int(not all(result["sound"] for result in found))


def beginning_of(file: str) -> str:
    """As much of a file of text as is measured.

    Raises:
        DataError: it cannot be read, or has no text.
    """
    texts, length = [], 0
    for document in read_documents([file]):
        texts.append(document.text[: MOST_TOKENS * CHARACTERS_OF_A_TOKEN - length])
        length += len(texts[-1])
        if length >= MOST_TOKENS * CHARACTERS_OF_A_TOKEN:
            break
    return "\n\n".join(texts)


def damage_of(folders: Sequence[Path], console: Console, *, as_json: bool) -> list[dict[str, Any]]:
    """Read every byte of Tritrain's checkpoints."""
    found = []
    for folder in folders:
        try:
            problems = list(CheckpointReader(folder).damage())
        except CheckpointError as error:
            problems = [str(error)]
        found.append({"location": str(folder), "sound": not problems, "problems": problems})
        for line in [] if as_json else problems or [f"{folder}: sound"]:
            console.line(line)
    return found


def published_in(location: Path) -> list[Published]:
    """The models in a folder or file that somebody exported; none if it is something else.

    Raises:
        CheckpointError: the store cannot be reached.
        ConfigError: the `gguf` package is missing.
    """
    with reaching(location):
        if location.is_file():
            if is_gguf(location):
                return [PublishedGGUF(location)]
            raise CheckpointError(
                f"{location}: is a file and no GGUF; name the folder that has {CONFIG} and the weights"
            )
        if is_onnx(location):
            return [PublishedONNX(location)]
        if is_hf(location):
            return [PublishedFolder(location)]
        return [PublishedGGUF(path) for path in sorted(location.glob("*.gguf"))]


def show(verdict: Verdict, console: Console) -> None:
    """Print what was found about an export."""
    console.line(f"{verdict.location}: {verdict.form}, {verdict.num_parameters:,} parameters")
    if verdict.blocks:
        rows = [["layer", "-1", "0", "+1"]]
        rows += [
            [str(block), *(f"{share:.1%}" for share in shares)] for block, shares in sorted(verdict.blocks.items())
        ]
        console.aligned(rows)
        console.line(f"scales: {verdict.scales}")
    if verdict.perplexity is not None:
        console.line(f"perplexity {verdict.perplexity:.4g} over {verdict.num_tokens:,} tokens of the text")
    for note in verdict.notes:
        console.line(f"note: {note}")
    for problem in verdict.problems:
        console.line(f"{verdict.location}: {problem}")
    if not verdict.problems:
        console.line(f"{verdict.location}: sound")
