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


ASKED = {"sample_prompts": [*PROMPTS], "sample_tokens": 3}


def whole_and_in_pieces(shards: str, out: str) -> None:
    assert run(config_of(shards, Path(out) / "whole", evaluation=ASKED)) == "complete"
    draw = HeldOut.sample

    def fails(*_: Any) -> Any:
        raise RuntimeError("the power is cut")

    pieces = config_of(shards, Path(out) / "pieces", evaluation=ASKED)
    HeldOut.sample = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power"):
        run(pieces)  # at the end of the first phase, which is saved
    HeldOut.sample = draw  # type: ignore[method-assign]
    for steps in (1, 9):
        run(pieces, steps)


def test_prompts_are_answered_once_at_the_end_of_each_phase(shards: Path, tmp_path: Path) -> None:
    run_group(1, whole_and_in_pieces, str(shards), str(tmp_path))
    samples = read_samples(tmp_path / "whole")
    assert [(each.step, each.phase, each.is_start, each.prompt) for each in samples] == [
        (step, phase, False, prompt) for step, phase in ((2, 0), (4, 1)) for prompt in PROMPTS
    ]
    assert read_samples(tmp_path / "pieces") == samples
    assert len((tmp_path / "pieces" / SAMPLES).read_text().splitlines()) == len(samples)
    by_prompt = samples_by_prompt(summarize(tmp_path / "whole"))
    assert [*by_prompt] == [*PROMPTS]
    assert all([*places] == ["16-bit, step 2", "ternary, step 4"] for places in by_prompt.values())


def with_and_without(shards: str, out: str) -> None:
    for name, evaluation in (("plain", {}), ("whole", ASKED)):
        assert run(config_of(shards, Path(out) / name, evaluation=evaluation)) == "complete"
    for name, step in (("from-16-bit", 2), ("from-ternary", 4)):
        start = f"{out}/whole/checkpoints/step-0000000{step}"
        given: Any = {"phases": [{"precision": "ternary", "steps": 2}], "checkpoint": {"start_from": start}}
        assert run(config_of(shards, Path(out) / name, evaluation=ASKED, **given)) == "complete"


@pytest.mark.slow
def test_the_model_that_a_run_begins_with_answers_as_it_did_and_training_is_the_same(
    shards: Path, tmp_path: Path
) -> None:
    run_group(1, with_and_without, str(shards), str(tmp_path))
    plain, whole = (
        [row["train/loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        for name in ("plain", "whole")
    )
    assert plain == whole
    assert not read_samples(tmp_path / "plain")
    samples = read_samples(tmp_path / "whole")
    for name, step in (("from-16-bit", 2), ("from-ternary", 4)):  # each in the precision that it has
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
