"""The `tritrain` command, in the process of the test."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner

from launcher.cli import app, main


def tritrain(*arguments: Any) -> str:
    """Run the command in this process; what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def outcome(*arguments: Any) -> tuple[int, str, str]:
    """Run the command in this process, as a shell does: its exit code, and what is on stdout and on stderr."""
    before = dict(os.environ)
    with (
        patch.object(sys, "argv", ["tritrain", *map(str, arguments)]),
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
    ):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        finally:
            os.environ.clear()
            os.environ.update(before)
    return code, out.getvalue(), err.getvalue()
