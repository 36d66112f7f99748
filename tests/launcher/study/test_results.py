"""The excess over a twin from logs that the tests write, which may be logged at other steps."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_studies import make_study
from tiny import tiny_tree

from launcher.config.file import parse_config
from launcher.plan.plan import make_plan
from launcher.study.analysis import groups_of
from launcher.study.arms import Arm
from launcher.study.excess import by_steps, differences_from, excess
from launcher.study.loss_figure import loss_figure
from launcher.study.reading import read_study
from launcher.study.report import row_of
from launcher.study.results import Row


def rows(losses: dict[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": loss} for step, loss in losses.items()]


def test_rows_of_the_same_steps_are_subtracted_and_others_are_averaged_first() -> None:
    often = rows({4: 9.0, 5: 3.0, 6: 3.2, 8: 3.4, 12: 3.0})
    seldom = rows({4: 1.0, 8: 3.0, 10: 2.0, 12: 2.5})
    found = differences_from(often, seldom, 4)
    # steps 5 to 8: (3.0 + 3.2 + 2 * 3.4) / 4 - 3.0; steps 9 to 12: 3.0 - (2 * 2.0 + 2 * 2.5) / 4
    assert found == {(4, 8): pytest.approx(0.25), (8, 12): pytest.approx(0.75)}
    assert differences_from(often, often, 4) == {(4, 5): 0, (5, 6): 0, (6, 8): 0, (8, 12): 0}


def test_steps_of_which_a_row_is_missing_or_crosses_the_switch_are_left_out() -> None:
    ours = rows({4: 1.0, 5: 3.0, 6: 3.0, 8: 3.0})
    assert differences_from(ours, rows({3: 1.0, 5: 1.0, 6: 1.0, 8: 2.0}), 4) == {(5, 6): 2.0, (6, 8): 1.0}
    assert differences_from(ours, [], 4) == {}


def test_steps_with_a_loss_that_is_not_finite_count_as_none_of_the_next_row() -> None:
    """Such a row has no loss, as JSON has no word for it; what else it has says that it is one."""
    ours = rows({4: 1.0, 5: 3.0, 7: 3.0, 8: 3.5})
    ours.insert(2, {"step": 6, "train/learning_rate": 1e-3})
    assert by_steps(ours) == {(0, 4): 1.0, (4, 5): 3.0, (6, 7): 3.0, (7, 8): 3.5}
    theirs = rows(dict.fromkeys(range(1, 9), 2.0))
    assert differences_from(ours, theirs, 4) == {(4, 5): 1.0, (7, 8): 1.5}


def test_losses_with_a_teacher_are_compared_without_its_terms() -> None:
    taught = [{"step": step, "train/loss": 7.0, "train/cross_entropy": 2.5} for step in (5, 6)]
    untaught = rows(dict.fromkeys((4, 5, 6), 2.0))
    assert differences_from(rows({4: 2.0}) + taught, untaught, 4) == {(4, 5): 0.5, (5, 6): 0.5}


def test_peak_and_area_are_those_of_the_steps_after_the_switch(tmp_path: Path) -> None:
    plan = make_plan(parse_config(tiny_tree(tmp_path, tmp_path)), 1)  # four steps of 256 tokens, then four ternary ones
    twin = rows(dict.fromkeys(range(1, 9), 3.0))
    ours = rows({1: 9.0, 2: 3.0, 3: 3.0, 4: 3.0, 5: 3.5, 6: 3.1, 7: 2.9, 8: 3.0})
    assert excess(ours, twin, plan, 4) == {
        "excess_peak": pytest.approx(0.5),
        "excess_peak_steps": 1,
        "excess_area": pytest.approx((0.5 + 0.1 - 0.1) * 256),
    }


def test_a_run_that_is_not_complete_or_diverged_has_no_excess(tmp_path: Path) -> None:
    plan = make_plan(parse_config(tiny_tree(tmp_path, tmp_path)), 1)
    whole = rows(dict.fromkeys(range(1, 9), 3.0))
    diverged = [*whole[:5], {"step": 6, "train/learning_rate": 1e-3}, *whole[6:]]
    for ours, theirs in ((whole[:4], whole), (whole[:7], whole), (whole, whole[:7]), (diverged, whole), (whole, [])):
        assert set(excess(ours, theirs, plan, 4).values()) == {None}


def test_a_twin_that_logged_no_row_at_the_switch_is_compared_from_its_next_row_on(tmp_path: Path) -> None:
    plan = make_plan(parse_config(tiny_tree(tmp_path, tmp_path)), 1)
    found = excess(rows({4: 3.0, 6: 3.5, 8: 3.2}), rows({3: 3.0, 6: 3.0, 8: 3.0}), plan, 4)
    assert found["excess_area"] == pytest.approx(0.2 * 2 * 256)


DECAYS = {
    "overrides": [
        "schedule={shape: linear, warmup_steps: 2, final_fraction: 0.0, decay_from_phase: 1}",
        "training.compile=false",
    ],
    "sections": {"phases": [{"precision": "16-bit", "steps": 100}, {"precision": "ternary", "steps": 1}]},
    "baselines": ["16-bit"],
}
"""Keys of a study whose arms decay while they are ternary, and share the 100 steps before."""


def twins_of(folder: Path, losses: Callable[[Arm], float | None], **keys: Any) -> dict[str, Row]:
    """The rows of a made study's arms that switch, by name."""
    records = read_study(make_study(folder, losses, seeds=[0], **keys)).records
    return {record.name: record.row for record in records if record.point["baseline"] == "none"}


