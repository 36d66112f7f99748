"""`tritrain verify`: find damaged files of checkpoints."""

from collections.abc import Sequence

from launcher.checkpoint.folders import MANIFEST, checkpoints_under
from launcher.checkpoint.location import is_local, reaching, to_location
from launcher.checkpoint.reader import CheckpointReader
from launcher.errors import CheckpointError
from launcher.process.console import Console, print_results


def show_damage(texts: Sequence[str], console: Console, *, as_json: bool) -> int:
    """Read every byte of checkpoints, and print for each what is damaged, or that it is sound.

    Args:
        texts: folders or URLs of checkpoints, or of runs, whose checkpoints are all read.
        console: where to print.
        as_json: print JSON.

    Returns:
        An exit code: 0, or 1 if anything is damaged.

    Raises:
        CheckpointError: a folder does not exist, or a store cannot be reached.
    """
    found = []
    for text in texts:
        place = to_location(text)
        with reaching(place):
            if is_local(place) and not place.exists():
                raise CheckpointError(f"{text}: there is no such folder")
            inside = checkpoints_under(place)
        folders = [place] if (place / MANIFEST).is_file() or not inside else inside
        for folder in folders:
            try:
                problems = list(CheckpointReader(folder).damage())
            except CheckpointError as error:
                problems = [str(error)]
            found.append({"location": str(folder), "sound": not problems, "problems": problems})
            for line in [] if as_json else problems or [f"{folder}: sound"]:
                console.line(line)
    if as_json:
        print_results("verify", found)
    return int(not all(result["sound"] for result in found))
