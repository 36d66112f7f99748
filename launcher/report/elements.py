"""The parts that HTML reports are made of: the page, tables and figures. They load nothing from anywhere."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from data.messages import printable
from launcher.report.plots import THEME
from launcher.report.target import MADE_BY

MISSING = "\N{EM DASH}"


def html_page(title: str, verdicts: Iterable[str], body: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        verdicts: paragraphs in HTML that come first.
        body: the parts that follow, in HTML.
    """
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    return printable(
        template.substitute(
            made_by=MADE_BY,
            title=escape(title),
            light=" ".join(f"--{name}: {light};" for name, (light, _) in THEME.items()),
            dark=" ".join(f"--{name}: {dark};" for name, (_, dark) in THEME.items()),
            verdicts="\n".join(verdicts),
            body="\n".join(body),
        )
    )


def html_table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a table of plain text. On a phone its rows become lists, where each value has its column's name."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    names = [f' data-column="{escape(name)}"' if len(header) > 2 else "" for name in header[1:]]
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td{name}>{escape(cell)}</td>" for name, cell in zip(names, others, strict=True))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def html_figure(svg: str, caption: str = "", title: str = "") -> str:
    """Write an `<svg>` with a heading and a caption of plain text."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    notes = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{heading}{svg}{notes}</figure>"
