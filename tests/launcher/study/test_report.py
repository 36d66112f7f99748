"""The report of studies that were never trained, with losses that the tests choose."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command import tritrain
from made_studies import BITS, STEPS, make_study

from launcher.errors import ConfigError
from launcher.run.scores import RESULTS
from launcher.study.analysis import dense_of, gaps_of, groups_of
from launcher.study.arms import Arm
from launcher.study.curves import curve_rows
from launcher.study.figures import above_dense, gap_figure, switch_figure
from launcher.study.loss_figure import loss_figure
from launcher.study.page import study_page
from launcher.study.reading import read_study
from launcher.study.report import figures_of, numbers_of, report_study

SEED = {"0": 0.0, "1": 0.1, "2": -0.07}
DENSE = {"0": 3.0, "1": 3.02, "2": 2.99}
STATE = {"keep": [], "reset": ["phases.1.transition.optimizer=reset"]}
QUANTIZER = {"gaussian": [], "nielsen": ["phases.1.quantization={preset: nielsen-2025}"]}
COSINE = "schedule={shape: cosine, warmup_steps: 2}"
SWEEP = {"rates": [1e-3, 3e-3, 9e-3], "only": [{"baseline": ["16-bit", "scratch"]}]}
ABOVE = {"20%": 0.12, "50%": 0.06, "80%": 0.08}


def loss_of(arm: Arm) -> float:
    """The middle rate is best; from scratch is 0.2 above 16 bits, with the other quantizer 0.5."""
    point = arm.point
    loss = (
        DENSE[point["seed"]]
        + SEED[point["seed"]]
        + {"0.001": 0.05, "0.003": 0.0, "0.009": 0.09}.get(point.get("rate", ""), 0.0)
    )
    if point.get("baseline") == "scratch":
        return loss + (0.5 if point.get("quantizer") == "nielsen" else 0.2)
    if point.get("baseline") == "16-bit":
        return loss
    wobble = {"0": 0.0, "1": 0.004, "2": -0.004}[point["seed"]]
    return loss + ABOVE[point["switch"]] + wobble * (1 if point.get("state") == "keep" else -1)


class Elements(HTMLParser):
    """The open tags and all addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    assert not elements.open
    assert all(address.startswith("#") for address in elements.addresses)
    assert not re.search(r"url\((?!#)", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("\N{MINUS SIGN}", "-")


def page_of(folder: Path) -> str:
    findings = read_study(folder)
    groups = groups_of(findings)
    return study_page(findings, groups, figures_of(findings, groups))


def text_of_page(folder: Path) -> str:
    """Without its figures, which take long to draw."""
    findings = read_study(folder)
    return text_of(study_page(findings, groups_of(findings), {}))


def numbers_of_folder(folder: Path) -> dict[str, Any]:
    findings = read_study(folder)
    found: dict[str, Any] = json.loads(json.dumps(numbers_of(findings, groups_of(findings))))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(
        tmp_path_factory.mktemp("whole") / "study",
        loss_of,
        switch=[0.2, 0.5, 0.8],
        axes={"state": STATE, "quantizer": QUANTIZER},
        seeds=[0, 1, 2],
        sweep=SWEEP,
        exclude=[{"quantizer": "nielsen", "baseline": "none"}],
        rows=lambda arm: [100 * loss_of(arm) + row for row in range(4)],
    )


@pytest.fixture(scope="module")
def numbers(whole: Path) -> dict[str, Any]:
    return numbers_of_folder(whole)


def test_the_command_writes_a_page_that_needs_nothing_else_and_its_files(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("<p>Tritrain report</p>")  # an old one is replaced
    assert f"Written: {out}, and next to it 13 files" in tritrain("report", whole, "--out", out)
    page = out.read_text()
    check_page(page)
    assert page.count("<svg") == 5
    assert "Warning: " in page  # few tokens for each ternary parameter
    with out.with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6 + 1 + 2
    for name in ("loss", "switch", "gap", "excess", "arms"):
        assert (tmp_path / "page-figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "page-figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_baselines_are_at_their_best_rate_and_the_fair_gap_is_to_the_best_quantizer(numbers: dict[str, Any]) -> None:
    arms = {arm["name"]: arm for arm in numbers["arms"]}
    assert arms["16-bit"]["best_rate"] == "0.003"
    mean = sum(DENSE.values()) / 3 + sum(SEED.values()) / 3
    assert arms["16-bit"]["held_out_loss"] == pytest.approx(mean)
    assert arms["16-bit"]["held_out_bits_per_byte"] == pytest.approx(mean / BITS)
    fair, other = (gap for gap in numbers["gaps"] if gap["arm"] == "switch 50%, state keep, quantizer gaussian")
    assert (fair["is_fair"], fair["scratch"]) == (True, "scratch (quantizer gaussian)")
    assert (other["is_fair"], other["scratch"]) == (False, "scratch (quantizer nielsen)")
    assert fair["size"]["mean"] == pytest.approx(0.2)
    assert fair["share_closed"]["mean"] == pytest.approx(1 - 0.06 / 0.2)
    assert other["share_closed"]["mean"] == pytest.approx(1 - 0.06 / 0.5)
    # The gap has no noise here, so the share's interval is that of the arm: 4.3027 * 0.004 / sqrt(3) over the gap.
    assert fair["share_closed"]["high"] - fair["share_closed"]["mean"] == pytest.approx(0.049683, abs=1e-5)
    assert fair["problems"] == []


def test_differences_are_paired_by_seed_and_noise_is_called_noise(numbers: dict[str, Any]) -> None:
    effects = {(each["axis"], each["value"]): each for each in numbers["effects"] if each["of"] == "held_out_loss"}
    ends = {(each["axis"], each["value"]): each for each in numbers["effects"] if each["of"] == "excess_at_end"}
    assert ends["switch", "50%"]["difference"]["mean"] == pytest.approx(-0.06)
    state = effects["state", "reset"]["difference"]
    # 0, -0.008, 0.008 by seed: mean 0, standard error 0.008 / sqrt(3), times 4.3027
    assert state["mean"] == pytest.approx(0, abs=1e-9)
    assert (state["low"], state["high"]) == (pytest.approx(-0.019873, abs=1e-5), pytest.approx(0.019873, abs=1e-5))
    assert effects["switch", "50%"]["difference"]["mean"] == pytest.approx(-0.06)
    assert effects["switch", "50%"]["pairs"] == 2
    nearest = {each["first"]: each for each in numbers["against_best"]}
    assert numbers["best"].startswith("switch 50%")
    assert [each["is_within_noise"] for name, each in nearest.items() if name.startswith("switch 50%")] == [True]
    assert nearest["16-bit"]["is_within_noise"] is False
    assert nearest["16-bit"]["by_seed"]["mean"] == pytest.approx(-0.06)
    assert nearest["16-bit"]["by_held_out_row"]["mean"] == pytest.approx(-0.06, abs=1e-5)


def test_what_was_held_equal_and_what_differs_are_told_apart(numbers: dict[str, Any]) -> None:
    assert numbers["held_equal"]["model.hidden_size"] == "36"
    assert numbers["differing"]["run.seed"] == ["0", "1", "2"]
    assert "reset" in numbers["differing"]["phases.1.transition.optimizer"]
    assert not numbers["held_equal"].keys() & numbers["differing"].keys()


def test_the_figures_have_a_curve_for_each_arm_and_a_line_for_each_combination(whole: Path) -> None:
    findings = read_study(whole)
    groups = groups_of(findings)
    lines = [line.get_gid() or "" for axes in loss_figure(findings, groups).axes for line in axes.lines]
    arms = {gid.split("-", 2)[2] for gid in lines if gid.startswith("arm-")}
    assert arms == {record.name for group in groups for record in group.members}
    assert sum(gid.startswith("arm-0-switch") for gid in lines) == 3 * 3  # switch points, seeds
    assert sum(gid.startswith("mean-arm-0-") for gid in lines) == 3 + 3  # with three baselines
    assert sum(gid.startswith("switch-") for gid in lines) == 2 * 3
    nats, _, above = switch_figure(groups).axes
    for axes in (nats, above):
        assert [str(line.get_gid())[:5] for line in axes.lines].count("line-") == 2
    points = next(line for line in above.lines if line.get_gid() == "line-2-0").get_ydata()
    assert list(points) == pytest.approx([0.12, 0.06, 0.08])
    shares = next(line for line in gap_figure(groups).axes[0].lines if line.get_gid() == "gap-0").get_ydata()
    assert list(shares) == pytest.approx([40, 70, 60])


def test_noise_looks_like_noise(tmp_path: Path) -> None:
    """Points that differ by less than their intervals are not spread over the axis."""

    def loss(arm: Arm) -> float:
        if arm.point.get("baseline") == "16-bit":
            return 3.0
        return 3.1 + SEED[arm.point["seed"]] + {"20%": 0.001, "80%": 0.0}[arm.point["switch"]]

    folder = make_study(tmp_path / "study", loss, switch=[0.2, 0.8], seeds=[0, 1, 2], baselines=["16-bit"])
    groups = groups_of(read_study(folder))
    above = switch_figure(groups).axes[2]
    estimate = above_dense(next(group for group in groups if group.baseline == "none"), groups)
    assert estimate is not None
    low, high = above.get_ylim()
    assert low <= (estimate.low or 0.0) < (estimate.high or 0.0) <= high


def test_excess_is_over_the_twin_and_arms_are_matched_with_baselines_of_their_schedule(tmp_path: Path) -> None:
    schedules = {"wsd": [], "cosine": ["schedule={shape: cosine, warmup_steps: 2}"]}

    def loss(arm: Arm) -> float:
        return (
            3.0
            + 0.3 * (arm.point.get("schedule") == "cosine")
            + {"16-bit": 0.0, "scratch": 0.2}.get(arm.point.get("baseline", ""), 0.1)
        )

    folder = make_study(tmp_path / "study", loss, spike=0.8, switch=[0.5], axes={"schedule": schedules}, seeds=[0, 1])
    groups = groups_of(read_study(folder))
    for group in groups:
        dense = dense_of(group, groups)
        assert dense is not None
        assert dense.point == {"schedule": group.point["schedule"]}
        assert gaps_of(group, groups)[0].scratch.point == {"schedule": group.point["schedule"]}
        if "switch" in group.point:
            end, peak = group.mean("excess_at_end"), group.mean("excess_peak")
            assert end is not None
            assert peak is not None
            assert end.mean == pytest.approx(0.1)
            assert peak.mean == pytest.approx(0.1 + 0.8, abs=0.1)  # at a step, with a shared noise that cancels


@pytest.mark.parametrize("baseline", ["16-bit", "scratch"])
def test_the_best_arm_without_a_baseline_of_its_schedule_is_warned_of(tmp_path: Path, baseline: str) -> None:
    schedules = {"wsd": [], "cosine": ["schedule={shape: cosine, warmup_steps: 2}"]}

    def text_with(best: str) -> str:
        folder = make_study(
            tmp_path / best,
            lambda arm: 3.0 + 0.1 * (arm.point.get("schedule") != best),
            switch=[0.5],
            axes={"schedule": schedules},
            exclude=[{"baseline": baseline, "schedule": "cosine"}],
        )
        return text_of_page(folder)

    warning = f"no complete {baseline} baseline has the architecture, optimizer and schedule of the best arm"
    assert warning in text_with("cosine")
    assert warning not in text_with("wsd")


def test_a_study_on_its_way_says_what_it_cannot_say(tmp_path: Path) -> None:
    def loss(arm: Arm) -> float | None:
        return None if arm.name.startswith("switch-80") or "scratch" in arm.name else loss_of(arm)

    folder = make_study(tmp_path / "study", loss, switch=[0.5, 0.8], seeds=[0])
    (folder / "arms" / "scratch" / "state.json").write_text(
        '{"status": "failed", "message": "no space left on <disk>"}'
    )
    text = text_of_page(folder)
    assert "2 of 4 arms are complete" in text
    assert "There is one seed" in text
    assert "There is no complete scratch baseline" in text
    assert "switch-80 not complete 100" in text
    assert "scratch failed 100 no space left on &lt;disk&gt;" in text
    findings = read_study(folder)
    assert "gap" not in figures_of(findings, groups_of(findings))


@pytest.mark.parametrize("keys", [{"baselines": []}, {"baselines": ["16-bit"]}, {}])
def test_a_study_without_switch_points_or_baselines_has_a_page(tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = make_study(tmp_path / "study", lambda arm: 3.1, axes={"state": STATE}, seeds=[0, 1], **keys)
    page = page_of(folder)
    check_page(page)
    assert "nothing here says when to switch" in page
    assert ("no complete 16-bit baseline" in page) == (keys.get("baselines") == [])


def test_an_arm_is_above_no_run_of_another_learning_rate(tmp_path: Path) -> None:
    folder = make_study(
        tmp_path / "study",
        lambda arm: 3.0 + 0.1 * (arm.baseline == "none"),
        switch=[0.2, 0.5],
        baselines=["16-bit"],
        sweep={"rates": [1e-3, 9e-3], "only": [{"baseline": "16-bit"}]},
    )
    findings = read_study(folder)
    groups = groups_of(findings)
    assert not [row for row in curve_rows(groups, findings) if row["curve"] == "excess"]
    below = loss_figure(findings, groups).axes[1]
    assert [text.get_text() for text in below.texts] == ["no 16-bit twin"]


def test_ranks_in_replicas_hide_no_arm(tmp_path: Path) -> None:
    sections = {"engine": {"name": "fsdp2", "replicas": 2}}
    folder = make_study(tmp_path / "study", lambda arm: 3.1, num_ranks=2, sections=sections, baselines=[])
    assert "1 of 1 arms are complete" in text_of_page(folder)


def test_damaged_lines_of_a_log_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", lambda arm: 3.1, baselines=[], axes={"state": STATE})
    log = folder / "arms" / "state-reset" / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'{"step": 3,', b"\0" * 11, 1))
    text = text_of_page(folder)
    assert "2 of 2 arms are complete" in text
    assert "1 lines of the log of state-reset are damaged" in text


def test_a_study_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", lambda arm: 3.1, switch=[0.5])
    for run in (folder / "arms").iterdir():
        for file in run.iterdir():
            file.unlink()
    page = page_of(folder)
    check_page(page)
    assert "0 of 3 arms are complete" in page


def test_gaps_that_say_little_are_warned_of(tmp_path: Path) -> None:
    def loss(arm: Arm) -> float:
        noise = {"0": 0.02, "1": -0.03, "2": 0.01}[arm.point["seed"]]
        return 3.0 + (0.01 + noise if arm.point.get("baseline") == "scratch" else 0.0)

    folder = make_study(tmp_path / "study", loss, switch=[0.5, 0.8], seeds=[0, 1, 2])
    text = text_of_page(folder)
    assert "it is 0.0100 nats, 0.7 standard errors from 0; below 3, a share of it says little" in text
    assert "16-bit was trained at one learning rate; sweep it" in text
    assert "no limits: the gap itself is within noise" in text


def test_a_best_rate_at_the_edge_and_a_missing_default_quantizer_are_named(tmp_path: Path) -> None:
    quantization = ["phases.1.quantization={preset: nielsen-2025}"]
    rates = {"0.001": 0.0, "0.002": 0.1}
    folder = make_study(
        tmp_path / "study",
        lambda arm: 3.0 + rates.get(arm.point.get("rate", ""), 0.0) + 0.2 * ("scratch" in arm.name),
        switch=[0.5],
        seeds=[0, 1],
        overrides=quantization,
        sweep={"rates": [1e-3, 2e-3], "only": [{"baseline": ["16-bit", "scratch"]}]},
    )
    text = text_of_page(folder)
    assert "the best learning rate of 16-bit, 0.001, is at the edge" in text
    assert "no baseline from scratch has the default quantization" in text


def test_a_ternary_model_that_is_better_than_16_bits_closes_no_share_of_a_gap(tmp_path: Path) -> None:
    level = {"16-bit": 3.0, "scratch": 2.9, "none": 2.8}
    folder = make_study(tmp_path / "study", lambda arm: level[arm.baseline], switch=[0.2, 0.5], seeds=[0, 1])
    text = text_of_page(folder)
    assert "ternary from scratch is not worse than 16 bits, so there is no gap to close" in text
    assert "It closes" not in text
    assert {row.get("share_of_fair_gap") for row in numbers_of_folder(folder)["arms"]} == {None}


def test_nor_does_an_arm_whose_only_seeds_have_none(tmp_path: Path) -> None:
    gaps = {"0": -0.05, "1": 0.2, "2": 0.21}

    def loss(arm: Arm) -> float | None:
        own = {"16-bit": 0.0, "scratch": gaps[arm.point["seed"]]}.get(arm.baseline, 0.05)
        return None if arm.baseline == "none" and arm.point["seed"] != "0" else 3.0 + own

    groups = groups_of(read_study(make_study(tmp_path / "study", loss, switch=[0.5], seeds=[0, 1, 2])))
    arm = next(group for group in groups if group.baseline == "none")
    (gap,) = gaps_of(arm, groups)
    assert gap.size.mean == pytest.approx(0.12)
    assert gap.share_of(arm) is None


def test_a_gap_of_two_seeds_that_is_within_noise_is_warned_of(tmp_path: Path) -> None:
    """It is 8 standard errors from 0; of two seeds 12.7 are needed."""
    gap = {"0": 0.35, "1": 0.45}
    folder = make_study(
        tmp_path / "study",
        lambda arm: 3.0 + (gap[arm.point["seed"]] if arm.baseline == "scratch" else 0.0),
        switch=[0.5],
        seeds=[0, 1],
    )
    assert "it is 0.4000 nats, which is within noise with 2 seeds" in text_of_page(folder)


def test_the_page_says_of_how_many_arms_the_best_one_is_and_names_those_without_a_loss(tmp_path: Path) -> None:
    axes = {"state": STATE, "quantizer": QUANTIZER, "decay": {"late": [], "cosine": [COSINE]}}
    folder = make_study(tmp_path / "study", lambda arm: 3.0 + len(arm.name) / 1e3, switch=[0.2, 0.5], axes=axes)
    text = text_of_page(folder)
    assert "It is the best of 16 arms, chosen by the losses that are shown here" in text
    assert "The 12 nearest of 21; all are in the JSON file." in text
    log = next((folder / "arms").glob("switch-20*")) / "metrics.jsonl"
    log.write_text("".join(line for line in log.open() if "end of phase" not in line))
    text = text_of_page(folder)
    assert "22 of 22 arms are complete, 1 of them without a held-out loss at the end." in text
    assert f"{log.parent.name} complete 200 no held-out loss at the end: it was not measured, or not finite" in text
    assert list(numbers_of_folder(folder)["without_result"]) == [log.parent.name]


def score_of(task: str, value: float, metric: str = "acc_norm", **about: Any) -> dict[str, Any]:
    scores = {metric: {"value": value}}
    return {"model": "m", "task": task, "num_examples": 9, "step": STEPS, "metric": metric, "scores": scores} | about


def write_scores(run: Path, records: list[dict[str, Any]]) -> None:
    (run / RESULTS).write_text(json.dumps({"results": records}))


def test_scores_are_those_of_the_end_with_the_most_examples_and_have_a_mean(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", lambda arm: 3.0, switch=[0.2, 0.5], seeds=[0])
    records = [
        score_of("piqa", 0.1, step=STEPS // 2),
        score_of("piqa", 0.2),
        score_of("piqa", 0.3),
        score_of("piqa", 0.4, num_examples=1),
        score_of("piqa", 0.5, step=STEPS // 2),
        score_of("piqa", 0.6, num_fewshot=5),
        score_of("lambada", 20, "perplexity", scores={"perplexity": {"value": 20}, "acc": {"value": 0.2}}),
        score_of("wikitext", 30, "word_perplexity", num_fewshot=0),
        score_of("mmlu", 0.7, tasks=["a", "b"]),
    ]
    write_scores(folder / "arms" / "switch-50", records)
    (scores,) = [each.scores for each in read_study(folder).records if each.name == "switch-50"]
    assert scores == {"piqa acc_norm": 0.3, "piqa 5-shot acc_norm": 0.6, "lambada acc": 0.2}


def test_scores_of_tasks_have_a_panel(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", lambda arm: 3.0, switch=[0.2, 0.5], seeds=[0])
    for run in (folder / "arms").iterdir():
        write_scores(run, [score_of("piqa", 0.6 if run.name == "switch-50" else 0.5)])
    axes = switch_figure(groups_of(read_study(folder))).axes
    assert axes[3].get_ylabel() == "score, mean of 1 tasks"
    points = next(line for line in axes[3].lines if line.get_gid() == "line-3-0").get_ydata()
    assert list(points) == [0.5, 0.6]


def test_files_that_are_no_report_and_other_folders_are_refused(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", lambda arm: 3.0, switch=[0.5])
    (folder / "report.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"report\.csv: exists and is no report"):
        report_study(folder, None)
    assert not (folder / "report.html").exists()
    with pytest.raises(ConfigError, match=r"must end in \.html"):
        report_study(folder, tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"there is no folder .*none"):
        report_study(tmp_path, tmp_path / "none" / "a.html")  # before it is read, which takes a while
    with pytest.raises(ConfigError, match="is a study, which has a report of its own"):
        tritrain("report", str(folder), str(folder / "arms"))
    (folder / "results.json").write_text("[{]")
    with pytest.raises(ConfigError, match=r"results\.json: is damaged"):
        report_study(folder, tmp_path / "a.html")
