"""The loop and its parts: memory options change no result, the host does not wait, transitions are exact."""

import errno
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build, state_of, step_once
from host_reads import CountHostReads
from ranks import run_group
from runs import ENGINES, run
from tiny import tiny_config

import launcher.train
from data.loader import TrainingData
from launcher.config.optimizer import OptimizerConfig
from launcher.config.transition import OptimizerChoice
from launcher.errors import TrainingError
from launcher.process.console import Console
from launcher.run.metrics_log import MetricsLog, read_metrics
from launcher.training.meter import Meter, peak_flops_per_second
from launcher.training.switch import carry_optimizer_


def run_variants(shards: str, out: str, variants: dict[str, list[Any]]) -> None:
    for name, (engine, training) in variants.items():
        run(tiny_config(Path(shards), Path(out) / name, engine=ENGINES[engine], training=training))


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.parametrize("engines", [["fsdp2"], pytest.param(["zero-2", "zero-3"], marks=pytest.mark.slow)])
def test_activation_checkpointing_changes_no_bit(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    variants = {
        f"{engine}-{on}": [engine, {"activation_checkpointing": on}] for engine in engines for on in (False, True)
    }
    run_group(2, run_variants, str(shards), str(tmp_path), variants)
    for engine in engines:
        assert losses(tmp_path / f"{engine}-False") == losses(tmp_path / f"{engine}-True"), engine


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines",
    [
        ["fsdp2", "fsdp2-keep-gathered", "fsdp2-offload", "hsdp", "zero-3-offload"],
        ["fsdp2", "zero-2-offload"],
    ],
    ids=["sharded", "offloaded"],
)
def test_sharding_and_offloading_options_agree(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    run_group(2, run_variants, str(shards), str(tmp_path), {engine: [engine, {}] for engine in engines})
    expected = losses(tmp_path / "fsdp2")[:5]  # up to the first ternary step
    for engine in engines:
        assert losses(tmp_path / engine)[:5] == pytest.approx(expected, abs=1e-5), engine


@pytest.mark.slow
def test_compiled_blocks_train_through_the_switch(shards: Path, tmp_path: Path) -> None:
    engines = ["fsdp2", "zero-1", "zero-2"]
    variants = {f"{engine}-{on}": [engine, {"compile": on}] for engine in engines for on in (False, True)}
    run_group(2, run_variants, str(shards), str(tmp_path), variants)
    for engine in engines:
        eager, compiled = losses(tmp_path / f"{engine}-False"), losses(tmp_path / f"{engine}-True")
        assert compiled[:4] == pytest.approx(eager[:4], abs=1e-5), engine
        # Fused kernels round some activations to the neighboring code: what a nudge of 1e-7 does as well.
        assert compiled[4:] == pytest.approx(eager[4:], abs=0.09), engine
        assert len(compiled) == 8, engine


def reads_between_steps(shards: str, out: str) -> list[int]:
    """Host reads from each step's end to the next one's, of 8 steps of which every fourth is logged."""
    counter, seen = CountHostReads(), []
    add = Meter.add

    def add_and_note(self: Meter, *args: Any) -> None:
        add(self, *args)
        seen.append(counter.reads)

    Meter.add = add_and_note  # type: ignore[method-assign]
    config = tiny_config(
        Path(shards),
        Path(out),
        logging={"interval_steps": 4},
        averaging={"half_life_tokens": 1000, "across_ternary": True},
        training={"skip_outliers": {"window_steps": 3, "sigmas": 1.0}},
        optimizer={"learning_rate": 3e-3, "ternary_learning_rate_factor": 0.5, "weight_decay_until": 0.5},
        phases=[{"precision": "ternary", "steps": 8, "transition": {"ramp": {"order": "front-to-back", "steps": 6}}}],
    )
    with counter:
        run(config)
    return [after - before for before, after in pairwise(seen)]


def test_the_host_waits_for_the_device_only_when_a_step_is_logged(shards: Path, tmp_path: Path) -> None:
    [reads] = run_group(1, reads_between_steps, str(shards), str(tmp_path / "run"))
    assert len(reads) == 7
    assert [count > 0 for count in reads] == [False, False, False, True, False, False, False]


def closed_after(shards: str, out: str, *, fails: bool) -> list[str]:
    """What a run closes, in order; one that fails, on a full disk and with a thread that hangs."""
    closed: list[str] = []

    def close_data(self: TrainingData) -> None:
        closed.append("data")

    def close_log(self: MetricsLog) -> None:
        closed.append("log")
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    def skip_too_often(*args: Any) -> None:
        raise TrainingError("8 steps in a row had a loss that is not finite")

    config = tiny_config(Path(shards), Path(out), checkpoint={"asynchronous": False})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingData, "close", close_data)
        patched.setattr(MetricsLog, "close", close_log)
        patched.setattr(Console, "stop", lambda console: closed.append("console"))
        if fails:
            patched.setattr(launcher.train, "log_steps", skip_too_often)
            with pytest.raises(TrainingError, match="not finite"):
                run(config)
        else:
            assert run(config) == "complete"
    return closed


