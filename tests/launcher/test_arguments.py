"""Arguments of `tritrain` that are blank, or options of other programs."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is not None
    return str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", ""], ["plan", " "], ["submit", ""], ["submit", "c.yaml", "--site", ""], ["verify", ""],
        ["status", ""], ["status", ".", ""], ["report", ""], ["doctor", ""], ["explain", "run", "--config", ""],
        ["convert", "x", "--to", "y", "--config", ""], ["eval", "x", "--task-data", ""],
        ["export", "x", "--to", "y", "--format", "hf", "--tokenizer", ""],
        ["average", "", "--out", "y"], ["average", " ", "--last", "2", "--out", "y"],
    ],
)  # fmt: skip
def test_a_blank_path_is_not_the_current_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(*arguments)
    assert "is blank; write . for the current" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", "3e-4"], "--lr: no such option; write optimizer.learning_rate=3e-4, without dashes"),
        (["--lr=3e-4"], "--lr: no such option; write optimizer.learning_rate=3e-4, without dashes"),
        (["--batch-size", "8", "run.seed=1"], "--batch-size: no such option; write training.global_batch_sequences=8,"),
        (["--compile"], "--compile: no such option; write training.compile=VALUE, without dashes"),
        (["--engine.name", "fsdp2"], "--engine.name: no such option; write engine.name=fsdp2, without dashes"),
        (["--seed", "--ranks", "2"], "--seed: no such option; write run.seed=VALUE, without dashes"),
        (["--resume"], "--resume: no such option; a run is resumed by the same command that began it"),
        (["--resume-from-checkpoint", "x"], "--resume-from-checkpoint: no such option; a run is resumed by the same"),
        (["--nonsense"], "--nonsense: no such option; --help lists the options"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan", "submit"])
def test_an_option_of_another_program_is_answered_with_the_override(
    command: str, arguments: list[str], said: str
) -> None:
    if command == "submit" and "--ranks" in arguments:
        arguments = arguments[:1]
    assert refusal(command, "c.yaml", *arguments).startswith(said)


def test_an_option_before_the_configuration_is_named_as_well() -> None:
    assert refusal("train", "--lr", "3e-4", "c.yaml").startswith("--lr: no such option; write optimizer.learning_rate=")
