"""The arms of a study: one resolved configuration for each point of the grid, baseline and seed."""

import contextlib
import copy
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config.file import DERIVED_KEYS, apply_override, parse_config, read_mapping, to_tree
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.plan.plan import Plan, make_plan
from launcher.study.baselines import baseline_of, set_switch
from launcher.study.config import NO_BASELINE, POST_TRAINING, Baseline, Selector, Study, chosen, share_label

MOST_NAMED = 3
"""Arms that an error names; of more, it says how many."""

FOR_ALL = ("seed", "rate", "baseline")
"""Axes that make a difference to every baseline."""

Point = Mapping[str, str]
"""By axis, the value of an arm: `switch`, the study's own axes, `rate`, `baseline` and `seed`."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A run of a study."""

    name: str
    """Of its folder, and its `run.name`."""
    point: Point
    """Its values on the axes that make a difference to it."""
    plan: Plan
    stands_for: tuple[Point, ...] = ()
    """Of a baseline, the values on the axes of all places in the grid that it is the baseline of."""

    @property
    def config(self) -> Config:
        """Its configuration."""
        return self.plan.config

    @property
    def group(self) -> Point:
        """Its values but for the seed: what it is averaged with."""
        return {axis: value for axis, value in self.point.items() if axis != "seed"}

    @property
    def baseline(self) -> str:
        """The baseline that it is; `none` for an arm of the grid."""
        return self.point.get("baseline", NO_BASELINE)

    @property
    def result_step(self) -> int:
        """Steps that its result is trained for: all but the one that follows a `post-training` switch."""
        last = self.plan.phases[-1]
        return last.start if self.baseline == POST_TRAINING else last.end

    @property
    def tokens(self) -> int:
        """Tokens that its result is trained on."""
        return self.plan.tokens_before(self.result_step)


def make_arms(study: Study, base: Path, out: Path, num_ranks: int) -> list[Arm]:
    """Resolve and check the configuration of every arm.

    Args:
        study: that they are of.
        base: file of the configuration that they share.
        out: folder of the study; an arm's is `arms/NAME` in it.
        num_ranks: of each run.

    Raises:
        ConfigError: lists what is wrong, each with the arms that it is wrong in.
    """
    shared = read_mapping(base, "sections such as run, model and data")
    for derived in DERIVED_KEYS:
        shared.pop(derived, None)
    points = list(points_of(study))
    if not points:
        raise ConfigError("only, exclude: leave no arm")
    configs: dict[int, Config] = {}
    problems: dict[str, list[str]] = defaultdict(list)
    for index, point in enumerate(points):
        try:
            configs[index] = _config_of(study, shared, point)
        except ConfigError as error:
            for line in str(error).splitlines():
                problems[line].append(name_of(point, study.labels))
    raise_problems(problems, len(points))
    named = _named(study, points, configs)
    arms = []
    for name, point, stands_for, config in named:
        # A folder that got another name, as `warn_of_others` advises, holds the run under its old one.
        allowed = (*config.run.allow_changes, "run.name")
        run = replace(config.run, name=name, folder=str(out / "arms" / name), allow_changes=allowed)
        try:
            plan = make_plan(replace(config, run=run), num_ranks)
            arms.append(Arm(name=name, point=point, plan=plan, stands_for=stands_for))
        except ConfigError as error:
            problems[str(error)].append(name)
    raise_problems(problems, len(named))
    return arms


def points_of(study: Study) -> Iterator[Point]:
    """All points of the grid and of the baselines that `only` and `exclude` leave, the baselines first."""
    labels = study.labels
    grid = {axis: labels[axis] for axis in labels if axis not in ("rate", "seed", "baseline")}
    for baseline in (*study.baselines, NO_BASELINE):
        for values in itertools.product(*grid.values()):
            place = dict(zip(grid, values, strict=True)) | {"baseline": baseline}
            for seed in labels["seed"]:
                point = place | {"seed": seed}
                swept = study.sweep is not None and _selected(point, study.sweep.only or ({},))
                for rate in [{"rate": rate} for rate in labels["rate"]] if swept else [{}]:
                    full = point | rate
                    if _selected(full, study.only or ({},)) and not _selected(full, study.exclude):
                        yield full


