"""Numbers of the documentation that tests hold the code to."""

import re

from places import ROOT


def export_bounds() -> dict[str, float]:
    """The bounds of `docs/exporting.md`, by what is written in the first column, without code marks."""
    page = (ROOT / "docs" / "exporting.md").read_text()
    _, _, table = page.partition("| written as | computed by | largest difference of a logit |\n")
    rows = re.findall(r"^\| (.+?) \| .+? \| ([\d.e-]+)\b.* \|$", table.partition("\n\n")[0], re.MULTILINE)
    return {written.replace("`", ""): float(bound) for written, bound in rows}