def test_a_twin_has_the_length_of_its_arm(tmp_path: Path) -> None:
    """Runs in 16 bits that are equal up to the switch decay over 1, 20 or 100 steps."""
    steps = {"1": 3.0, "20": 2.8, "100": 2.5}
    axes = {"ternary": {name: [f"phases.1.steps={name}"] for name in steps}}

    def loss(arm: Arm) -> float:
        return steps[arm.point["ternary"]] + (0.0 if arm.baseline == "16-bit" else 0.01 * len(arm.point["ternary"]))

    found = twins_of(tmp_path / "study", loss, axes=axes, **DECAYS)
    assert {name: row["twin"] for name, row in found.items()} == {
        f"ternary-{name}": f"16-bit_ternary-{name}" for name in steps
    }
    for name, row in found.items():
        assert row["excess_at_end"] == pytest.approx(0.01 * len(row["ternary"]))
        ours, theirs = (
            {row["step"]: row["train/loss"] for row in map(json.loads, path.open()) if "train/loss" in row}
            for path in (tmp_path / "study" / "arms" / run / "metrics.jsonl" for run in (name, row["twin"]))
        )
        above = [ours[step] - theirs[step] for step in range(101, 101 + int(row["ternary"]))]
        assert row["excess_peak"] == pytest.approx(max(above))
        assert row["excess_area"] == pytest.approx(256 * sum(above))


@pytest.mark.parametrize("length", ["10", "20"])
def test_a_twin_of_another_length_says_nothing_of_the_end_and_a_shorter_one_nothing_at_all(
    tmp_path: Path, length: str
) -> None:
    """Only one of the two lengths has a run in 16 bits; all rates are the same."""
    axes = {"ternary": {"10": ["phases.1.steps=10"], "20": ["phases.1.steps=20"]}}
    constant = "schedule={shape: constant, warmup_steps: 2}"
    keys: dict[str, Any] = DECAYS | {"overrides": [constant, "training.compile=false"]}
    exclude = [{"baseline": "16-bit", "ternary": "10" if length == "20" else "20"}]
    found = twins_of(tmp_path / "study", lambda arm: 3.0, axes=axes, exclude=exclude, **keys)
    has = {name: (row["excess_peak"] is not None, row["excess_at_end"]) for name, row in found.items()}
    assert {row["twin"] for row in found.values()} == {"16-bit"}
    assert has[f"ternary-{length}"] == (True, 0.0)
    assert has[f"ternary-{30 - int(length)}"] == (length == "20", None)


def test_a_twin_that_decays_at_other_times_is_none_to_compare_with(tmp_path: Path) -> None:
    """What an arm is above it is due to the schedule; the figure then has no curve above 16 bits."""
    decays = {
        "late": "{shape: wsd, warmup_steps: 2, decay_fraction: 0.2}",
        "at-switch": "{shape: linear, warmup_steps: 2, decay_from_phase: 1}",
    }
    axes = {"decay": {name: [f"schedule={schedule}"] for name, schedule in decays.items()}}
    exclude = [{"baseline": "16-bit", "decay": "at-switch"}]
    keys: dict[str, Any] = {"axes": axes, "exclude": exclude, "baselines": ["16-bit"], "seeds": [0]}
    findings = read_study(make_study(tmp_path / "study", lambda arm: 3.0, switch=[0.5], **keys))
    groups = groups_of(findings)
    rows_of = {record.name: record.row for record in findings.records}
    late, at_switch = rows_of["decay-late"], rows_of["decay-at-switch"]
    assert late["twin"] == at_switch["twin"] == "16-bit"
    assert (late["twin_is_alike"], at_switch["twin_is_alike"]) == (True, False)
    assert late["excess_peak"] > 0
    assert late["excess_at_end"] == 0
    assert not any(key.startswith("excess_") for key in at_switch)
    lines = [str(line.get_gid()) for axes in loss_figure(findings, groups).axes for line in axes.lines]
    above = [gid.split("-", 2)[2] for gid in lines if gid.startswith("excess-")]
    assert above == ["decay-late"]


