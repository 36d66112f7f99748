"""`tritrain verify`: find damaged files of checkpoints."""

from collections.abc import Sequence

from launcher.checkpoint.folders import MANIFEST, checkpoints_under
from launcher.checkpoint.location import is_local, reaching, to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.errors import CheckpointError
from launcher.process.console import Console


def show_damage(texts: Sequence[str], console: Console) -> int:
    """Read every byte of checkpoints, and print for each what is damaged, or that it is sound.

    Args:
        texts: folders or URLs of checkpoints, or of runs, whose checkpoints are all read.
        console: where to print.

    Returns:
        An exit code: 0, or 1 if anything is damaged.

    Raises:
        CheckpointError: a folder does not exist, or a store cannot be reached.
    """
    exit_code = 0
    for text in texts:
        place = to_location(text)
        with reaching(place):
            if is_local(place) and not place.exists():
                raise CheckpointError(f"{text}: no such folder")
            inside = checkpoints_under(place)
        folders = [place] if (place / MANIFEST).is_file() or not inside else inside
        for folder in folders:
            try:
                problems = list(CheckpointReader(folder).damage())
            except CheckpointError as error:
                problems = [str(error)]
            if problems:
                exit_code = 1
            for line in problems or [f"{folder}: sound"]:
                console.line(line)
    return exit_code
