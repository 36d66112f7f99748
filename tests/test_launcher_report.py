"""The report of runs: what it reads, what it computes, what stands on the page."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.cli import main
from launcher.console import human_count
from launcher.curves import History, PhaseSpan, Series, find_transitions, read_history, smooth
from launcher.metrics import LogError
from launcher.plots import loss_figure, thin, to_svg
from launcher.report import write_picture, write_report
from launcher.spike import WINDOW, SpikeWatch
from launcher.summary import duration, summarize, verdict

TOKENS_PER_STEP = 32_768


def make_run(
    folder: Path,
    *,
    name: str = "demo",
    phase_steps: tuple[int, ...] = (800, 200),
    done_steps: int | None = None,
    log_every: int = 1,
    evaluate_every: int = 100,
    spike: float = 0.8,
    ramp_steps: int = 0,
    noise: float = 0.02,
    completion: str = " was a small kingdom.",
) -> Path:
    """Write a run's folder: power-law loss, at the switch to ternary a spike that decays, and a small lasting loss."""
    rng = random.Random(name)
    total = sum(phase_steps)
    done_steps = total if done_steps is None else done_steps
    folder.mkdir(parents=True)
    precisions = ["16-bit", "ternary", "16-bit"][: len(phase_steps)]
    config = [f"tritrain_version: 0.1.0\nrun:\n  name: {json.dumps(name)}\n  seed: 17\nphases:\n"]
    config += [f"- precision: {p}\n  steps: {n}\n" for p, n in zip(precisions, phase_steps, strict=True)]
    config += ["engine:\n  name: deepspeed\n  zero_stage: 2\n", f"phase_steps: {list(phase_steps)}\n"]
    (folder / "config.yaml").write_text("".join(config))
    lines, start = [], 0

    def add(step: int, phase: int, **values: object) -> None:
        head = {"step": step, "tokens": step * TOKENS_PER_STEP, "phase": phase, "precision": precisions[phase]}
        lines.append(json.dumps(head | values) + "\n")

    def level(step: int, phase: int) -> float:
        loss = 2.2 + 8 * (1 + step) ** -0.5
        if phase and ramp_steps and step - start < ramp_steps:
            return loss + (spike + 0.05) * (step - start) / ramp_steps
        return loss + phase * 0.05 + (spike * math.exp(-(step - start - ramp_steps) / 15) if phase else 0)

    def evaluate(step: int, phase: int, when: str) -> None:
        loss = level(step, phase)
        values = {"validation/loss": loss, "validation/bits_per_byte": loss / math.log(2) / 4, "validation/when": when}
        add(step, phase, **values)

    for phase, (precision, num_steps) in enumerate(zip(precisions, phase_steps, strict=True)):
        if start > done_steps:
            break
        evaluate(start, phase, "start of phase")
        for step in range(start + 1, min(start + num_steps, done_steps) + 1):
            strength = min(1.0, (step - start) / ramp_steps) if ramp_steps else 1.0
            if step % log_every == 0:
                values = {
                    "train/loss": level(step, phase) + rng.gauss(0, noise),
                    "train/grad_norm": math.exp(rng.gauss(-1, 0.3)),
                    "train/learning_rate": 3e-4 * min(1, step / 50) * (1 - 0.9 * step / total),
                    "quant/strength": strength if precision == "ternary" else 0.0,
                    "throughput/tokens_per_second": (80_000 if precision == "ternary" else 100_000) + rng.gauss(0, 900),
                    "memory/peak_gib": 11.5 + phase,
                    "data/wait_share": abs(rng.gauss(0, 0.01)),
                    "train/skipped_steps": 2,
                    "time/elapsed_seconds": 0.4 * step,
                }
                add(step, phase, **values)
            if step == start + num_steps:
                evaluate(step, phase, "end of phase")
            elif step % evaluate_every == 0:
                evaluate(step, phase, "interval")
        start += num_steps
    (folder / "metrics.jsonl").write_text("".join(lines))
    if done_steps == total:
        summary = {
            "status": "complete",
            "num_parameters": 124_400_000,
            "num_ternary_parameters": 84_900_000,
            "tokens": total * TOKENS_PER_STEP,
            "elapsed_seconds": 4210.0,
            "num_ranks": 4,
            "sample": {"prompt": "Once upon a time there", "completion": completion},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def history_of(losses: dict[str, list[float]], strength: list[float] | None = None, log_every: int = 1) -> History:
    """A history with one phase for each precision of `losses`; strength is that of the last phase."""
    phases, spans, values = [], [], []
    for index, (precision, part) in enumerate(losses.items()):
        first = len(values) * log_every
        values += part
        phases += [index] * len(part)
        last = len(values) * log_every
        spans.append(
            PhaseSpan(
                index=index,
                precision=precision,
                first_step=first,
                first_tokens=first * 100,
                last_step=last,
                last_tokens=last * 100,
            )
        )
    steps = np.arange(1, len(values) + 1) * log_every

    def series(column: list[float]) -> Series:
        return Series(steps=steps, tokens=steps * 100, phases=np.asarray(phases), values=np.asarray(column))

    columns = {"train/loss": series(values)}
    if strength is not None:
        columns["quant/strength"] = series([0.0] * (len(values) - len(strength)) + strength)
    return History(name="synthetic", phases=tuple(spans), series=columns)


class PageParser(HTMLParser):
    """Collects tags with their attributes, ids, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def parse(path: Path) -> PageParser:
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


# Curves


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.integers(1, 20))
def test_smoothing_is_a_weighted_mean_of_the_values_so_far(values, window):
    weights = (1 - 1 / window) ** np.arange(len(values))
    expected = [np.dot(values[: n + 1][::-1], weights[: n + 1]) / weights[: n + 1].sum() for n in range(len(values))]
    np.testing.assert_allclose(smooth(np.asarray(values), window), expected, rtol=1e-9, atol=1e-9)


def test_smoothing_leaves_a_gap_where_the_loss_is_not_a_number():
    result = smooth(np.asarray([2.0, np.nan, np.inf, 2.0]), 5)
    np.testing.assert_array_equal(result, [2.0, np.nan, np.nan, 2.0])


def test_smoothing_starts_anew_in_every_phase():
    loss = history_of({"16-bit": [3.0] * 20, "ternary": [5.0] * 20}).series["train/loss"]
    np.testing.assert_allclose(loss.smoothed(10), [3.0] * 20 + [5.0] * 20)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300), st.integers(1, 40))
def test_thinning_keeps_ends_and_extremes_in_order(values, num_stretches):
    array = np.asarray(values)
    kept = thin(array, num_stretches)
    assert (np.diff(kept) > 0).all()
    assert kept[0] == 0
    assert kept[-1] == len(values) - 1
    assert len(kept) <= 2 * num_stretches + 2
    if np.isfinite(array).any():
        assert np.nanmin(array[kept]) == np.nanmin(array)
        assert np.nanmax(array[kept]) == np.nanmax(array)


def test_a_sharp_transition_with_a_known_answer():
    after = [3.5, 3.2, *[1.9] * 40]
    (found,) = find_transitions(history_of({"16-bit": [2.0] * 60, "ternary": after}, [1.0] * 42, log_every=5))
    smoothed = smooth(np.asarray(after), WINDOW)
    first_back = int((smoothed <= 2.0).argmax())
    assert 2 < first_back < 40
    assert (found.step, found.tokens) == (300, 30_000)
    assert (found.from_precision, found.to_precision) == ("16-bit", "ternary")
    assert found.loss_before == pytest.approx(2.0)
    assert found.noise == pytest.approx(0.0, abs=1e-12)
    assert found.spike == pytest.approx(1.5)
    assert found.peak_steps == 5
    assert found.recovery_steps == 5 * (first_back + 1)
    assert found.recovery_tokens == 100 * found.recovery_steps


def test_the_area_of_a_spike_is_what_lies_above_the_level_before_until_the_recovery():
    history = history_of({"16-bit": [2.0] * 9, "ternary": [2.5, 3.0, math.nan, 1.5, 1.0, 9.0]}, [1.0] * 6, log_every=2)
    (found,) = find_transitions(history)
    assert found.area == pytest.approx((0.5 + 1.0) * 200)  # two intervals of 200 tokens; nothing below, and none later
    assert found.recovery_steps == 10
    (going_on,) = find_transitions(history_of({"16-bit": [2.0] * 9, "ternary": [2.5, 3.0]}, [1.0] * 2))
    assert going_on.area == pytest.approx(1.5 * 100)


def rows_around_a_switch(after: list[float]) -> list[dict[str, object]]:
    losses = [2.0] * 4 + after
    return [
        {"step": n, "tokens": 10 * n, "phase": int(n > 4), "precision": "ternary" if n > 4 else "16-bit"}
        | {"quant/strength": float(n > 4), "train/loss": loss}
        for n, loss in enumerate(losses, start=1)
    ]


def test_a_running_job_logs_the_transition_once_when_the_loss_is_back():
    watch = SpikeWatch()
    said = [watch.add(row) for row in rows_around_a_switch([2.6, 2.2, 1.0, 1.0])]
    assert [bool(values) for values in said] == [False] * 6 + [True, False]
    assert said[6] == {
        "transition/loss_before": pytest.approx(2.0),
        "transition/spike": pytest.approx(0.6),
        "transition/peak_steps": 1,
        "transition/area": pytest.approx(8.0),
        "transition/recovery_steps": 3,
        "transition/recovery_tokens": 30,
    }


def test_a_running_job_logs_the_transition_where_the_phase_ends_without_recovery():
    watch = SpikeWatch()
    *rows, last = rows_around_a_switch([2.6, 2.2])
    assert not any(watch.add(row) for row in rows)
    assert watch.add(last, phase_ends=True) == {
        "transition/loss_before": pytest.approx(2.0),
        "transition/spike": pytest.approx(0.6),
        "transition/peak_steps": 1,
        "transition/area": pytest.approx(8.0),
    }


def test_a_ramp_counts_as_recovered_only_with_the_quantization_fully_on():
    ramp = [step / 30 for step in range(1, 31)]
    after = [2.0 + 0.5 * strength for strength in ramp] + [1.9] * 60
    (found,) = find_transitions(history_of({"16-bit": [2.0] * 60, "ternary": after}, ramp + [1.0] * 60))
    assert found.peak_steps == 30
    assert found.spike == pytest.approx(0.5)
    assert found.recovery_steps > 30

    unchanged = [2.0] * 20
    (still_ramping,) = find_transitions(history_of({"16-bit": [2.0] * 60, "ternary": unchanged}, ramp[:20]))
    assert still_ramping.recovery_steps is None


def test_a_transition_that_has_not_recovered_and_one_without_losses():
    (found,) = find_transitions(history_of({"16-bit": [2.0] * 20, "ternary": [2.5, 2.4, math.nan]}, [1.0] * 3))
    assert found.recovery_steps is None
    assert found.recovery_tokens is None
    assert found.spike == pytest.approx(0.5)
    assert find_transitions(history_of({"16-bit": [2.0] * 20, "ternary": []})) == ()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (12_500, "12.5 k"), (999_600, "1 M"), (1_048_576, "1.05 M"), (3e9, "3 B"), (2e12, "2 T")],
)
def test_human_count_counts(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (45, "45 s"),
        (725, "12 min 5 s"),
        (12_000, "3 h 20 min"),
        (3599.9, "1 h 0 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# Reading


def rows_of(path: Path, *rows: dict[str, object] | str) -> Path:
    head = {"tokens": 0, "phase": 0, "precision": "16-bit"}
    path.write_text("".join(row if isinstance(row, str) else json.dumps(head | row) + "\n" for row in rows))
    return path


def test_a_torn_last_line_is_left_out(tmp_path):
    path = rows_of(tmp_path / "metrics.jsonl", {"step": 1, "train/loss": 3.0}, '{"step": 2, "tok')
    assert read_history(path, "x").series["train/loss"].steps.tolist() == [1]


@pytest.mark.parametrize("broken", ['{"step": 2, "tok\n', "[1, 2]\n", '{"step": 2}\n', "\n"])
def test_a_broken_line_elsewhere_is_an_error_that_names_file_and_line(tmp_path, broken):
    path = rows_of(tmp_path / "metrics.jsonl", {"step": 1}, broken, {"step": 3})
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ")):
        read_history(path, "x")


def test_after_a_resume_the_repeated_steps_count_once(tmp_path):
    rows = [{"step": step, "train/loss": 1.0, "memory/peak_gib": 5} for step in (1, 2, 3, 4)]
    rows += [{"step": 2, "validation/bits_per_byte": 0.7}]
    rows += [{"step": step, "train/loss": 2.0} for step in (3, 4, 5)]
    history = read_history(rows_of(tmp_path / "metrics.jsonl", *rows), "x")
    assert history.series["train/loss"].steps.tolist() == [1, 3, 4, 5]
    assert history.series["train/loss"].values.tolist() == [1, 2, 2, 2]
    assert history.series["validation/bits_per_byte"].steps.tolist() == [2]
    assert history.series["memory/peak_gib"].steps.tolist() == [1]


def test_folders_that_are_not_runs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        summarize(tmp_path)
    (tmp_path / "config.yaml").write_text("run: {name: x}\n")
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl: the run has logged nothing yet"):
        summarize(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    with pytest.raises(LogError, match="no complete row yet"):
        summarize(tmp_path)
    rows_of(tmp_path / "metrics.jsonl", {"step": 1})
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(LogError, match=r"summary\.json: not JSON"):
        summarize(tmp_path)
    (tmp_path / "config.yaml").write_text("run: [")
    with pytest.raises(LogError, match=r"config\.yaml: not YAML"):
        summarize(tmp_path)


def test_what_keeps_a_report_from_being_made_is_a_sentence(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", noise=0.0)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("run: {name: x}\n")
    (tmp_path / "begun" / "metrics.jsonl").touch()
    for arguments, sentence in (
        ((tmp_path / "begun", "--out", tmp_path / "a.html"), "no complete row yet; a report needs at least one"),
        ((run, "--out", tmp_path), f"{tmp_path}: Is a directory"),
        ((run, run, "--out", tmp_path / "a.png"), "a picture shows one run, and here are 2"),
    ):
        monkeypatch.setattr("sys.argv", ["tritrain", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


# The summary


def test_the_summary_of_a_complete_run(tmp_path):
    summary = summarize(make_run(tmp_path / "run", noise=0.0))
    assert summary.is_complete
    assert (summary.name, summary.seed, summary.step, summary.planned_steps) == ("demo", 17, 1000, 1000)
    assert (summary.engine, summary.num_ranks, summary.skipped_steps) == ("deepspeed, ZeRO stage 2", 4, 2)
    assert summary.tokens == 1000 * TOKENS_PER_STEP
    assert summary.elapsed_seconds == 4210.0
    first, second = summary.phases
    assert (first.steps, second.steps) == (800, 200)
    assert (first.tokens, second.tokens) == (800 * TOKENS_PER_STEP, 200 * TOKENS_PER_STEP)
    assert first.validation_bits_per_byte == pytest.approx((2.2 + 8 * 801**-0.5) / math.log(2) / 4)
    assert second.validation_bits_per_byte_at_start == pytest.approx(
        first.validation_bits_per_byte + 0.85 / math.log(2) / 4
    )
    assert first.train_loss == pytest.approx(2.2 + 8 * 801**-0.5, abs=0.01)
    assert summary.throughput_ratio == pytest.approx(0.8, abs=0.01)
    (transition,) = summary.transitions
    assert transition.spike == pytest.approx(0.85 * math.exp(-1 / 15), abs=0.06)
    change = 100 * (second.validation_bits_per_byte / first.validation_bits_per_byte - 1)
    assert verdict(summary) == (
        f"The 16-bit phase ended at {first.validation_bits_per_byte:.3f} bits per byte, "
        f"the ternary phase ended at {second.validation_bits_per_byte:.3f} (+{change:.1f} %)."
    )


def test_the_summary_of_an_unfinished_run(tmp_path):
    summary = summarize(make_run(tmp_path / "run", done_steps=830, evaluate_every=10_000))
    assert not summary.is_complete
    assert summary.num_parameters is None
    assert summary.elapsed_seconds == pytest.approx(332.0)
    assert summary.phases[1].validation_bits_per_byte is None
    assert summary.transitions[0].recovery_steps is None
    losses = [phase.train_loss for phase in summary.phases]
    assert verdict(summary).startswith(
        f"Unfinished, at step 830 of 1,000 (83%): the 16-bit phase ended at {losses[0]:.3f} nats per token"
    )
    assert f"the ternary phase stands at {losses[1]:.3f} (+" in verdict(summary)


def test_a_run_that_starts_with_a_later_phase_counts_from_where_it_starts(tmp_path):
    row = {"step": 800, "tokens": 8000, "phase": 1, "precision": "ternary"}
    path = rows_of(tmp_path / "metrics.jsonl", row, row | {"step": 900, "tokens": 9000, "train/loss": 2.0})
    (span,) = read_history(path, "x").phases
    assert (span.first_step, span.first_tokens, span.last_step) == (800, 8000, 900)


# The page


def test_the_page_of_one_run_has_everything_in_order(tmp_path):
    run = make_run(tmp_path / "run")
    write_report([run], tmp_path / "report.html")
    page = parse(tmp_path / "report.html")
    summary = summarize(run)
    parts = (
        *("demo", verdict(summary), "124 M, of which 84.9 M ternary (68%)", "deepspeed, ZeRO stage 2", "1 h 10 min"),
        *("phase 2: ternary", "training loss, nats/token", "to ternary at step 800", "validation, bits/byte"),
        *("Back at the loss before, after", "steps since the switch", "Learning rate", "Quantization strength"),
        *("Gradient norm", "Throughput, tokens/s", "waiting for data, %", "Peak memory, GiB"),
        *("Once upon a time there was a small kingdom.", "tritrain_version: 0.1.0"),
    )
    positions = [page.text.index(part) for part in parts]
    assert positions == sorted(positions)
    for mark in ("loss-raw-0", "loss-smoothed-0", "loss-validation-0", "loss-switch-0-1", "loss-ternary-0-1"):
        assert mark in page.ids
    for mark in (
        "transition-1-level-0",
        "transition-1-peak-0",
        "transition-1-area-0",
        "train-grad-norm-run-0",
        "quant-strength-ternary-0-1",
    ):
        assert mark in page.ids
    assert "throughput-model-flops-utilization-run-0" not in page.ids


def test_the_page_loads_nothing_and_its_ids_are_unique(tmp_path):
    runs = [make_run(tmp_path / name, name=name) for name in ("a", "b")]
    write_report(runs, tmp_path / "report.html")
    text, page = (tmp_path / "report.html").read_text(), parse(tmp_path / "report.html")
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "image"})
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    references = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    assert references
    assert references <= set(page.ids)


def test_the_colours_follow_the_readers_theme(tmp_path):
    write_report([make_run(tmp_path / "run")], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    body = text[text.index("<body>") :]
    assert "var(--run-0)" in body
    assert "var(--ink)" in body
    assert set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r'="#|url\(#', "", body))) == set()


def test_several_runs_stand_side_by_side(tmp_path):
    runs = [
        make_run(tmp_path / "a", name="early", phase_steps=(200, 800)),
        make_run(tmp_path / "b", name="late", phase_steps=(800, 200), ramp_steps=20),
        make_run(tmp_path / "c", name="still going", done_steps=300),
        make_run(tmp_path / "d", name="three phases", phase_steps=(400, 400, 200)),
    ]
    write_report(runs, tmp_path / "report.html")
    page = parse(tmp_path / "report.html")
    for index, run in enumerate(runs):
        assert f"{index + 1}: {summarize(run).name}" in page.text
        assert f"loss-smoothed-{index}" in page.ids
    assert {"loss-switch-0-1", "loss-switch-1-1", "loss-switch-3-2", "transition-1-level-0"} <= set(page.ids)
    assert {"loss-switch-2-1", "transition-1-level-2", "transition-2-level-0"}.isdisjoint(page.ids)
    assert "transition-2-level-3" in page.ids
    finals = {summary.name: summary.phases[-1].validation_bits_per_byte for summary in map(summarize, runs)}
    best = min(finals["early"], finals["late"], finals["three phases"])
    assert f"ends lowest, at {best:.3f} bits per byte" in page.text


def test_a_page_can_be_written_at_every_moment_of_a_run(tmp_path):
    whole = make_run(tmp_path / "whole", phase_steps=(4, 4), evaluate_every=2)
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.yaml").write_text((whole / "config.yaml").read_text())
    for num_lines in range(1, len(lines) + 1, 3):
        (tmp_path / "part" / "metrics.jsonl").write_text("".join(lines[:num_lines]) + '{"torn')
        write_report([tmp_path / "part"], tmp_path / "report.html")
        assert "Unfinished, at step" in parse(tmp_path / "report.html").text


@pytest.mark.parametrize("replacement", ['"train/loss": NaN, ', ""])  # JSON has no NaN: a writer may leave it out
def test_a_diverged_run_says_so_and_still_gives_a_page(tmp_path, replacement):
    run = make_run(tmp_path / "run", phase_steps=(40, 40), done_steps=60)
    text = (run / "metrics.jsonl").read_text()
    text = re.sub(r'"train/loss": [\d.]+, (?=.*"quant/strength": 1)', replacement, text)
    (run / "metrics.jsonl").write_text(text)
    write_report([run], tmp_path / "report.html")
    assert "the ternary phase stands at nan" in parse(tmp_path / "report.html").text


def test_everything_from_the_run_is_escaped(tmp_path):
    evil = "<script>alert('x')</script> & $\\frac{1}$ \"q\" #0072b2"
    run = make_run(tmp_path / "run", name=evil, phase_steps=(20, 20), completion=evil + "\ud800")
    other = make_run(tmp_path / "other", name="_hidden", phase_steps=(20, 20))
    write_report([run, other], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    page = parse(tmp_path / "report.html")
    assert page.text.count(evil) >= 4  # title, table, sample, legend
    assert "2: _hidden" in page.text


def test_a_long_run_gives_a_small_page(tmp_path):
    run = make_run(tmp_path / "run", phase_steps=(20_000, 5_000))
    write_report([run], tmp_path / "report.html")
    write_report([make_run(tmp_path / "short")], tmp_path / "short.html")
    assert (tmp_path / "report.html").stat().st_size < 400_000
    assert (tmp_path / "report.html").stat().st_size < 3 * (tmp_path / "short.html").stat().st_size


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    history = summarize(make_run(tmp_path / "run")).history
    assert to_svg(loss_figure([history]), "loss", "loss") == to_svg(loss_figure([history]), "loss", "loss")


def test_the_picture_is_a_png(tmp_path):
    write_picture(make_run(tmp_path / "run", name="$1 & <2>"), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
