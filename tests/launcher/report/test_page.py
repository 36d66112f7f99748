"""The report of runs: what it reads, what it computes, what stands on the page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import make_run

from launcher.cli import main
from launcher.report.page import write_picture, write_report
from launcher.report.plots import loss_figure, to_svg
from launcher.report.summary import summarize, verdict


class PageParser(HTMLParser):
    """Collects tags with their attributes, ids, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def parse(path: Path) -> PageParser:
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def test_what_keeps_a_report_from_being_made_is_a_sentence(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", noise=0.0)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("run: {name: x}\n")
    (tmp_path / "begun" / "metrics.jsonl").touch()
    for arguments, sentence in (
        ((tmp_path / "begun", "--out", tmp_path / "a.html"), "no complete row yet; a report needs at least one"),
        ((run, "--out", tmp_path), f"{tmp_path}: the name must end in .html, .png, .pdf, .csv"),
        ((run, "--out", tmp_path / "absent" / "a.png"), f"there is no folder {tmp_path / 'absent'}"),
        ((tmp_path / "absent",), "absent: no such folder"),
    ):
        monkeypatch.setattr("sys.argv", ["tritrain", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.fixture
def no_figures(monkeypatch):
    """A page without its figures, which take seconds to draw."""
    monkeypatch.setattr("launcher.report.page.to_svg", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def page_of_one(tmp_path_factory):
    """A run, and its page."""
    folder = tmp_path_factory.mktemp("one")
    run = make_run(folder / "run")
    write_report([run], folder / "report.html")
    return run, folder / "report.html"


@pytest.fixture(scope="module")
def page_of_two(tmp_path_factory):
    """The page of two runs."""
    folder = tmp_path_factory.mktemp("two")
    runs = [make_run(folder / name, name=name, phase_steps=(20, 20)) for name in ("a", "b")]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


def test_a_phase_that_changes_no_precision_is_named_by_its_number(tmp_path):
    run = make_run(tmp_path / "run", phase_steps=(20, 20, 20))
    for name in ("config.yaml", "metrics.jsonl"):  # its third phase as one of chats, after the ternary one
        before, mark, after = (run / name).read_text().rpartition("ternary")
        (run / name).write_text(before + mark + after.replace("16-bit", "ternary"))
    labels = [text.get_text() for text in loss_figure([summarize(run).history]).axes[0].texts]
    assert labels == ["to ternary at step 20", "phase 2 at step 40"]


def test_the_page_of_one_run_has_everything_in_order(page_of_one):
    run, file = page_of_one
    page = parse(file)
    summary = summarize(run)
    parts = (
        *("demo", verdict(summary), "124 M, of which 84.9 M ternary (68%)", "deepspeed, ZeRO stage 2", "1 h 10 min"),
        *("phase 1: ternary", "training loss, nats/token", "to ternary at step 800", "validation, bits/byte"),
        *("Back at the loss before, after", "steps since the switch", "Learning rate", "Quantization strength"),
        *("Gradient norm", "Throughput, tokens/s", "waiting for data, %", "Peak memory, GiB"),
        *("Once upon a time there was a small kingdom.", "tritrain_version: 0.1.0"),
    )
    positions = [page.text.index(part) for part in parts]
    assert positions == sorted(positions)
    for mark in ("loss-raw-0", "loss-smoothed-0", "loss-validation-0", "loss-switch-0-1", "loss-ternary-0-1"):
        assert mark in page.ids
    for mark in (
        "transition-1-level-0",
        "transition-1-peak-0",
        "transition-1-area-0",
        "train-grad-norm-run-0",
        "quant-strength-ternary-0-1",
    ):
        assert mark in page.ids
    assert "throughput-model-flops-utilization-run-0" not in page.ids


@pytest.mark.usefixtures("no_figures")
def test_rates_of_another_order_are_on_a_log_scale(tmp_path):
    run = make_run(tmp_path / "run", phase_steps=(40, 40))
    write_report([run], tmp_path / "report.html")
    assert "Learning rate (log scale)" not in parse(tmp_path / "report.html").text
    lines = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["phase"] and "train/learning_rate" in row:
            row["train/learning_rate"] = 1e-6
        lines.append(json.dumps(row) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))
    write_report([run], tmp_path / "report.html")
    assert "Learning rate (log scale)" in parse(tmp_path / "report.html").text


@pytest.mark.usefixtures("no_figures")
def test_samples_are_side_by_side(tmp_path):
    run = make_run(tmp_path / "run", phase_steps=(20, 20), completion=" was\n<b>")
    write_report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    _, _, samples = text.partition('<div class="samples">')
    samples, _, _ = samples.partition("</div>")
    pre = '<pre class="sample"><b>Once upon a time there</b> was\n&lt;b&gt;</pre>'
    assert samples.split("<figure>")[1:] == [
        f"<figcaption>16-bit, step 20</figcaption>{pre}</figure>\n",
        f"<figcaption>ternary, step 40</figcaption>{pre}</figure>\n",
    ]


@pytest.mark.slow
def test_averaged_weights_have_a_line_and_a_column_where_there_are_some(tmp_path):
    plain, averaged = (make_run(tmp_path / name, name=name) for name in ("plain", "averaged"))
    metrics = averaged / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        if row["precision"] == "16-bit" and row.get("validation/when") in ("interval", "end of phase"):
            row["validation/bits_per_byte_averaged"] = 0.777 + row["validation/bits_per_byte"]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    at_end = next(row for row in rows if row.get("validation/when") == "end of phase")
    assert summarize(averaged).phases[0].averaged_bits_per_byte == at_end["validation/bits_per_byte_averaged"]
    write_report([plain, averaged], tmp_path / "report.html")
    page = parse(tmp_path / "report.html")
    assert "loss-validation-averaged-1" in page.ids
    assert "loss-validation-averaged-0" not in page.ids
    assert "Dotted, with crosses: validation of the averaged weights." in page.text
    text = page.text[page.text.index("Of averaged weights, bits/byte") :]
    assert f"{at_end['validation/bits_per_byte_averaged']:.3f}" in text
    write_report([plain], tmp_path / "plain.html")
    assert "averaged weights" not in parse(tmp_path / "plain.html").text


def test_the_page_loads_nothing_and_its_ids_are_unique(page_of_two):
    text, page = page_of_two.read_text(), parse(page_of_two)
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "image"})
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    references = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    assert references
    assert references <= set(page.ids)


def test_the_colors_follow_the_readers_theme(page_of_one):
    text = page_of_one[1].read_text()
    assert "prefers-color-scheme: dark" in text
    body = text[text.index("<body>") :]
    assert "var(--run-0)" in body
    assert "var(--ink)" in body
    assert set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r'="#|url\(#', "", body))) == set()


