"""The `tritrain` command."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from launcher.cli import configuring, converting, preparing, training, using, watching
from launcher.errors import report_error
from launcher.process.streams import lack_characters

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Pretrain language models in 16 bits and finish them in 1.58 bits.",
)

COMMANDS: dict[str, Callable[..., None]] = {
    "train": training.train,
    "submit": training.submit,
    "plan": training.plan,
    "study": training.study,
    "prepare": preparing.prepare,
    "inspect": preparing.inspect,
    "convert": converting.convert,
    "average": converting.average,
    "export": converting.export,
    "verify": converting.verify,
    "eval": using.evaluate,
    "perplexity": using.perplexity,
    "generate": using.generate,
    "chat": using.chat,
    "report": watching.report,
    "status": watching.status,
    "doctor": watching.doctor,
    "init": configuring.init,
    "explain": configuring.explain,
    "schema": configuring.schema,
}
"""In the order of `--help`."""

LENIENT = ("train", "submit", "plan")
"""Commands whose unknown options come to `no_options`, which knows the keys for them."""

for name, command in COMMANDS.items():
    app.command(name, context_settings={"ignore_unknown_options": name in LENIENT})(command)


def show_version(asked: bool) -> None:
    """Print the version, and end."""
    if asked:
        from importlib.metadata import version

        typer.echo(f"tritrain {version('tritrain')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that need no command."""


def main() -> None:
    """Run the command; an error that the user can put right is reported in a sentence, without a traceback."""
    lack_characters()
    try:
        app()
    except Exception as error:
        sys.exit(report_error(error))
