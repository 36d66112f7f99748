"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launcher.errors import ConfigError


def path(text: str) -> Path:
    """The path that a command reads.

    Raises:
        ConfigError: it is blank, which would be the current folder, or an option that there is not.
    """
    if not text.strip():
        raise ConfigError("the name of a file or folder is blank; write . for the current folder")
    if text.startswith("--"):
        refuse_option(text, None)
    return Path(text)


def no_options(overrides: list[str] | None) -> list[str] | None:
    """The overrides, if none of them is an option of another program."""
    for text, following in zip(overrides or [], [*(overrides or [])[1:], None], strict=False):
        if text.startswith("-"):
            refuse_option(text, following)
    return overrides


def refuse_option(text: str, following: str | None) -> NoReturn:
    """Say what to write for an option that there is not.

    Args:
        text: the option, perhaps with its value.
        following: the argument after it, which may be its value.
    """
    from launcher.config.advice import key_named

    option, _, value = text.partition("=")
    name = option.lstrip("-").replace("-", "_")
    if name.startswith(("resume", "continue")):
        raise ConfigError(f"{option}: no such option; a run is resumed by the same command that began it")
    if not value and following and "=" not in following and not following.startswith("-"):
        value = following
    key = key_named(name)
    advice = f"write {key}={value or 'VALUE'}, without dashes" if key else "--help lists the options"
    raise ConfigError(f"{option}: no such option; {advice}")


def local_target(text: str, option: str) -> Path:
    """The path that a command writes to.

    Raises:
        ConfigError: the path would be the working directory or a folder named `s3:` or `~`, which nobody means.
    """
    from launcher.config.paths import local_problem

    if problem := local_problem(text) if text else "is empty; name what is to be written":
        raise ConfigError(f"{option}: {problem}")
    return Path(text)


ConfigPath = Annotated[Path, typer.Argument(parser=path, help="Configuration file (YAML).", show_default=False)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Override keys of the configuration: key.sub=value.", show_default=False, callback=no_options),
]


RanksOption = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Number of processes; default: one per GPU, or one.")
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


ModelPath = Annotated[str, typer.Argument(help="Tritrain checkpoint or run, or an export.")]


TokenizerOption = Annotated[str | None, typer.Option(help="Tokenizer file, if the model has none.")]