def test_several_runs_stand_side_by_side(tmp_path):
    runs = [
        make_run(tmp_path / "a", name="early", phase_steps=(200, 800)),
        make_run(tmp_path / "b", name="late", phase_steps=(800, 200), ramp_steps=20),
        make_run(tmp_path / "c", name="still going", done_steps=300),
        make_run(tmp_path / "d", name="three phases", phase_steps=(400, 400, 200)),
    ]
    write_report(runs, tmp_path / "report.html")
    page = parse(tmp_path / "report.html")
    for index, run in enumerate(runs):
        assert f"{index + 1}: {summarize(run).name}" in page.text
        assert f"loss-smoothed-{index}" in page.ids
    assert {"loss-switch-0-1", "loss-switch-1-1", "loss-switch-3-2", "transition-1-level-0"} <= set(page.ids)
    assert {"loss-switch-2-1", "transition-1-level-2", "transition-2-level-0"}.isdisjoint(page.ids)
    assert "transition-2-level-3" in page.ids
    finals = {summary.name: summary.phases[-1].validation_bits_per_byte for summary in map(summarize, runs)}
    best = min(finals["early"], finals["late"], finals["three phases"])
    assert f"ends lowest, at {best:.3f} bits per byte" in page.text


@pytest.mark.slow
def test_a_page_can_be_written_at_every_moment_of_a_run(tmp_path):
    whole = make_run(tmp_path / "whole", phase_steps=(4, 4), evaluate_every=2)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.yaml").write_text((whole / "config.yaml").read_text())
    for num_lines in range(1, len(lines) + 1, 3):
        (tmp_path / "part" / "metrics.jsonl").write_text("".join(lines[:num_lines]) + '{"torn')
        write_report([tmp_path / "part"], tmp_path / "report.html")
        assert "Unfinished, at step" in parse(tmp_path / "report.html").text


