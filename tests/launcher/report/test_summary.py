"""A run's files, read back and summed up."""

import json
import math
import re
from pathlib import Path

import pytest
from made_runs import TOKENS_PER_STEP, make_run

from launcher.errors import LogError
from launcher.process.console import human_count, human_time
from launcher.report.history import read_history
from launcher.report.summary import duration, summarize, verdict


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.6, "0:01:00"), (90_000, "1 day, 1:00:00"), (1e30, "over 1,000,000 days"), (math.inf, "over")],
)
def test_times_that_are_left(seconds, text):
    assert human_time(seconds).startswith(text)


# Reading


def rows_of(path: Path, *rows: dict[str, object] | str) -> Path:
    head = {"tokens": 0, "phase": 0, "precision": "16-bit"}
    path.write_text("".join(row if isinstance(row, str) else json.dumps(head | row) + "\n" for row in rows))
    return path


def looks_of(path: Path, *looks: dict[str, object]) -> Path:
    return rows_of(path, *({"step": 10 + index, "quant/layers": look} for index, look in enumerate(looks)))


def test_names_of_layers_are_found_in_any_row_that_has_them(tmp_path):
    path = looks_of(tmp_path / "metrics.jsonl", {"scale": [1, 2]}, {"names": ["a", "b"], "scale": [3, 4]})
    (grid,) = read_history(path, "x").grids
    assert (grid.names, grid.values["scale"].tolist()) == (("a", "b"), [[1, 2], [3, 4]])
    nameless = looks_of(tmp_path / "nameless.jsonl", {"scale": [1, 2]}, {"scale": [3, 4]})
    assert read_history(nameless, "x").grids == ()  # the row that had them was damaged, and is set aside


@pytest.mark.parametrize("look", [{"scale": [1.0]}, {"scale": [1.0, "x"]}, {"scale": [1.0, [2.0]]}])
def test_figures_of_layers_that_no_run_writes_are_refused(tmp_path, look):
    path = looks_of(tmp_path / "metrics.jsonl", {"names": ["a", "b"], "scale": [3.0, 4.0]}, look)
    with pytest.raises(LogError, match="quant/layers"):
        read_history(path, "x")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_without_a_value_is_left_out(tmp_path, number):
    run = make_run(tmp_path / "run", phase_steps=(20, 20))
    with (run / "metrics.jsonl").open("a") as log:
        row = '{"step": 41, "tokens": 99999, "phase": 1, "precision": "ternary"'
        log.write(f'{row}, "train/skipped_steps": {number}, "time/elapsed_seconds": {number}}}\n')
    summary = summarize(run)
    assert summary.step == 41
    assert summary.skipped_steps == 2
    assert summary.elapsed_seconds == 4210


def test_a_torn_last_line_is_left_out(tmp_path):
    path = rows_of(tmp_path / "metrics.jsonl", {"step": 1, "train/loss": 3.0}, '{"step": 2, "tok')
    assert read_history(path, "x").series["train/loss"].steps.tolist() == [1]


@pytest.mark.parametrize("broken", ['{"step": 2, "tok\n', "[1, 2]\n", '{"step": 2}\n', "\n"])
def test_a_broken_line_elsewhere_is_an_error_that_names_file_and_line(tmp_path, broken):
    path = rows_of(tmp_path / "metrics.jsonl", {"step": 1}, broken, {"step": 3})
    with pytest.raises(LogError, match=re.escape(f"{path}:2: ")):
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
    with pytest.raises(LogError, match=r"config\.yaml: not valid YAML"):
        summarize(tmp_path)


# The summary


def test_the_summary_of_a_complete_run(tmp_path):
    summary = summarize(make_run(tmp_path / "run", noise=0.0))
    assert summary.is_complete
    assert (summary.name, summary.seed, summary.step, summary.planned_steps) == ("demo", 17, 1000, 1000)
    assert (summary.engine, summary.num_ranks, summary.skipped_steps) == ("deepspeed, ZeRO stage 2", "4", 2)
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
        f"the ternary phase ended at {second.validation_bits_per_byte:.3f} (+{change:.1f} % after 6.55 M tokens more)."
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


def test_a_run_that_changed_its_engine_says_from_which_step_on(tmp_path):
    run = make_run(tmp_path / "run", phase_steps=(40, 40))
    fsdp, zero = {"name": "fsdp2", "zero_stage": None}, {"name": "deepspeed", "zero_stage": 1}
    starts = [(0, 2, fsdp), (20, 2, zero), (30, 4, zero), (20, 2, fsdp), (60, 4, zero)]  # two went back to step 20
    lines = [json.dumps({"step": step, "world_size": size, "engine": engine}) for step, size, engine in starts]
    (run / "starts.jsonl").write_text("\n".join(lines) + "\n")
    summary = summarize(run)
    assert summary.engine == "fsdp2 from step 1; deepspeed, ZeRO stage 1 from step 61"
    assert summary.num_ranks == "2 from step 1; 4 from step 61"
    damaged = [lines[0], '{"step": 5, "wor', *lines[1:], "[1]", '{"world_size": 8}', '{"step": 70, "worl']
    (run / "starts.jsonl").write_text("\n".join(damaged))  # as kills and power cuts leave it
    assert summarize(run).num_ranks == summary.num_ranks
    (run / "starts.jsonl").write_text('{"step": 0, "world_size": 4}\n')  # as older versions wrote it
    assert (summarize(run).engine, summarize(run).num_ranks) == ("deepspeed, ZeRO stage 2", "4")


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_a_file_of_a_run_that_holds_no_mapping_is_named(tmp_path, name):
    run = make_run(tmp_path / "run", phase_steps=(4, 4))
    (run / name).write_text("[1, 2]\n")
    with pytest.raises(LogError, match=re.escape(f"{run / name}: must hold a mapping")):
        summarize(run)


WRONG = {
    "config.yaml": ["\xff", "run: 5", "engine: [a]", "phase_steps: x", "phase_steps: [4, x]", "run: [", "5"],
    "summary.json": ['{"elapsed_seconds": "x"}', '{"num_ranks": "x"}'],
    "metrics.jsonl": [
        f'{{"step": 1, "tokens": 1, "phase": 0, "precision": "16-bit"{more}}}\n'
        for more in (', "step": "x"', ', "step": 1e400', ', "tokens": null', f', "phase": {10**30}', ', "phase": -1',
                     ', "precision": 5', ', "quant/layers": 5', ', "quant/layers": {"flips": 5}')
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_files_with_values_of_other_types_are_named(tmp_path, name):
    run = make_run(tmp_path / "run", phase_steps=(4, 4))
    for content in WRONG[name]:
        (run / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(LogError, match=re.escape(str(run / name))):
            summarize(run)


def test_a_number_that_no_float_holds_is_no_measurement(tmp_path):
    rows = [{"step": step, "train/loss": 10**400 if step == 2 else 1.0} for step in (1, 2, 3)]
    assert read_history(rows_of(tmp_path / "metrics.jsonl", *rows), "x").series["train/loss"].steps.tolist() == [1, 3]
