"""A terminal that is closed, and a pipe whose reader has ended: what prints there goes on."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT

from launcher.cli import command_line
from launcher.process.console import Console
from launcher.process.streams import losable

OUTLIVES = """
import sys, time
from pathlib import Path
from launcher.errors import ConfigError, report_error
from launcher.cli import command_line
from launcher.process.console import Console
from launcher.process.companions import say
from launcher.process.ranks import ALONE
from launcher.process.streams import outlive_streams
from launcher.run.folder import RunFolder
from launcher.watch.failure import say_failure
from tiny import tiny_config
folder = Path(sys.argv[1])
run = RunFolder(tiny_config(folder, folder / "run"))
run.claim()
outlive_streams()
console = Console(silent=False)
console.start(total_steps=9, step=1)
print("ready", flush=True)
print("also on stderr", file=sys.stderr, flush=True)
while not (folder / "closed").exists():
    time.sleep(0.01)
for step in (2, 3):
    console.progress(step=step, total_steps=9, phase="16-bit", loss=1.0, tokens_per_second=1.0, remaining=1.0)
    console.line("a line")
    console.table("title", ["column"], [["cell"]])
console.stop()
say_failure(run, ALONE, "the reason")
report_error(ConfigError("wrong"))
report_error(RuntimeError("defect"))
say("lost")
print("x" * 100_000)
(folder / "done").touch()
"""


def terminal() -> tuple[int, int]:
    """Both ends of a terminal: a test's and a process's."""
    return os.openpty()


@pytest.mark.parametrize("kind", [pytest.param(terminal, marks=pytest.mark.slow), os.pipe])
def test_a_process_goes_on_when_its_streams_are_lost(kind: Callable[[], tuple[int, int]], tmp_path: Path) -> None:
    ours, theirs = kind()
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", OUTLIVES, str(tmp_path)],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"ready" not in seen or b"also on stderr" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    (tmp_path / "closed").touch()
    assert process.wait(60) == 0
    assert (tmp_path / "done").exists()
    assert '"message": "the reason"' in (tmp_path / "run" / "state.json").read_text()


def test_lines_and_tables_print_all_of_a_text_as_it_is(capsys):
    name = "folder/" * 30 + "end"
    console = Console(silent=False)
    console.line("metrics.jsonl:100: not JSON")
    console.table("table", ["path", "steps"], [[name, "1"]])
    said = capsys.readouterr().out
    assert said.startswith("metrics.jsonl:100: not JSON\n")
    cells = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert "".join(cells) == name


def test_a_character_that_the_encoding_of_stdout_lacks_is_a_question_mark(tmp_path, monkeypatch):
    """Of a name, of a table and of its frame, of text that a model wrote."""
    ends = 0

    def command() -> None:
        nonlocal ends
        console = Console(silent=False)
        console.line("Written: d\u2014x")
        console.table("table", ["loss"], [["3.1 \u00b1 0.2"]])
        sys.stdout.write("na\u00efve\n")
        ends += 1

    raw = io.BytesIO()
    monkeypatch.setattr(command_line, "app", command)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    command_line.main()
    sys.stdout.flush()
    said = raw.getvalue().decode("ascii")
    assert "Written: d?x" in said
    assert "3.1 ? 0.2" in said
    assert "na?ve" in said
    assert ends == 1


def test_a_full_pipe_that_does_not_block_takes_what_it_can():
    """As where the terminal is shared with a program that has made it so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w") as pipe:
        stream = losable(pipe)
        for _ in range(20):
            stream.write("x" * 10_000 + "\n")
        assert len(os.read(reader, 10**6)) > 10_000
        print("goes on", file=stream)
    os.close(reader)
