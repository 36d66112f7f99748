"""Text of others on its way to a terminal, a log or a page: nothing obeys it, and it carries no secret."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from made_runs import make_run
from rich.console import Console as RichConsole
from tiny import tiny_config

from data.errors import DataError
from launcher.config.file import load_config
from launcher.doctor import doctor
from launcher.doctor.checks import Verdict
from launcher.errors import ConfigError, report_error
from launcher.inference import generate
from launcher.inference.text_model import TextModel
from launcher.process.console import Console
from launcher.process.ranks import ALONE
from launcher.report import status
from launcher.report.page import write_report
from launcher.run.folder import RunFolder
from launcher.watch.failure import say_failure

HOSTILE = "\x1b]0;title\x07 \x1b[2J\x1b[H \x9b2J a\rb \u202e [bold]x[/bold] [link=http://x]y[/link]"
COMMANDS = ("\x1b]", "\x1b[2J", "\x1b[H", "\x07", "\x9b", "\r", "\u202e")
SECRET = "s3cr3t"
LEAKING = f"https://u:{SECRET}@h/x and s3://b/x?sig={SECRET}; set `weights_only` to `False`. {HOSTILE}"


class Terminal(io.StringIO):
    """Where text ends up that is written to a terminal."""

    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make both of this process's streams a wide terminal."""
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(status, "RichConsole", lambda **options: RichConsole(file=made, **options))
    monkeypatch.setattr(doctor, "RichConsole", lambda **options: RichConsole(file=made, **options))
    return made


def on_console(write: Callable[[Console], None]) -> Callable[[Path], None]:
    return lambda _: write(Console(silent=False))


def show_status(folder: Path) -> None:
    """A run that says of itself what it likes."""
    run = folder / "run\x1b[2J"
    run.mkdir()
    (run / "state.json").write_text(json.dumps({"status": HOSTILE, "message": HOSTILE}))
    (run / "config.yaml").write_text(yaml.safe_dump({"phase_steps": [4], "phases": [{"precision": HOSTILE}]}))
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": HOSTILE, "throughput/tokens_per_second": 1})  # which the note quotes
    )
    status.show_status([folder], as_json=False, watch_seconds=None)


def write_text(_: Path) -> None:
    """A model that has learned to command terminals."""
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens)))
    model = SimpleNamespace(
        required_tokenizer=lambda: tokenizer,
        weights_bytes=1,
        config=SimpleNamespace(max_sequence_length=1000),
        prompt_tokens=lambda prompt: list(map(ord, prompt)),
        generate_tokens=lambda prompt, **_: map(ord, HOSTILE),
    )
    generate.write_texts(cast(TextModel, model), [HOSTILE])
    generate.write_texts(cast(TextModel, model), [HOSTILE], as_json=True)


def configuration_error(folder: Path) -> None:
    (folder / "x.yaml").write_text(yaml.safe_dump({"run": {"name": HOSTILE, HOSTILE: 1}, HOSTILE: 5, "model": HOSTILE}))
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "x.yaml")
    report_error(caught.value)


SINKS: dict[str, Callable[[Path], object]] = {
    "line": on_console(lambda console: console.line(HOSTILE)),
    "table": on_console(lambda console: console.table(HOSTILE, ["column", "other"], [[HOSTILE, "1"]])),
    "aligned": on_console(lambda console: console.aligned([[HOSTILE, "1"]])),
    "error": lambda _: report_error(DataError(HOSTILE)),
    "defect": lambda _: report_error(RuntimeError(HOSTILE)),
    "file": lambda _: report_error(FileNotFoundError(2, "No such file", HOSTILE)),
    "configuration": configuration_error,
    "status": show_status,
    "generate": write_text,
    "doctor": lambda _: doctor.show([Verdict("disk", "failure", HOSTILE, HOSTILE)], 1, as_json=False),
    "failure": lambda folder: say_failure(RunFolder(tiny_config(folder, folder / "run")), ALONE, HOSTILE),
}


@pytest.mark.parametrize("sink", SINKS)
def test_a_terminal_obeys_nothing(sink: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = open_terminal(monkeypatch)
    SINKS[sink](tmp_path)
    shown = terminal.getvalue()
    assert r"\x1b]0;title\x07" in shown
    for command in COMMANDS:
        assert command not in shown, shown
    if sink != "configuration":  # where `repr` is around it
        assert "[bold]x[/bold]" in shown


@pytest.mark.parametrize("error", [ConfigError, DataError, RuntimeError])
def test_no_error_carries_a_secret_or_risky_advice(error: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise error(LEAKING) from ValueError(LEAKING)
    except error as caught:
        report_error(caught)
    said = capsys.readouterr().err
    assert SECRET not in said
    assert "https://***@h/x" in said
    assert "`weights_only` to" not in said


def test_what_a_run_keeps_of_its_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tiny_config(tmp_path, tmp_path / "run"))
    folder.claim()
    say_failure(folder, ALONE, LEAKING)
    for kept in (capsys.readouterr().err, (tmp_path / "run" / "state.json").read_text()):
        assert "https://***@h/x" in kept
        assert SECRET not in kept
        assert "weights_only" not in kept
    # One that an older version wrote.
    folder.write_state("failed", message=LEAKING)
    status.show_status([tmp_path / "run"], as_json=True, watch_seconds=None)
    assert SECRET not in capsys.readouterr().out


def test_a_page_holds_no_control_character_and_no_secret(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name=HOSTILE, phase_steps=(20, 20), completion=HOSTILE)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text + f"# https://u:{SECRET}@h/x\n")
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert SECRET not in page
    assert r"\x1b]0;title\x07" in page
    for command in COMMANDS:
        assert command not in page


def test_urls_with_passwords_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    def refusal(*overrides: str) -> str:
        from tiny import tiny_tree

        from launcher.config.file import apply_override, parse_config

        tree: dict[str, Any] = tiny_tree(tmp_path, tmp_path / "run")
        for override in overrides:
            apply_override(tree, override)
        with pytest.raises(ConfigError) as caught:
            parse_config(tree)
        return str(caught.value)

    for key in (
        "run.folder", "data.sources.0.path", "data.cache", "evaluation.task_data", "checkpoint.folder",
        "checkpoint.start_from",
    ):  # fmt: skip
        said = refusal(f"{key}=https://u:{SECRET}@h/x", "data.validation_rows=0")
        assert SECRET not in said
        assert f"{key}: https://***@h/x: holds a password or a query" in said
    said = refusal(f"data.prepare={{inputs: ['https://u:{SECRET}@h/x'], tokenizer: 'https://u:{SECRET}@h/t'}}")
    assert "data.prepare.inputs.0: " in said
    assert "data.prepare.tokenizer: " in said
    assert SECRET not in said
