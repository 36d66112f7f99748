"""Fixed prompts: answered at the beginning and at the ends of phases, once each, without a trace in training."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_group
from runs import run
from tiny import tiny_config

from launcher.config.sections import Config
from launcher.report.summary import samples_by_prompt, summarize
from launcher.run.metrics_log import read_metrics
from launcher.run.row_losses import keep_until
from launcher.run.samples import SAMPLES, Sample, note_samples, read_samples
from launcher.training.held_out import HeldOut

PROMPTS = ("a", "the e")


def config_of(shards: str, folder: Path, **sections: Any) -> Config:
    phases = [{"precision": "16-bit", "steps": 2}, {"precision": "ternary", "steps": 2}]
    return tiny_config(Path(shards), folder, **{"phases": phases, "schedule": {"warmup_steps": 0}} | sections)


def runs_with_samples(shards: str, out: str) -> None:
    asked = {"sample_prompts": [*PROMPTS], "sample_tokens": 3}
    assert run(config_of(shards, Path(out) / "plain")) == "complete"
    assert run(config_of(shards, Path(out) / "whole", evaluation=asked)) == "complete"
    draw = HeldOut.sample

    def fails(*_: Any) -> Any:
        raise RuntimeError("the power is cut")

    pieces = config_of(shards, Path(out) / "pieces", evaluation=asked)
    HeldOut.sample = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power"):
        run(pieces)  # at the end of the first phase, which is saved
    HeldOut.sample = draw  # type: ignore[method-assign]
    for steps in (1, 9):
        run(pieces, steps)
    for name, precision in (("from-16-bit", "16-bit"), ("from-ternary", "ternary")):
        start = f"{out}/whole/checkpoints/step-0000000{2 if precision == '16-bit' else 4}"
        phases = [{"precision": "ternary", "steps": 2}]
        assert run(
            config_of(shards, Path(out) / name, evaluation=asked, phases=phases, checkpoint={"start_from": start})
        ) == "complete"  # fmt: skip


def test_prompts_are_answered_at_the_ends_of_phases(shards: Path, tmp_path: Path) -> None:
    run_group(1, runs_with_samples, str(shards), str(tmp_path))
    plain, whole, pieces = (
        [row["train/loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        for name in ("plain", "whole", "pieces")
    )
    assert plain == whole == pieces
    samples = read_samples(tmp_path / "whole")
    assert [(each.step, each.phase, each.is_start, each.prompt) for each in samples] == [
        (step, phase, False, prompt) for step, phase in ((2, 0), (4, 1)) for prompt in PROMPTS
    ]
    assert read_samples(tmp_path / "pieces") == samples
    assert len((tmp_path / "pieces" / SAMPLES).read_text().splitlines()) == len(samples)
    assert not read_samples(tmp_path / "plain")
    by_prompt = samples_by_prompt(summarize(tmp_path / "whole"))
    assert [*by_prompt] == [*PROMPTS]
    assert all([*places] == ["16-bit, step 2", "ternary, step 4"] for places in by_prompt.values())
    # The model that a run begins with answers as it did, in the precision that it has.
    for name, step in (("from-16-bit", 2), ("from-ternary", 4)):
        found = samples_by_prompt(summarize(tmp_path / name))
        for prompt in PROMPTS:
            assert [*found[prompt]] == ["before training", "ternary, step 2"]
            [before] = [each.completion for each in samples if (each.step, each.prompt) == (step, prompt)]
            assert found[prompt]["before training"] == before


def test_a_run_that_goes_back_leaves_out_what_came_after(tmp_path: Path) -> None:
    def sample(step: int, phase: int, text: str) -> Sample:
        return Sample(step=step, phase=phase, is_start=False, prompt="p", completion=text)

    drawn = [sample(2, 0, "a"), sample(4, 1, "b"), sample(4, 1, "c"), sample(8, 2, "d")]
    note_samples(tmp_path, drawn)
    with (tmp_path / SAMPLES).open("a") as file:
        file.write('{"step": 9, "phase": 2, "prompt": 5}\n{"step": ')
    assert read_samples(tmp_path) == [drawn[0], drawn[2], drawn[3]]
    keep_until(tmp_path / SAMPLES, step=4, phase=1)
    assert read_samples(tmp_path) == [drawn[0], drawn[2]]
    keep_until(tmp_path / SAMPLES, step=0, phase=0)
    assert read_samples(tmp_path) == []