def _selected(point: Point, selectors: Sequence[Selector]) -> bool:
    return any(all(point.get(axis) in chosen(given) for axis, given in each.items()) for each in selectors)


def _config_of(study: Study, shared: dict[str, Any], point: Point) -> Config:
    """The configuration of a point, without a name and a folder of its own."""
    tree = copy.deepcopy(shared)
    overrides = list(study.overrides)
    for axis, values in study.axes.items():
        overrides += values[point[axis]]
    overrides += [f"optimizer.learning_rate={point['rate']}"] if "rate" in point else []
    overrides += [f"run.seed={point['seed']}", f"data.shuffle_seed={point['seed']}"]
    for override in overrides:
        apply_override(tree, override)
    if "switch" in point:
        set_switch(tree, next(share for share in study.switch if share_label(share) == point["switch"]))
    config = parse_config(tree)
    if config.checkpoint.folder is not None:
        raise ConfigError("checkpoint.folder: must be null; a study keeps checkpoints in the folders of its arms")
    if not config.data.validation_rows:
        raise ConfigError("data.validation_rows: is 0; a study compares held-out losses, so it must be above 0")
    baseline = point["baseline"]
    return config if baseline == NO_BASELINE else baseline_of(config, _as_baseline(baseline))


def _as_baseline(name: str) -> Baseline:
    assert name in ("16-bit", "scratch", "post-training")
    return name  # type: ignore[return-value]


Key = tuple[str, float]
"""What tells one run from another: all but its learning rate, and that."""

Named = tuple[str, Point, tuple[Point, ...], Config]
"""The name, point, `stands_for` and configuration of an arm."""


def _named(study: Study, points: Sequence[Point], configs: Mapping[int, Config]) -> list[Named]:
    """Each different run once, with a name and its point on the axes that matter to it.

    Raises:
        ConfigError: two points of the grid are the same run, or two runs have the same name.
    """
    keys_but_rate = {index: _key_but_rate(config) for index, config in configs.items()}
    keys = {index: (keys_but_rate[index], config.optimizer.learning_rate) for index, config in configs.items()}
    differences = _differences(points, keys, keys_but_rate)
    found: dict[tuple[str, Key], str] = {}
    named: dict[str, tuple[Point, int]] = {}
    for index, point in enumerate(points):
        baseline = point["baseline"]
        kept = FOR_ALL if baseline != NO_BASELINE else tuple(point)
        matters = {axis: value for axis, value in point.items() if axis in kept or (baseline, axis) in differences}
        if baseline == NO_BASELINE:
            del matters["baseline"]
        name = name_of(matters, study.labels)
        is_new = (baseline, keys[index]) not in found
        earlier = found.setdefault((baseline, keys[index]), name)
        if earlier == name and name in named and (is_new or baseline == NO_BASELINE):
            raise ConfigError(f"axes: two arms would have the name {name}; give their values names that differ")
        if earlier != name and baseline == NO_BASELINE:
            raise ConfigError(f"axes: the arms {earlier} and {name} are the same run; leave one of them out")
        named.setdefault(earlier, (matters, index))
    places = _places(study, points, configs, keys_but_rate)
    return [
        (name, point, tuple(places[points[index]["baseline"], keys_but_rate[index]].values()), configs[index])
        for name, (point, index) in named.items()
    ]


