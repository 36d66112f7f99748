"""The file that a report is written to: replaced only if it is a report itself, and only by a whole one."""

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher.errors import ConfigError

MADE_BY = "Tritrain report"

CSV_COLUMNS = ("run", "step", "tokens", "phase", "precision")

MARKS: Mapping[str, bytes] = {
    ".html": MADE_BY.encode(),
    ".png": MADE_BY.encode(),
    ".pdf": MADE_BY.encode(),
    ".csv": ",".join(CSV_COLUMNS).encode(),
}
"""What a report holds, by the suffix of its file."""


def check_target(out: Path) -> None:
    """Check that a report may be written to a file.

    Raises:
        ConfigError: its suffix is not known, its folder does not exist, or it exists and is not a report.
    """
    mark = MARKS.get(out.suffix)
    if mark is None:
        raise ConfigError(f"--out {out}: the name must end in {', '.join(MARKS)}")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.absolute().parent}")
    if not out.exists():
        return
    if not out.is_file() or (out.stat().st_size and mark not in out.read_bytes()):
        raise ConfigError(f"--out {out}: exists and is no report, so it is not overwritten; choose another name")


def write_whole(out: Path, content: bytes) -> None:
    """Write a file under another name, and then give it its own; of a link, the target is replaced."""
    target = out.resolve()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), target.stat().st_mode if target.exists() else 0o666 & ~umask())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
