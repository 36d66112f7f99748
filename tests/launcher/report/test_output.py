"""The files of `tritrain report`: by suffix, whole or not at all, and never over something else."""

import csv
import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from made_runs import make_run

from launcher.errors import ConfigError
from launcher.report.output import report
from launcher.report.page import write_report


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which take seconds to draw and are nothing to their files."""
    monkeypatch.setattr("launcher.report.page.to_svg", lambda *_: "<svg></svg>")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "one", name="one", phase_steps=(12, 8))


def written(folders: list[Path], out: Path | None = None) -> tuple[Path, list[str]]:
    said: list[str] = []
    return report(folders, out, said.append), said


@pytest.mark.parametrize(
    ("name", "begins"), [("r.html", b"<!doctype html>"), ("r.png", b"\x89PNG"), ("r.pdf", b"%PDF-"), ("r.csv", b"run,")]
)
def test_the_suffix_says_what_is_written_and_a_report_is_replaced(run, tmp_path, name, begins):
    for _ in range(2):
        out, _ = written([run], tmp_path / name)
        assert out.read_bytes().startswith(begins)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", name}


def test_a_folder_of_runs_is_compared_and_a_run_without_rows_is_left_out_by_name(run, tmp_path):
    make_run(tmp_path / "runs" / "two", name="two", phase_steps=(12, 8))
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "config.yaml").write_text("run: {name: begun}\n")
    out, said = written([tmp_path / "runs"])
    assert out == tmp_path / "runs" / "report.html"
    assert "2 runs: one, two" in out.read_text()
    (line,) = said
    assert "begun has no metrics.jsonl" in line
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl: the run has logged nothing yet"):
        written([tmp_path / "runs" / "begun"])


def test_the_default_is_in_the_folder_or_here_for_several(run, tmp_path, monkeypatch):
    assert written([run])[0] == run / "report.html"
    other = make_run(tmp_path / "other", name="other", phase_steps=(12, 8))
    monkeypatch.chdir(tmp_path)
    assert written([run, other])[0] == Path("report.html")
    assert (tmp_path / "report.html").is_file()


def test_the_table_holds_every_row_and_value(run, tmp_path):
    other = make_run(tmp_path / "other", name="other", phase_steps=(4, 4))
    out, _ = written([run, other], tmp_path / "r.csv")
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == sum(len((each / "metrics.jsonl").read_text().splitlines()) for each in (run, other))
    assert {row["run"] for row in rows} == {"one", "other"}
    assert float(rows[1]["train/loss"]) > 2
    assert rows[0]["validation/when"] == "start of phase"
    assert rows[0]["train/loss"] == ""


@pytest.mark.parametrize(
    "name", ["config.yaml", "thesis.tex", "report", "photo.png", "notes.html", "data.csv", "a.pdf"]
)
def test_what_is_no_report_is_never_overwritten(run, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"must end in|is no report"):
        written([run], tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"mine"
    (tmp_path / "link.html").symlink_to(name)
    with pytest.raises(ConfigError, match="is no report"):
        written([run], tmp_path / "link.html")
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_full_disk_leaves_the_old_report_and_nothing_else(run, tmp_path, monkeypatch):
    out, _ = written([run], tmp_path / "r.html")
    before = out.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        written([run], out)
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "r.html"}


def test_a_link_is_followed_and_permissions_are_kept(run, tmp_path):
    before = os.umask(0o022)
    try:
        written([run], tmp_path / "new.csv")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.csv").stat().st_mode) == 0o644
    whole = (tmp_path / "new.csv").read_bytes()
    for suffix in ("csv", "html"):
        target = tmp_path / f"new.{suffix}"
        target.write_bytes(b"")
        target.chmod(0o640)
        (tmp_path / f"link.{suffix}").symlink_to(target.name)
    written([run], tmp_path / "link.csv")
    write_report([run], tmp_path / "link.html")
    assert (tmp_path / "new.csv").read_bytes() == whole
    for suffix in ("csv", "html"):
        assert (tmp_path / f"link.{suffix}").is_symlink()
        assert (tmp_path / f"new.{suffix}").stat().st_size
        assert stat.S_IMODE((tmp_path / f"new.{suffix}").stat().st_mode) == 0o640


def test_a_damaged_run_of_a_folder_is_left_out_by_name(run, tmp_path):
    shutil.copytree(run, tmp_path / "runs" / "damaged")
    (tmp_path / "runs" / "damaged" / "metrics.jsonl").write_text("[1]\n")
    _, said = written([tmp_path / "runs"], tmp_path / "r.csv")
    assert [line for line in said if "damaged" in line and line.startswith("Left out: ")]
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: a row must be a JSON object"):
        written([tmp_path / "runs" / "damaged"], tmp_path / "r.csv")


def test_a_link_to_itself_is_named(run, tmp_path):
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    written([run], tmp_path / "loop.csv")
    assert (tmp_path / "loop.csv").is_file()
