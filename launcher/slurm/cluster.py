"""A cluster's settings for `tritrain submit`, from a YAML file like `launcher/slurm/site.example.yaml`.

It is read as strictly as a configuration. Values end up in job scripts, and these in run folders: no place for secrets.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from launcher.config.file import load_as
from launcher.config.strict import STRICT

SITE_VARIABLE = "TRITRAIN_SITE"


SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(_|$)", re.I)


OURS = (
    "array",
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "requeue",
    "no-requeue",
    "wrap",
)
"""Options of `sbatch` that Tritrain's jobs set themselves."""


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """The image that ranks run in. The folders of run, checkpoints and submission are mounted in any case."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    runtime: Literal["pyxis", "apptainer"]
    """Pyxis is Slurm's plugin for Enroot."""
    image: str
    """As the runtime names it: a file (`.sqsh`, `.sif`) or an address in a registry."""
    mounts: tuple[str, ...] = ()
    """Further folders, `HOST` or `HOST:INSIDE`: data and the tokenizer's, for one."""
    python: str = "python"
    """The image's Python."""

    def __post_init__(self) -> None:
        problems = text_problems({"image": self.image, "python": self.python})
        for index, mount in enumerate(self.mounts):
            if not mount.isprintable() or not re.fullmatch(r"[^:,]+(:[^:,]+)?", mount):
                problems[f"mounts.{index}"] = f"is {mount!r}; must be HOST or HOST:INSIDE, without commas"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """A cluster, as its users have to name it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    partition: str | None = None
    """As `sbatch` takes it; so are the next three."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    """Time limit of a job, unless `--time` says another: minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS."""
    gpus_per_node: int = 8
    """GPUs taken of each node, one rank each, unless `--gpus-per-node` says otherwise; 0 on a cluster of CPUs."""
    gpu_type: str | None = None
    """Kind of GPU, where `--gpus-per-node` needs one: `h100`."""
    cpus_per_rank: int | None = None
    """CPUs for each rank; null: what the cluster gives."""
    sbatch_options: tuple[str, ...] = ()
    """Further options: `--exclusive`, `--mem=0`."""
    modules: tuple[str, ...] = ()
    """Loaded by `module load`."""
    activate: str | None = None
    """Script that activates the Python environment; null: the Python that submits is the one that trains."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables by name, such as those of NCCL. Not secrets: these come from your environment, or a file of yours."""
    network_interface: str | None = None
    """Interface that NCCL and gloo take, such as `ib0`."""
    setup: tuple[str, ...] = ()
    """Lines of bash that run before the ranks start. The only values that the shell reads as they are."""
    container: ContainerConfig | None = None
    """Image that ranks run in; null: none."""

    def __post_init__(self) -> None:
        names = ("partition", "account", "qos", "constraint", "gpu_type", "activate", "network_interface")
        problems = text_problems({name: getattr(self, name) for name in names})
        problems |= text_problems({f"modules.{index}": name for index, name in enumerate(self.modules)})
        problems |= text_problems({f"environment.{name}": value for name, value in self.environment.items() if value})
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                problems[f"environment.{name!r}"] = "is not a valid name of a variable"
            elif SECRET_NAME.search(name):
                problems[f"environment.{name}"] = (
                    "looks like a secret, and would be kept in every run's folder; export it in your own environment, "
                    "which a job inherits, or read it from a file in `setup`"
                )
        for index, option in enumerate(self.sbatch_options):
            found = re.fullmatch(r"--([a-z][a-z-]*)(=[^\"\\]+)?", option)
            if not found or not option.isprintable():
                problems[f"sbatch_options.{index}"] = f"is {option!r}; must be --NAME or --NAME=VALUE, without quotes"
            elif found[1] in OURS:
                problems[f"sbatch_options.{index}"] = f"is {option!r}, which a job sets itself"
        for index, line in enumerate(self.setup):
            if "\n" in line or "\0" in line:
                problems[f"setup.{index}"] = "must be one line"
        if self.time is not None and (problem := time_problem(self.time)):
            problems["time"] = problem
        for name, least in (("gpus_per_node", 0), ("cpus_per_rank", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems[name] = f"is {value}; must be {least} or more"
        if problems:
            raise ValueError(problems)


def text_problems(values: dict[str, str | None]) -> dict[str, str]:
    """Values that Slurm or a shell would not take as one word of text, by key."""
    return {
        key: f"is {value!r}; must be printable text on one line"
        for key, value in values.items()
        if value is not None and not (value and value.isprintable())
    }


def time_problem(time: str) -> str | None:
    """The problem with a time limit."""
    if re.fullmatch(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})", time, re.ASCII):
        return None
    return f"is {time!r}; must be such as 90 (minutes), 12:00:00 or 2-12 (days and hours)"


def load_site(path: Path | None) -> SiteConfig:
    """Read the site's file: this one, or the one that `TRITRAIN_SITE` names, or none at all.

    Raises:
        ConfigError: lists every problem.
    """
    if path is None and (named := os.environ.get(SITE_VARIABLE)):
        path = Path(named)
    return SiteConfig() if path is None else load_as(SiteConfig, path, "site")
