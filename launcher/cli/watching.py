"""Commands that look at runs, and at this machine."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import JsonOption, Overrides, RanksOption, local_target, path
from launcher.errors import ConfigError
from launcher.process.console import Console
from launcher.process.torchrun import become_ranks, default_ranks


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            parser=path,
            help="Runs, or folders that contain runs; several are compared. Or the folder of a study.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(help="File: .html; .png or .pdf, of loss curves; or .csv. Default: report.html in the folder."),
    ] = None,
    twin: Annotated[
        Path | None,
        typer.Option(parser=path, help="Run in 16 bits: show how far a single run is above it at equal tokens."),
    ] = None,
) -> None:
    """Write a report with tables and plots."""
    from launcher.study.config import is_of_study

    console = Console(silent=False)
    target = None if out is None else local_target(out, "--out")
    if is_of_study(runs):
        if twin is not None:
            raise ConfigError("--twin: is for the report of a run; a study finds the twin of each arm")
        from launcher.study.report import report_study

        page, *others = report_study(runs[0], target)
        console.line(f"Written: {page}, and next to it {len(others)} files of figures and numbers")
        return
    from launcher.report.output import report as write_report

    console.line(f"Written: {write_report(runs, target, console.line, twin)}")


def status(
    runs: Annotated[list[Path], typer.Argument(parser=path, help="Folders of runs, or folders that contain runs.")],
    as_json: JsonOption = False,
    watch: Annotated[float | None, typer.Option(min=0.1, help="Refresh every N seconds.")] = None,
) -> None:
    """Show the status of runs. Exits with 1 if one has failed, is stalled or cannot be read."""
    from launcher.report.status import show_status

    sys.exit(show_status(runs, as_json=as_json, watch_seconds=watch))


def doctor(
    config: Annotated[
        Path | None, typer.Argument(parser=path, help="Configuration to check for (YAML).", show_default=False)
    ] = None,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine for what would stop or slow down a run. Exits with 1 if there are problems."""
    from launcher.config.file import load_config
    from launcher.plan.plan import make_plan

    num_ranks = ranks or default_ranks()
    if config is not None:
        make_plan(load_config(config, overrides or ()), num_ranks)  # what is wrong with it, no rank need be started for
    arguments = [*(["--config", str(config)] if config else []), *(["--json"] if as_json else []), *(overrides or [])]
    if num_ranks == 1:
        from launcher.doctor import doctor as doctor_of_rank

        sys.exit(doctor_of_rank.main(arguments))
    become_ranks(num_ranks, ["-m", "launcher.doctor", *arguments])