@pytest.mark.parametrize("replacement", ['"train/loss": NaN, ', ""])  # JSON has no NaN: a writer may leave it out
def test_a_diverged_run_says_so_and_still_gives_a_page(tmp_path, replacement):
    run = make_run(tmp_path / "run", phase_steps=(40, 40), done_steps=60)
    text = (run / "metrics.jsonl").read_text()
    text = re.sub(r'"train/loss": [\d.]+, (?=.*"quant/strength": 1)', replacement, text)
    (run / "metrics.jsonl").write_text(text)
    write_report([run], tmp_path / "report.html")
    assert "the ternary phase stands at nan" in parse(tmp_path / "report.html").text


def test_everything_from_the_run_is_escaped(tmp_path):
    evil = "<script>alert('x')</script> & $\\frac{1}$ \"q\" #0072b2"
    run = make_run(tmp_path / "run", name=evil, phase_steps=(20, 20), completion=evil + "\ud800")
    other = make_run(tmp_path / "other", name="_hidden", phase_steps=(20, 20))
    write_report([run, other], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    page = parse(tmp_path / "report.html")
    assert page.text.count(evil) >= 4  # title, table, sample, legend
    assert "2: _hidden" in page.text


@pytest.mark.slow
def test_a_long_run_gives_a_small_page(tmp_path):
    run = make_run(tmp_path / "run", phase_steps=(20_000, 5_000))
    write_report([run], tmp_path / "report.html")
    write_report([make_run(tmp_path / "short")], tmp_path / "short.html")
    assert (tmp_path / "report.html").stat().st_size < 400_000
    assert (tmp_path / "report.html").stat().st_size < 3 * (tmp_path / "short.html").stat().st_size


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    history = summarize(make_run(tmp_path / "run")).history
    assert to_svg(loss_figure([history]), "loss", "loss") == to_svg(loss_figure([history]), "loss", "loss")


def test_a_page_fits_a_phone(page_of_two):
    text, page = page_of_two.read_text(), parse(page_of_two)
    cells = [attributes for tag, attributes in page.tags if tag == "td"]
    assert {cell.get("data-column") for cell in cells} >= {"1: a", "2: b", "Steps", "Tokens", "run 1, to ternary"}
    assert "@media screen and (max-width: 40rem)" in text
    assert "white-space: nowrap" not in text
    assert not re.search(r"[^-]min-width: (?!9rem)", text)
    assert {"loss-narrow-raw-0", "loss-raw-0"} <= set(page.ids)


@pytest.mark.usefixtures("no_figures")
def test_numbers_break_at_spaces_alone_on_a_phone(tmp_path):
    """Beside a long name a value would else be one letter wide; a word that does not fit a line still breaks."""
    write_report([make_run(tmp_path / "a", phase_steps=(20, 20))], tmp_path / "report.html")
    phone = (tmp_path / "report.html").read_text().partition("@media screen and (max-width: 40rem)")[2]
    rules = dict(re.findall(r"^  ([^{]+) \{ (.*) \}$", phone.partition("\n}")[0], re.MULTILINE))
    assert "overflow-wrap: break-word" in rules["th, td"]
    assert [rule for rule, text in rules.items() if "anywhere" in text] == ["td[data-column]::before"]


def test_marks_of_switches_that_are_close_do_not_cover_each_other(tmp_path):
    run = summarize(make_run(tmp_path / "a", phase_steps=(20, 2, 20)))
    figure = loss_figure([run.history])
    heights = [text.xy[1] for text in figure.axes[0].texts]
    assert len(heights) == 2
    assert abs(heights[0] - heights[1]) > 0.05


@pytest.mark.filterwarnings("error")
def test_a_name_in_any_script_is_drawn_without_a_warning(tmp_path):
    run = make_run(tmp_path / "a", name="\u8a9e-\u0440\u0443\u0441", phase_steps=(4, 4))
    write_report([run], tmp_path / "report.html")
    write_picture(run, tmp_path / "picture.png")
    assert "\u8a9e-\u0440\u0443\u0441" in (tmp_path / "report.html").read_text()


def test_the_picture_is_a_png(tmp_path):
    write_picture(make_run(tmp_path / "run", name="$1 & <2>"), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