def closed_in_both_cases(shards: str, out: str) -> dict[str, list[str]]:
    return {str(fails): closed_after(shards, f"{out}/{fails}", fails=fails) for fails in (False, True)}


def test_what_may_fail_or_wait_is_closed_at_an_orderly_end_alone(shards: Path, tmp_path: Path) -> None:
    [closed] = run_group(1, closed_in_both_cases, str(shards), str(tmp_path))
    assert closed == {"False": ["data", "log", "console"], "True": ["console"]}


def carried(choice: OptimizerChoice) -> dict[str, Any]:
    """States before and after a transition, and after the step that follows, of engines with all kinds of layout."""
    results: dict[str, Any] = {}
    for name in ("fsdp2", "zero-0", "zero-1", "zero-3"):
        engine = build(name, torch.float32)
        step_once(engine, 0)
        step_once(engine, 1)
        before = state_of(engine)
        carry_optimizer_(engine, choice)
        after = state_of(engine)
        step_once(engine, 2)
        results[name] = [before, after, state_of(engine)]
    return results


@pytest.mark.parametrize("choice", ["keep", "reset", "keep-variance"])
def test_the_optimizer_is_carried_over_as_chosen(choice: OptimizerChoice) -> None:
    for name, (before, after, then) in run_group(1, carried, choice)[0].items():
        for key in before:
            kind, parameter = key.split("/", 1)
            cleared = (kind == "exp_avg" and choice != "keep") or (kind in ("exp_avg_sq", "step") and choice == "reset")
            expected = torch.zeros_like(before[key]) if cleared else before[key]
            assert torch.equal(after[key], expected), f"{name}: {key}"
            if kind == "weight":
                check_update(parameter, after, then)


def check_update(parameter: str, after: dict[str, torch.Tensor], then: dict[str, torch.Tensor]) -> None:
    """Adam by hand (arXiv 1412.6980, algorithm 1; 1711.05101 for the decay): the step after the transition."""
    optimizer = OptimizerConfig(learning_rate=3e-3)
    learning_rate, decay = 3e-3, 0.1 if "norm" not in parameter else 0.0
    beta1, beta2 = optimizer.betas
    steps = float(after[f"step/{parameter}"]) + 1
    moment, variance = (then[f"{kind}/{parameter}"].double() for kind in ("exp_avg", "exp_avg_sq"))
    gradient = (moment - beta1 * after[f"exp_avg/{parameter}"].double()) / (1 - beta1)
    torch.testing.assert_close(
        variance, beta2 * after[f"exp_avg_sq/{parameter}"].double() + (1 - beta2) * gradient**2, rtol=1e-3, atol=1e-10
    )
    update = (moment / (1 - beta1**steps)) / ((variance / (1 - beta2**steps)).sqrt() + optimizer.eps)
    weight = after[f"weight/{parameter}"].double() * (1 - learning_rate * decay) - learning_rate * update
    torch.testing.assert_close(then[f"weight/{parameter}"].double(), weight, rtol=1e-5, atol=1e-7)
    assert float(then[f"step/{parameter}"]) == steps


def test_no_utilization_is_claimed_for_hardware_of_unknown_peak() -> None:
    assert peak_flops_per_second(torch.device("cpu")) is None