@pytest.mark.parametrize(
    "transition", ["{}", "{rewarm_tokens: 1024}", "{learning_rate_drop: {factor: 0.5, tokens: 4096}}"]
)
def test_a_twin_decays_with_its_arm(tmp_path: Path, transition: str) -> None:
    """Also where the arm warms up anew after the switch and the baseline does not."""
    decays = {"late": 0.2, "middle": 0.3, "early": 0.4}
    schedules = {
        name: [f"schedule={{shape: wsd, warmup_steps: 2, decay_fraction: {share}}}"] for name, share in decays.items()
    }

    def loss(arm: Arm) -> float:
        return 3.0 - decays[arm.point["decay"]] + (0.0 if arm.baseline == "16-bit" else 0.05)

    overrides = [f"phases.1.transition={transition}"]
    keys: dict[str, Any] = {"axes": {"decay": schedules}, "overrides": overrides, "baselines": ["16-bit"]}
    found = twins_of(tmp_path / "study", loss, switch=[0.5], **keys)
    assert {row["twin"] for row in found.values()} == {f"16-bit_decay-{name}" for name in decays}
    for row in found.values():
        assert row["twin"] == f"16-bit_decay-{row['decay']}"
        assert row["excess_at_end"] == pytest.approx(0.05)


def test_a_twin_reads_what_its_arm_reads(tmp_path: Path) -> None:
    texts = {name: [f"phases.1.sources=[{{path: {name}}}]"] for name in ("books", "code")}
    keys: dict[str, Any] = {"axes": {"text": texts}, "baselines": ["16-bit"]}
    found = twins_of(tmp_path / "study", lambda arm: 3.0, switch=[0.5], **keys)
    assert {name: row["twin"] for name, row in found.items()} == {
        f"text-{name}": f"16-bit_text-{name}" for name in texts
    }


def test_a_baseline_is_that_of_all_arms_that_it_stands_for(tmp_path: Path) -> None:
    """One schedule decays from the switch on, so it has a 16-bit run for each; the other has one for all of them."""
    switched = "schedule={shape: linear, warmup_steps: 2, final_fraction: 0.0, decay_from_phase: 1}"
    levels = {"20%": 3.2, "50%": 3.0, "80%": 3.1}

    def loss(arm: Arm) -> float:
        own = arm.point["decay"] == "own"
        dense = 2.7 if own else levels[arm.point["switch"]] - 0.5
        if arm.baseline == "16-bit":
            return dense
        return dense + (0.4 if arm.baseline == "scratch" else 0.1 if own else 0.2)

    axes = {"decay": {"own": [], "at-switch": [switched]}}
    folder = make_study(tmp_path / "study", loss, switch=[0.2, 0.5, 0.8], axes=axes)

    def check() -> list[tuple[str, str, float | None, float | None]]:
        groups = groups_of(read_study(folder))
        rows = [row_of(group, groups) for group in groups if group.baseline == "none"]
        return [(row["switch"], row["decay"], row["above_16_bit"], row["share_of_fair_gap"]) for row in rows]

    found = check()
    assert len(found) == 6
    for _, decay, above, share in found:
        distance = 0.1 if decay == "own" else 0.2
        assert (above, share) == (pytest.approx(distance), pytest.approx(1 - distance / 0.4))
    with (folder / "results.csv").open() as file:
        assert "stands_for" not in next(csv.reader(file))
    # A folder of before they were recorded: the baseline is that of the arms of its own point.
    path = folder / "results.json"
    old = [{key: value for key, value in row.items() if key != "stands_for"} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(old))
    assert [above for _, decay, above, _ in check() if decay == "own"] == [pytest.approx(0.1), None, None]


def test_an_arm_has_no_baseline_of_another_schedule(tmp_path: Path) -> None:
    """Where the 16-bit run of a schedule is left out, that of the other says nothing of its arms."""
    axes = {
        "decay": {"late": [], "whole": ["schedule={shape: cosine, warmup_steps: 2}"]},
        "state": {"keep": [], "reset": ["phases.1.transition.optimizer=reset"]},
    }
    exclude = [{"baseline": "16-bit", "decay": "whole"}, {"baseline": "16-bit", "state": "reset"}]
    levels = {"16-bit": 2.5, "scratch": 3.0, "none": 2.6}
    folder = make_study(
        tmp_path / "study",
        lambda arm: levels[arm.baseline],
        axes=axes,
        exclude=exclude,
        baselines=["16-bit", "scratch"],
    )
    groups = groups_of(read_study(folder))
    rows = [row_of(group, groups) for group in groups if group.baseline == "none"]
    assert [(row["decay"], row["state"], row["above_16_bit"], row["share_of_fair_gap"]) for row in rows] == [
        ("late", "keep", pytest.approx(0.1), pytest.approx(0.8)),
        ("late", "reset", pytest.approx(0.1), pytest.approx(0.8)),
        ("whole", "keep", None, None),
        ("whole", "reset", None, None),
    ]
