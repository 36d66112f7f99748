"""The `tritrain` command, in the process of the test."""

from typing import Any

from typer.testing import CliRunner

from launcher.cli import app


def tritrain(*arguments: Any) -> str:
    """Run the command in this process; what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
