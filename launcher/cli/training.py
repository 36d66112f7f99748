"""Commands that train, or show what training would do."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.arguments import ConfigPath, JsonOption, Overrides, RanksOption, local_target, path
from launcher.plan.gpus import UTILIZATION
from launcher.process.console import Console
from launcher.process.torchrun import JobLauncher, Launcher, become_run, default_ranks


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    launcher: Annotated[Launcher, typer.Option("--with", help="Program that starts the processes.")] = "torchrun",
    stop_after_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Smoke test: only N steps of each phase, in a folder that is removed afterwards."),
    ] = None,
    profile: Annotated[
        int | None, typer.Option(min=1, help="Trace N steps of each phase: logging.profile_steps.", metavar="N")
    ] = None,
) -> None:
    """Train on this machine; start a run or resume it."""
    from launcher.commands.train import check_start

    num_ranks = ranks or default_ranks()
    overrides = [*(overrides or ()), *([] if profile is None else [f"logging.profile_steps={profile}"])]
    folder, plan = check_start(config, overrides, num_ranks, is_smoke=stop_after_steps is not None)
    if folder.is_complete(plan.total_steps):
        console = Console(silent=False)
        console.line(folder.completion())
        from launcher.report.ending import show_next

        show_next(folder, console)
        return
    smoke = [] if stop_after_steps is None else [f"--stop-after-steps={stop_after_steps}"]
    become_run(launcher, config, [*smoke, *overrides], num_ranks)


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of a node; default: the site's.")] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes of a node; default: one per GPU, or one.")
    ] = None,
    site: Annotated[
        Path | None, typer.Option(parser=path, help="Settings of your cluster (YAML); default: $TRITRAIN_SITE.")
    ] = None,
    launcher: Annotated[JobLauncher, typer.Option("--with", help="Program that starts the processes.")] = "torchrun",
    time: Annotated[str | None, typer.Option(help="Time limit of the job; default: the site's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script and submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm; the job queues itself again until the run is complete."""
    from launcher.config.file import load_config
    from launcher.run.folder import check_place
    from launcher.slurm.cluster import load_site
    from launcher.slurm.submit import Request, next_submission, render
    from launcher.slurm.submit import submit as submit_job

    parsed, cluster, console = load_config(config, overrides or ()), load_site(site), Console(silent=False)
    check_place(config, overrides or (), parsed)
    gpus = cluster.gpus_per_node if gpus_per_node is None else gpus_per_node
    request = Request(
        nodes=nodes, gpus_per_node=gpus, ranks_per_node=ranks_per_node or gpus or 1, launcher=launcher, time=time
    )
    if dry_run:
        sys.stdout.write(render(parsed, cluster, request, next_submission(parsed)))
        return
    job, folder = submit_job(parsed, cluster, request)
    console.line(f"Submitted: job {job}, in {folder}")
    console.line(f"To save and stop it: touch {shlex.quote(str(parsed.run.path / 'stop'))}")


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
    gpu: Annotated[str | None, typer.Option(help="GPU to estimate hours for, such as H100; default: this one.")] = None,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of its peak that is reached.")
    ] = UTILIZATION,
    switch: Annotated[
        bool, typer.Option("--switch", help="Only propose when to switch, by published laws and your studies.")
    ] = False,
    studies: Annotated[
        list[Path] | None, typer.Option("--study", parser=path, help="--switch: fit the study in this folder.")
    ] = None,
) -> None:
    """Show what a run would do and need: sizes, memory, time, disk, exports, missing files. Trains nothing."""
    from launcher.checkpoint.folders import complete_checkpoints
    from launcher.commands.train import refusal
    from launcher.config.automatic import ANY_GPU, made_concrete, stored_values
    from launcher.config.file import load_config
    from launcher.inference.inputs import input_problems
    from launcher.plan.gpus import gpu_of_this_machine, named_gpu
    from launcher.plan.plan import make_plan
    from launcher.plan.table import show_plan
    from launcher.run.folder import configuration_of_run

    given = load_config(config, overrides or ())
    parsed, counted_as = made_concrete(given, ANY_GPU, stored_values(configuration_of_run(given.run.path)))
    planned = make_plan(parsed, ranks or default_ranks())
    if switch or studies:
        from launcher.study.switch_plan import show_switch

        show_switch(planned, studies or [], Console(silent=False), as_json=as_json)
        return
    show_plan(
        planned,
        Console(silent=False),
        as_json=as_json,
        gpu=named_gpu(gpu) if gpu else gpu_of_this_machine(),
        utilization=utilization,
        missing=input_problems(parsed),
        refused=refusal(config, overrides or (), given),
        checkpoints_there=0 if "://" in parsed.checkpoints else len(complete_checkpoints(Path(parsed.checkpoints))),
        counted_as=counted_as,
    )


def study(
    file: Annotated[Path, typer.Argument(parser=path, help="File of the study (YAML).", show_default=False)],
    out: Annotated[str, typer.Option(help="Folder of the study; the same one goes on with it.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show arms, trunks, hours and disk; train nothing.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at once; default: as many as cores or GPUs allow.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of each run.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="--dry-run: estimate hours for this GPU, instead of measuring here.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="--gpu: share of its peak that is reached.")
    ] = UTILIZATION,
) -> None:
    """Train a grid of runs that share their trunks, several at once; the same command goes on."""
    from launcher.study.study import Options
    from launcher.study.study import study as run_study

    options = Options(jobs=jobs, num_ranks=ranks, dry_run=dry_run, gpu=gpu, utilization=utilization)
    sys.exit(run_study(file, local_target(out, "--out"), options, Console(silent=False)))