def _places(
    study: Study, points: Sequence[Point], configs: Mapping[int, Config], keys_but_rate: Mapping[int, str]
) -> defaultdict[tuple[str, str], dict[str, Point]]:
    """By a baseline and its run but for the learning rate, the places in the grid that have it.

    Also those for which the study leaves the baseline out, if another place has the same, or the arm.
    """
    found: defaultdict[tuple[str, str], dict[str, Point]] = defaultdict(dict)
    for index, point in enumerate(points):
        place, config = place_of(point), configs[index]
        if point["baseline"] != NO_BASELINE:
            found[point["baseline"], keys_but_rate[index]][repr(place)] = place
            continue
        for baseline in study.baselines:
            with contextlib.suppress(ConfigError):  # of one that is left out, for it cannot be
                found[baseline, _key_but_rate(baseline_of(config, baseline))][repr(place)] = place
    return found


def place_of(point: Point) -> Point:
    """The values of a point on the axes that make no difference to every baseline."""
    return {axis: value for axis, value in point.items() if axis not in FOR_ALL}


def _differences(
    points: Sequence[Point], keys: Mapping[int, Key], keys_but_rate: Mapping[int, str]
) -> set[tuple[str, str]]:
    """The baselines and axes that tell different runs apart.

    They are those for which two points that differ in the axis alone are different runs. If runs are different and are
    not told apart by these, as where each size has a rate of its own, they are also the axes in which those differ.

    Args:
        points: of the study.
        keys: by the index of a point, what tells its run from others.
        keys_but_rate: the same without its learning rate, for points with swept rates of their own.
    """
    seen: dict[tuple[str, str], Key] = {}
    found = set()
    for index, point in enumerate(points):
        for axis in point:
            rest = repr(sorted((name, value) for name, value in point.items() if name != axis))
            if seen.setdefault((axis, rest), keys[index]) != keys[index]:
                found.add((point["baseline"], axis))
    alike: dict[str, list[int]] = defaultdict(list)
    for index, point in enumerate(points):
        if point["baseline"] != NO_BASELINE:
            alike[repr((point["seed"], point["baseline"]))].append(index)
    for members in alike.values():
        for first, second in itertools.combinations(members, 2):
            ours, theirs = points[first], points[second]
            told: Mapping[int, object] = keys if ours.get("rate") == theirs.get("rate") else keys_but_rate
            places = zip(place_of(ours).items(), place_of(theirs).items(), strict=True)
            differ = {(ours["baseline"], axis) for (axis, value), (_, other) in places if value != other}
            if told[first] != told[second] and not differ & found:
                found |= differ
    return found


def _key_but_rate(config: Config) -> str:
    """What tells one run from another, whatever its name and its learning rate."""
    tree = to_tree(config)
    tree["run"] |= {"name": None, "folder": None}
    tree["optimizer"]["learning_rate"] = None
    return json.dumps(tree, sort_keys=True)


def name_of(point: Point, labels: Mapping[str, Sequence[str]]) -> str:
    """The name of an arm: what differs, `switch-20_state-reset_seed-0`."""
    parts = [point["baseline"]] if point.get("baseline", NO_BASELINE) != NO_BASELINE else []
    parts += [
        f"{axis}-{re.sub(r'[^0-9A-Za-z.]+', '-', value).strip('-')}"
        for axis, value in point.items()
        if axis not in ("baseline", "seed") and len(labels[axis]) > 1
    ]
    parts += [f"seed-{point['seed']}"] if len(labels["seed"]) > 1 else []
    return "_".join(parts) or "arm"


def raise_problems(problems: Mapping[str, Sequence[str]], num_arms: int) -> None:
    """Raise what is wrong with arms, each problem once; ``problems`` has the names of the arms that have it.

    Raises:
        ConfigError: something is.
    """
    lines = [f"{_where(names, num_arms)}: {problem}" for problem, names in problems.items()]
    if lines:
        raise ConfigError("\n".join(lines))


def _where(names: Sequence[str], num_arms: int) -> str:
    if len(names) == num_arms:
        return "all arms" if num_arms > 1 else f"arm {names[0]}"
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"arm{'s' if len(names) > 1 else ''} {', '.join(names[:MOST_NAMED])}{more}"
