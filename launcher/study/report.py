"""`tritrain report` on a study's folder: a page, its figures, and its numbers as CSV and JSON.

NAME.html         the page, which loads nothing
NAME.json         all numbers of the page: arms, gaps, differences, effects, what was held equal
NAME.csv          a row for each arm over its seeds
NAME-curves.csv   the curves of the first figure
NAME-figures/     each figure as PNG and PDF
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.new_paths import replace_file
from launcher.errors import ConfigError
from launcher.report.plots import to_picture
from launcher.report.target import MADE_BY, check_target
from launcher.study.analysis import (
    Difference,
    Group,
    against_best,
    best_of,
    differences_of,
    effects_of,
    gaps_of,
    groups_of,
)
from launcher.study.curves import curve_rows
from launcher.study.figures import (
    above_dense,
    arms_figure,
    excess_figure,
    gap_figure,
    has_switch_axis,
    line_name,
    switch_figure,
)
from launcher.study.held_equal import differing, held_equal
from launcher.study.intervals import Estimate
from launcher.study.loss_figure import loss_figure
from launcher.study.page import study_page
from launcher.study.reading import Findings, read_study
from launcher.study.token_figure import fits_of, token_figure, token_lines
from launcher.study.token_fit import TokenFit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST_COLUMN = "study_arm"
"""Of the CSV files, by which they are known as a report's."""


def report_study(folder: Path, out: Path | None) -> list[Path]:
    """Write the report of a study; returns its files, the page first.

    Args:
        folder: of the study.
        out: the page; by default `report.html` in the folder.

    Raises:
        ConfigError: the study's files are damaged, or a file may not be written.
    """
    out = out or folder / "report.html"
    if out.suffix != ".html":
        raise ConfigError(f"--out {out}: the name must end in .html; figures and numbers are written next to the page")
    check_target(out)
    findings = read_study(folder)
    groups = groups_of(findings)
    figures = figures_of(findings, groups)
    contents: dict[Path, bytes] = {
        out: study_page(findings, groups, figures).encode(errors="replace"),
        out.with_suffix(".json"): json.dumps(numbers_of(findings, groups), indent=2).encode(),
        out.with_suffix(".csv"): _as_csv({FIRST_COLUMN: group.name, **row_of(group, groups)} for group in groups),
        out.with_name(f"{out.stem}-curves.csv"): _as_csv(
            {FIRST_COLUMN: row.pop("arm"), **row} for row in curve_rows(groups, findings)
        ),
    }
    pictures = out.with_name(f"{out.stem}-figures")
    for name, figure in figures.items():
        contents |= {pictures / f"{name}{suffix}": to_picture(figure, suffix[1:]) for suffix in (".png", ".pdf")}
    for path in contents:
        _check_replaceable(path)
    pictures.mkdir(exist_ok=True)
    for path, content in contents.items():
        replace_file(path.resolve(), content)
    return list(contents)


def _check_replaceable(path: Path) -> None:
    marks = (MADE_BY.encode(), FIRST_COLUMN.encode())
    if path.exists() and not (path.is_file() and any(mark in path.read_bytes() for mark in marks)):
        raise ConfigError(f"{path}: exists and is no report, so it is not overwritten; choose another --out")


def figures_of(findings: Findings, groups: Sequence[Group]) -> "dict[str, Figure]":
    """The figures that the study has results for, by name."""
    figures: dict[str, Figure] = {}
    if any(record.log for record in findings.records):
        figures["loss"] = loss_figure(findings, groups)
    complete = [group for group in groups if group.losses]
    if complete and has_switch_axis(groups):
        figures["switch"] = switch_figure(groups)
        if any(gaps_of(group, groups) for group in complete):
            figures["gap"] = gap_figure(groups)
        if any(group.mean("excess_peak") for group in complete):
            figures["excess"] = excess_figure(groups)
    if any(len(arms) > 1 for arms in token_lines(groups).values()):
        figures["tokens"] = token_figure(groups)
    if complete:
        figures["arms"] = arms_figure(groups)
    return figures


def row_of(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """The figures of an arm over its seeds, flat."""
    row: dict[str, Any] = {"baseline": group.baseline, **group.point, "best_rate": group.rate}
    row |= {"switch_percent": group.switch_share, "seeds": len(group.losses), "seeds_planned": group.num_seeds}
    values = {name: group.mean(name) for name in ("held_out_loss", "held_out_bits_per_byte")}
    values["above_16_bit"] = above_dense(group, groups)
    gaps = gaps_of(group, groups) if group.losses else []
    values["share_of_fair_gap"] = gaps[0].share_of(group) if gaps else None
    values |= {name: group.mean(name) for name in ("excess_peak", "excess_peak_steps", "excess_area", "excess_at_end")}
    for name, value in values.items():
        row |= {name: value and value.mean, f"{name}_low": value and value.low, f"{name}_high": value and value.high}
    return row


def numbers_of(findings: Findings, groups: Sequence[Group]) -> dict[str, Any]:
    """All numbers of the report, as JSON."""
    best = best_of(groups)
    return {
        "made_by": MADE_BY,
        "study": str(findings.folder.resolve().name),
        "best": None if best is None else best.name,
        "arms": [{"name": group.name, **_finite(row_of(group, groups))} for group in groups],
        "gaps": [
            {
                "arm": group.name,
                "is_fair": position == 0,
                "dense": gap.dense.name,
                "scratch": gap.scratch.name,
                "size": _plain(gap.size),
                "share_closed": _plain(gap.share_of(group)),
                "problems": gap.problems,
            }
            for group in groups
            if group.losses and group.baseline not in ("16-bit", "scratch")
            for position, gap in enumerate(gaps_of(group, groups))
        ],
        "effects": [
            {"axis": axis, "value": value, "against": first, "of": of, "difference": _plain(estimate), "pairs": pairs}
            for of in ("held_out_loss", "excess_peak", "excess_area", "excess_at_end")
            for axis, value, first, estimate, pairs in effects_of(groups, of)
        ],
        "ternary_tokens": [
            {
                "line": line_name(line),
                "scale": fit.scale,
                "exponent": _plain(fit.exponent),
                "floor": _plain(fit.floor),
                "spread_of_logarithms": fit.spread,
            }
            for line, fit in fits_of(groups).items()
            if isinstance(fit, TokenFit)
        ],
        "differences": [_plain_difference(each) for each in differences_of(groups)],
        "against_best": [_plain_difference(each) for each in against_best(groups)],
        "held_equal": held_equal(findings),
        "differing": differing(findings),
        "without_result": {
            record.name: record.message or record.status for record in findings.records if record.loss is None
        },
    }


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return _finite(
        {
            "mean": estimate.mean,
            "low": estimate.low,
            "high": estimate.high,
            "standard_error": estimate.standard_error,
            "n": estimate.num,
        }
    )


def _plain_difference(difference: Difference) -> dict[str, Any]:
    return {
        "first": difference.first.name,
        "second": difference.second.name,
        "axis": difference.axis,
        "by_seed": _plain(difference.by_seed),
        "is_within_noise": difference.by_seed.is_within_noise,
        "by_held_out_row": _plain(difference.by_row),
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has no word for become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _as_csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    given = list(rows)
    columns = list(dict.fromkeys([FIRST_COLUMN, *(key for row in given for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(given)
    return text.getvalue().encode(errors="replace")
