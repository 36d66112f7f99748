"""`tritrain study`: plan a study, train its arms, and write what they came to."""

import os
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.new_paths import replace_file
from launcher.errors import ConfigError
from launcher.inference.inputs import input_problems
from launcher.process.console import Console
from launcher.process.torchrun import ROOT, num_gpus
from launcher.run.folder import RunFolder
from launcher.run.requeue import read_state
from launcher.study.arms import MOST_NAMED, Arm, make_arms, raise_problems
from launcher.study.config import load_study
from launcher.study.dispatch import INTERRUPTED, Outcome, Queue
from launcher.study.jobs import Job, jobs_of, needed
from launcher.study.sharing import BEGINNING, share
from launcher.study.table import show_arms, show_needs, show_totals
from launcher.study.worker import Place

SHIPPED = ROOT / "configs"

COMPLETE, FAILED = 0, 1

KEPT = (*(f"checkpoint.{key}" for key in BEGINNING), "data.validation_rows")
"""Keys that a run may change when it resumes, but an arm may not: what it began with, and what its loss is the mean of.
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says besides the file."""

    jobs: int | None
    """Runs at once; None: as many as cores or GPUs allow."""
    num_ranks: int
    """Processes of each run."""
    dry_run: bool
    gpu: str | None
    utilization: float


def study(path: Path, out: Path, options: Options, console: Console) -> int:
    """Train what is not trained yet of a study; returns the exit code of the command.

    Args:
        path: file of the study.
        out: its folder.
        options: of the command line.
        console: for people.

    Raises:
        ConfigError: lists what is wrong with the study or with the configuration of an arm.
        DataError: lists what the runs read and is missing.
    """
    asked, base = load_study(path, SHIPPED)
    arms = make_arms(asked, base, out, options.num_ranks)
    sharing = share(arms)
    jobs = jobs_of(arms, sharing, out)
    places = places_of(out, options)
    warn_of_others(arms, out, console)
    if options.dry_run:
        show_arms(arms, sharing, console)
    show_totals(arms, sharing, console)
    if options.dry_run:
        show_needs(
            jobs,
            places[0],
            console,
            num_places=len(places),
            keep=asked.keep,
            gpu=options.gpu,
            utilization=options.utilization,
        )
        return COMPLETE
    from launcher.study.results import results_of, standings_of, table_of, write_results  # which need torch

    check_arms(arms)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "study.yaml", path.read_text())
    write_results(results_of(arms, sharing, standings_of(arms, jobs, {})), out)  # for a report on the way
    outcome = Queue(jobs, places, asked.keep, console).run()
    rows = results_of(arms, sharing, standings_of(arms, jobs, outcome.failed))
    write_results(rows, out)
    console.line()
    console.aligned(table_of(arms, rows))
    console.line(f"Losses are in nats per token, means over seeds. One row for each arm: {out / 'results.csv'}")
    console.line(f"Figures, intervals and what is noise: tritrain report {shlex.quote(str(out))}")
    return ending(outcome, jobs, console)


def places_of(out: Path, options: Options) -> list[Place]:
    """One place for each run at once, with the GPUs or the threads that it has.

    Of GPUs of another machine (``options.gpu``) as many are counted as there are here, or else those of one run.
    """
    ranks, gpus, cores = options.num_ranks, num_gpus(), len(os.sched_getaffinity(0))
    num = options.jobs or max(1, (gpus or (cores if options.gpu is None else ranks)) // ranks)
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // (num * ranks)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) == gpus else [str(number) for number in range(gpus)]
    return [
        Place(
            out=out,
            num_ranks=ranks,
            threads=threads,
            gpus=tuple(names[(slot * ranks + rank) % gpus] for rank in range(ranks)) if gpus else (),
        )
        for slot in range(num)
    ]


def warn_of_others(arms: Sequence[Arm], out: Path, console: Console) -> None:
    """Name complete runs in the folder that are no arms of the study, as those whose names have got a seed."""
    names = {arm.name for arm in arms}
    others = [
        folder.name
        for folder in sorted(out.glob("arms/*"))
        if folder.name not in names and read_state(folder).get("status") == "complete"
    ]
    if others:
        more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
        console.line(
            f"WARNING: arms/ has complete runs that this file gives no such name: {', '.join(others[:MOST_NAMED])}"
            f"{more}; results leave them out, and the same runs under new names are trained again. A name holds a "
            "seed, a rate or an axis that has several values: if that is all that has changed, rename the folders, as "
            f"`tritrain study` with --dry-run names the arms (such as {arms[0].name})"
        )


def check_arms(arms: Sequence[Arm]) -> None:
    """Check that folders which exist belong to their arms, and that what the arms read is there.

    Raises:
        ConfigError: lists what is wrong, each with the arms that it is wrong in.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    for arm in arms:
        try:
            RunFolder(arm.config).check_configuration(KEPT)
        except ConfigError as error:
            problems[str(error)].append(arm.name)
        for key, problem in input_problems(arm.config):
            problems[f"{key}: {problem}"].append(arm.name)
    raise_problems(problems, len(arms))


def ending(outcome: Outcome, jobs: Sequence[Job], console: Console) -> int:
    """Say what is not complete and how to go on; returns the exit code of the command."""
    for name, message in outcome.failed.items():
        console.line(f"FAILED: {name}: {message}")
    if outcome.blocked:
        console.line(f"Not run, because their trunk is not complete: {', '.join(sorted(outcome.blocked))}")
    left = len([job for job in needed(jobs) if not job.is_trunk])
    if left:
        console.line(f"{left} arms are not complete. The same command goes on with them.")
    if outcome.failed:
        return FAILED
    return INTERRUPTED if left else COMPLETE
