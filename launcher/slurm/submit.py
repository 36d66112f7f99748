"""`tritrain submit`: a Slurm job that trains what was submitted, even if the code changes while it waits.

    RUN/submitted/20260131-120000/code/        our packages, as they were
                                  config.yaml  the resolved configuration
                                  job.sbatch   the script, made from `launcher/slurm/job.sbatch.j2`
                                  job-17.log   what the job prints, through all of its starts

Nothing of the template's values reaches a shell or Slurm as it is: an expression that no filter has quoted is an error,
and so is a name that nobody gives.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launcher.config.file import dump_yaml, to_tree
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.hidden import PACKAGES
from launcher.plan.course import make_course
from launcher.plan.plan import make_plan
from launcher.process.torchrun import JobLauncher
from launcher.run.folder import RunFolder
from launcher.slurm.cluster import SiteConfig, time_problem

CODE_SUFFIXES = (".py", ".c", ".j2", ".html", ".sbatch", ".yaml")


ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The resources that a job requests."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    launcher: JobLauncher
    time: str | None


def submit(config: Config, site: SiteConfig, request: Request) -> tuple[str, Path]:
    """Keep code and configuration in the run's folder and hand the job to Slurm.

    Returns:
        Slurm's number of the job, and the folder of what was submitted.

    Raises:
        ConfigError: the job cannot be as it was asked for, or Slurm refuses it.
    """
    while True:
        folder = next_submission(config)
        script = render(config, site, request, folder)
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another submission took the name meanwhile
            if not folder.is_dir():
                raise
    snapshot(config, folder)
    (folder / "job.sbatch").write_text(script)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(folder / "job.sbatch")], capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        shutil.rmtree(folder)
        raise ConfigError("sbatch: not found; submit from a login node, or print the job with --dry-run") from None
    except subprocess.CalledProcessError as error:
        shutil.rmtree(folder)
        raise ConfigError(f"sbatch refuses the job: {error.stderr.strip()}") from error
    return done.stdout.strip().partition(";")[0], folder


def check(config: Config, request: Request) -> None:
    """Find problems now, before the job waits in the queue.

    Raises:
        ConfigError: lists the problems.
    """
    if request.time is not None and (problem := time_problem(request.time)):
        raise ConfigError(f"--time: {problem}")
    plan = make_plan(config, request.nodes * request.ranks_per_node)
    folder = RunFolder(config)
    folder.check_configuration()
    if folder.is_complete(plan.total_steps):
        raise ConfigError(f"{folder.path}: the run is complete; set another run.name to start a new one")


def next_submission(config: Config) -> Path:
    """A new folder, named after the time."""
    parent, now = config.run.path.absolute() / "submitted", time.strftime("%Y%m%d-%H%M%S")
    names = (now if number == 1 else f"{now}-{number}" for number in range(1, 1000))
    return next(parent / name for name in names if not (parent / name).exists())


def snapshot(config: Config, folder: Path) -> None:
    """Copy the code that runs now, and write the configuration; neither has anything of the environment in it."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix in CODE_SUFFIXES:
                copy = folder / "code" / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())  # permissions are the umask's
    (folder / "config.yaml").write_text(dump_yaml(to_tree(config)))


class Quoted(str):
    """Text that a filter has made safe for where it stands."""


def for_shell(value: Any) -> Quoted:
    """One word of bash, whatever is in it."""
    return Quoted(shlex.quote(_printable(value)))


def for_sbatch(value: Any) -> Quoted:
    """One word of an `#SBATCH` line, which Slurm takes apart itself: it knows quotes, escapes, comments, no `$`."""
    text = _printable(value)
    if not text or re.search(r"[\"'\\]", text):
        raise ConfigError(f"{text!r}: is empty or has a quote or backslash, which Slurm would misread; choose another")
    return Quoted(text if re.fullmatch(r"[\w.,:/@%+=~^&|*()\[\]!-]+", text) else f'"{text}"')


def number(value: Any) -> Quoted:
    """A count, also within quotes."""
    return Quoted(int(value))


def _printable(value: Any) -> str:
    text = str(value)
    if not text.isprintable():
        raise ConfigError(f"{text!r}: must be printable text on one line to be in a job's script")
    return text


def _refuse_unquoted(value: Any) -> Quoted:
    if not isinstance(value, Quoted):
        raise TypeError(f"the template has {value!r} in it, which no filter has quoted")
    return value


def render(config: Config, site: SiteConfig, request: Request, folder: Path) -> str:
    """The job's script.

    Raises:
        ConfigError: a value cannot stand in a script.
        jinja2.UndefinedError, TypeError: the template asks for what is not there, or quotes something not.
    """
    check(config, request)
    run = config.run.path.absolute()
    checkpoints = config.checkpoint.place(run)
    if "%" in str(run):
        raise ConfigError(f"run.folder: {str(run)!r} contains %, which Slurm would replace in the name of the log")
    environment = Environment(
        loader=FileSystemLoader(ROOT / "launcher" / "slurm"),
        undefined=StrictUndefined,
        finalize=_refuse_unquoted,
        autoescape=False,  # of HTML; the filters are ours
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sh": for_shell, "sbatch": for_sbatch, "number": number, "as_it_is": Quoted}
    tasks = request.ranks_per_node if request.launcher == "srun" else 1
    python = site.container.python if site.container else "python" if site.activate else sys.executable
    return environment.get_template("job.sbatch.j2").render(
        job_name=f"tritrain-{config.run.name}",
        nodes=request.nodes,
        ranks_per_node=request.ranks_per_node,
        gpus_per_node=request.gpus_per_node,
        gpus=f"{site.gpu_type}:{request.gpus_per_node}" if site.gpu_type else request.gpus_per_node,
        cpus_per_task=site.cpus_per_rank and site.cpus_per_rank * request.ranks_per_node // tasks,
        launcher=request.launcher,
        time=request.time or site.time,
        log=folder / "job-%j.log",
        run=run,
        submitted=folder,
        steps=make_course(config).total_steps,
        checkpoints=checkpoints if "://" in checkpoints else Path(checkpoints).absolute(),
        python=python,
        host_python="python3" if site.container else python,
        mounts=mounts(site, config) if site.container else (),
        site=site,
    )


def mounts(site: SiteConfig, config: Config) -> Sequence[str]:
    """Folders that a container sees where the host has them: those of the run and of the submission, and the site's."""
    assert site.container is not None
    places = [str(Path.cwd()), str(config.run.path.absolute())]
    if config.checkpoint.folder and "://" not in config.checkpoint.folder:
        places.append(str(Path(config.checkpoint.folder).absolute()))
    for place in places:
        if re.search("[:,]", place):
            raise ConfigError(f"{place!r}: a container cannot mount a folder with : or , in its name; choose another")
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in dict.fromkeys([*places, *site.container.mounts])]
