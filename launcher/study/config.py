"""The file of a study: a grid of runs over one configuration.

It is read as strictly as a configuration; nothing in it is a key of the configuration itself, and every key of the
configuration can be varied.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from launcher.checkpoint.strangers import is_study
from launcher.config.file import is_file, load_as
from launcher.config.strict import STRICT
from launcher.errors import ConfigError

POST_TRAINING = "post-training"
Baseline = Literal["16-bit", "scratch", "post-training"]

Keep = Literal["ends", "all", "none"]

NO_BASELINE = "none"
"""The value of `baseline` in a selector that means the arms of the grid itself."""

RESERVED = (
    *("switch", "seed", "seeds", "seeds_planned", "baseline", "rate", "best_rate", "switch_percent"),
    *("arm", "study_arm", "status", "steps", "tokens", "stands_for"),
)
RESERVED_BEGINNINGS = ("held_out_", "excess_", "twin", "above_16_bit", "share_of_fair_gap")
"""Names that selectors and columns of results use besides those of the axes."""

Selector = dict[str, str | bool | int | float | tuple[str | bool | int | float, ...]]
"""By the name of an axis, a value or several; an arm is selected if it has one of them on each axis that is named."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Learning rates that are tried for some arms, each with its best one in the table of results."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    rates: tuple[float, ...]
    """Values of optimizer.learning_rate."""
    only: tuple[Selector, ...] = ()
    """The arms that are swept, with all of their seeds; empty: all."""

    def __post_init__(self) -> None:
        problems = {}
        if len(set(self.rates)) < 2:
            problems["rates"] = "needs two different learning rates or more; leave sweep out for one"
        for index, selector in enumerate(self.only):
            for axis in {"seed", "rate"} & selector.keys():
                problems[f"only.{index}.{axis}"] = "selects no arms to sweep; an arm is swept with all of its seeds"
        if problems:
            raise ValueError(problems)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of runs over one configuration."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    base: str
    """Configuration that all arms share: a file, relative to the study's own, or a shipped one such as
    `english-4m`."""
    overrides: tuple[str, ...] = ()
    """Overrides of all arms, as on the command line: `data.workers=0`, or a file of them, such as
    `recipes/muon.yaml`, which is found as `base` is."""
    switch: tuple[float, ...] = ()
    """Shares of the run in 16 bits: an axis of its own, for a base with a 16-bit phase and then a ternary one."""
    axes: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """By name, the values of an axis; by name, the overrides of a value. An empty list leaves the base as it is."""
    seeds: tuple[int, ...] = (0,)
    """Each sets run.seed and data.shuffle_seed: the initial weights and the order of the data."""
    baselines: tuple[Baseline, ...] = ("16-bit", "scratch")
    """Runs of the same number of tokens besides the grid: `16-bit` throughout; `scratch`, ternary throughout; and
    `post-training`, 16 bits throughout and then rounded, by codes that are fitted to data."""
    sweep: Sweep | None = None
    """Learning rates to try; null: that of each arm's configuration alone."""
    only: tuple[Selector, ...] = ()
    """Keep the arms that one of these selects; empty: all."""
    exclude: tuple[Selector, ...] = ()
    """Leave out the arms that one of these selects."""
    keep: Keep = "ends"
    """Checkpoints kept of a complete arm: its last one, all that its configuration keeps, or none."""

    def __post_init__(self) -> None:
        problems = {}
        for name, values in self.axes.items():
            if not re.fullmatch(r"[a-z][\w-]*", name) or name in RESERVED or name.startswith(RESERVED_BEGINNINGS):
                problems[f"axes.{name}"] = (
                    f"is no name for an axis; use small letters, none of {_list(RESERVED)}, and no beginning of "
                    f"{_list(RESERVED_BEGINNINGS)}"
                )
            elif not values:
                problems[f"axes.{name}"] = "has no values; name at least one, such as {as-it-is: []}"
        for name in ("switch", "seeds", "baselines"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                problems[name] = "names a value twice"
        if not self.seeds:
            problems["seeds"] = "is empty; name at least one, such as [0]"
        if any(not 0 < share < 1 for share in self.switch):
            problems["switch"] = (
                f"is {_list(self.switch)}; shares must be above 0 and below 1, and baselines have 0 and 1"
            )
        problems |= self._unknown_names("only", self.only) | self._unknown_names("exclude", self.exclude)
        problems |= self._unknown_names("sweep.only", self.sweep.only if self.sweep else ())
        if problems:
            raise ValueError(problems)

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """The values that a selector may name, by axis."""
        own = {"switch": tuple(map(share_label, self.switch))} if self.switch else {}
        rates = {"rate": tuple(map(repr, self.sweep.rates))} if self.sweep else {}
        axes = {name: tuple(values) for name, values in self.axes.items()}
        baselines = (NO_BASELINE, *self.baselines)
        return own | axes | rates | {"seed": tuple(map(str, self.seeds)), "baseline": baselines}

    def _unknown_names(self, key: str, selectors: tuple[Selector, ...]) -> dict[str, str]:
        problems = {}
        for index, selector in enumerate(selectors):
            for axis, given in selector.items():
                known = self.labels.get(axis)
                if known is None:
                    problems[f"{key}.{index}.{axis}"] = f"is no axis of this study; choose one of {_list(self.labels)}"
                elif wrong := sorted(chosen(given) - set(known)):
                    problems[f"{key}.{index}.{axis}"] = f"names {_list(wrong)}; the values are {_list(known)}"
        return problems


def chosen(given: Any) -> set[str]:
    """The values of an axis that a selector names."""
    values = given if isinstance(given, tuple | list) else (given,)
    return {str(value).lower() if isinstance(value, bool) else str(value) for value in values}  # YAML's words


def share_label(share: float) -> str:
    """The name of a share of the run: `20%`."""
    return f"{100 * share:g}%"


def _list(values: Any) -> str:
    return ", ".join(map(str, values))


def parse_study(path: Path) -> Study:
    """Read the file of a study; the files that it names need not be there.

    Raises:
        ConfigError: lists every problem, each with its key.
    """
    try:
        return load_as(Study, path, "study")
    except ConfigError as error:
        raise ConfigError(str(error).replace(": study.", ": ")) from None


def load_study(path: Path, shipped: Path) -> tuple[Study, Path]:
    """Read the file of a study, and find the files that it names, relative to itself or among the shipped ones.

    Args:
        path: of the file.
        shipped: folder of the configurations that come with the project.

    Returns:
        The study, and the file of its base.

    Raises:
        ConfigError: lists every problem.
    """
    study = parse_study(path)

    def found(overrides: tuple[str, ...], key: str) -> tuple[str, ...]:
        """The overrides with the files among them as paths."""
        return tuple(str(_file(each, key, path, shipped)) if is_file(each) else each for each in overrides)

    axes = {
        axis: {value: found(overrides, f"axes.{axis}.{value}") for value, overrides in values.items()}
        for axis, values in study.axes.items()
    }
    base = _file(study.base, "base", path, shipped)
    return replace(study, overrides=found(study.overrides, "overrides"), axes=axes), base


def _file(name: str, key: str, path: Path, shipped: Path) -> Path:
    """The file of this name beside the study's own file, or the shipped one."""
    file = name if is_file(name) else f"{name}.yaml"
    places = [path.parent / name, shipped / file]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        folder = (shipped / file).parent
        names = _list(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ConfigError(
            f"{path}: {key}: {places[0]} does not exist, and {name} is no shipped configuration; shipped: {names}"
        )
    return found


def is_of_study(folders: Sequence[Path]) -> bool:
    """Return whether these are the folder of a study.

    Raises:
        ConfigError: one of several is.
    """
    studies = [folder for folder in folders if is_study(folder)]
    if studies and len(folders) > 1:
        raise ConfigError(f"{studies[0]}: is a study, which has a report of its own; name it alone")
    return bool(studies)
