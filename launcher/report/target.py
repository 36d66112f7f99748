"""The file that a report is written to: replaced only if it is a report itself."""

from collections.abc import Mapping
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
