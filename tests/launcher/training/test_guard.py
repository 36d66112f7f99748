"""Guards against spikes: what is an outlier, what is skipped on every engine, and that a run that goes on agrees."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import CPU, ENGINES, build, state_of, step_once
from ranks import run_group
from runs import ENGINES as ENGINE_CONFIGS
from runs import StopAfter
from safetensors.torch import load_file
from tiny import tiny_config

from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.manifest import check_guard_state
from launcher.checkpoint.reader import CheckpointReader
from launcher.config.sections import Config, OutlierConfig
from launcher.engine.contract import Engine
from launcher.plan.course import make_course
from launcher.pretrain import plan_of_run
from launcher.process.console import Console
from launcher.process.ranks import ALONE, Ranks
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics
from launcher.run.rollbacks import read_rollbacks
from launcher.train import train
from launcher.training.guard import SpikeGuard, Window
from launcher.training.rollback import has_not_recovered


def guard_of(**keys: Any) -> SpikeGuard:
    return SpikeGuard(OutlierConfig(**keys), smooths=False, ranks=ALONE)


def judged(guard: SpikeGuard, loss: float, grad_norm: float) -> tuple[bool, bool]:
    """Whether a step is skipped as an outlier, and whether for not being finite; as the loop has it."""
    limit = guard.limit(torch.tensor(loss))
    assert limit is not None
    norm = torch.tensor(grad_norm)
    skipped = (~norm.isfinite() | (norm > limit)).float()
    non_finite = guard.add(norm, skipped)
    return bool(skipped - non_finite), bool(non_finite)


def alone_in_group(function: str) -> Any:
    return globals()[function]()


def guard_by_hand() -> list[Any]:
    guard = guard_of(window_steps=8, sigmas=2.0)
    steps = [(loss, loss / 2) for loss in (1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0)]
    seen = [judged(guard, 100.0 if index == 2 else loss, norm) for index, (loss, norm) in enumerate(steps)]
    guard.enter_phase()
    for loss in (1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0):
        seen.append(judged(guard, loss, loss / 2))
    # Mean 2 and 1, standard deviation 1 and 0.5: the bounds are 4 and 2.
    state = guard.state()
    for loss, norm in ((4.0, 2.0), (4.01, 1.0), (1.0, 2.01), (math.nan, math.nan), (1.0, math.inf)):
        fresh = guard_of(window_steps=8, sigmas=2.0)
        fresh.load(state)
        seen.append(judged(fresh, loss, norm))
    return [list(pair) for pair in seen]


def test_outliers_by_hand() -> None:
    [seen] = run_group(1, alone_in_group, "guard_by_hand")
    taken = [False, False]
    assert seen[:15] == [taken] * 15  # no window is full yet, and a switch empties it
    assert seen[15:] == [taken, [True, False], [True, False], [False, True], [False, True]]


def skips_of_a_new_level() -> list[int]:
    counts = []
    for window, sigmas in ((128, 6.0), (16, 3.0)):
        guard = guard_of(window_steps=window, sigmas=sigmas)
        for step in range(window):
            judged(guard, 1.0 + 0.001 * (step % 7), 1.0)
        counts.append(sum(judged(guard, 50.0, 1.0)[0] for _ in range(window)))
    return counts


def test_a_lasting_change_of_level_is_skipped_only_for_a_few_steps() -> None:
    [[of_128, of_16]] = run_group(1, alone_in_group, "skips_of_a_new_level")
    assert of_128 == math.floor(128 / 37) + 1
    assert of_16 == math.floor(16 / 10) + 1


def test_a_window_keeps_the_last_finite_values_and_its_state_bitwise() -> None:
    window = Window(3, CPU)
    assert window.mean() is None
    for value in (0.1, math.nan, 0.2, 0.3, math.inf, 0.7):
        window.add(torch.tensor(value))
    again = Window(3, CPU)
    again.load(json.loads(json.dumps(window.state())))
    for value in (0.5, 0.25):
        assert window.mean() == again.mean()
        assert torch.equal(window.bound(2.0), again.bound(2.0))
        window.add(torch.tensor(value))
        again.add(torch.tensor(value))
    assert sorted(window.state()["values"]) == pytest.approx([0.25, 0.5, 0.7])


@pytest.mark.parametrize(("keys", "named"), [({"sigmas": 0.0}, "sigmas"), ({"window_steps": 37}, "window_steps")])
def test_a_guard_that_could_never_act_is_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="is ") as caught:
        OutlierConfig(**keys)
    assert set(caught.value.args[0]) == {named}


def loaded(before: dict[str, Any], **guards: Any) -> SpikeGuard:
    """A guard that takes up a state which was stored as a checkpoint stores it."""
    guard = SpikeGuard(**({"outliers": None, "smooths": False, "ranks": ALONE} | guards))
    guard.load(json.loads(json.dumps(before)))
    return guard


def guard_with_another_window() -> list[Any]:
    before = SpikeGuard(OutlierConfig(window_steps=8, sigmas=2.0), smooths=True, ranks=ALONE)
    for loss in (1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 100.0):
        judged(before, loss, loss / 2)
    assert before.newly_skipped() == (1, 1)
    guards = {
        "the same": {"outliers": OutlierConfig(window_steps=8, sigmas=2.0), "smooths": True},
        "longer": {"outliers": OutlierConfig(window_steps=16, sigmas=2.0), "smooths": True},
        "none": {},
    }
    states = {name: loaded(before.state(), **keys).state() for name, keys in guards.items()}
    assert states["the same"] == before.state()
    windows = states["longer"]["windows"]
    assert [windows[name]["count"] for name in ("losses", "grad_norms", "smoothed")] == [0, 0, 9]
    assert states["none"] == before.state() | {"windows": {}}
    assert [loaded(before.state(), **keys).newly_skipped() for keys in guards.values()] == [(0, 1)] * 3
    added = loaded(states["none"], outliers=OutlierConfig(window_steps=8, sigmas=2.0), smooths=True)
    assert {name: window["count"] for name, window in added.state()["windows"].items()} == dict.fromkeys(windows, 0)
    return [list(judged(added, 100.0, 1.0))]


def test_a_run_whose_guards_are_changed_goes_on_with_what_they_remember() -> None:
    [seen] = run_group(1, alone_in_group, "guard_with_another_window")
    assert seen == [[False, False]]  # nothing to compare with yet


def test_a_switch_before_which_no_loss_was_kept_says_that_it_is_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = make_course(rolling("data", tmp_path, {"steps": 2}, **ROLLBACK)).phases[1]
    assert not has_not_recovered(SpikeGuard(None, smooths=True, ranks=ALONE), phase, {}, ALONE, Console(silent=False))
    assert "recovered from the switch at step 4 is not known: no losses before it were kept" in capsys.readouterr().out


def guarded_runs(shards: str, out: str) -> list[str]:
    """A run that is extended by a phase with `rollback`, and then gets `skip_outliers`."""
    before = {"precision": "16-bit", "steps": 3}
    after = {"precision": "ternary", "transition": {"rollback": {"after_tokens": 200, "max_attempts": 1}}}
    run = {"name": "guarded", "folder": out, "allow_changes": ["phases", "training", "schedule"]}
    ends = []
    for phases, training in (
        ([before], {}),
        ([before, after | {"steps": 9}], {}),
        ([before, after | {"steps": 10}], {"skip_outliers": {"window_steps": 64}}),
    ):
        ends += complete(tiny_config(Path(shards), Path(out), run=run, phases=phases, training=training))
    return ends


@pytest.mark.slow
def test_guards_can_be_added_to_a_run(shards: Path, tmp_path: Path) -> None:
    assert run_group(1, guarded_runs, str(shards), str(tmp_path / "run")) == [["complete"] * 3]


@pytest.mark.parametrize(
    "wrong",
    [None, {}, {"windows": {}, "skipped": 1}, {"windows": {"losses": {"values": ["a"], "count": 1}}}, {"skipped": 1}],
)
def test_a_damaged_state_is_told(wrong: Any) -> None:
    check_guard_state(guard_of().state())
    with pytest.raises(ValueError, match="spikes"):
        check_guard_state(wrong)


# Engines


def limited_step(engine: Engine, step: int, limit: float | None) -> tuple[float, float]:
    """`step_once` with a limit; returns the gradient norm and whether it was skipped."""
    taken = engine.step

    def with_limit(learning_rate: float) -> Any:
        return taken(learning_rate, grad_norm_limit=None if limit is None else torch.tensor(limit))

    engine.step = with_limit  # type: ignore[assignment,method-assign]
    _, norm, skipped = step_once(engine, step)
    engine.step = taken  # type: ignore[method-assign]
    return norm, skipped


def limits() -> dict[str, Any]:
    """Per engine: norms and skips of steps with limits, and whether those left everything as it was."""
    results: dict[str, Any] = {}
    for name in ENGINES:
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and name in ("fsdp2", "zero-2"):
                continue  # by the same code as in fp32
            engine, twin = build(name, dtype), build(name, dtype)
            for each in (engine, twin):
                step_once(each, 0)
            before = state_of(engine)
            norm, skipped_always = limited_step(engine, 1, -1.0)
            same_norm, skipped = limited_step(engine, 1, norm * 0.99)
            unchanged = all(torch.equal(before[key], after) for key, after in state_of(engine).items())
            taken = limited_step(engine, 1, norm * 1.01)
            as_if_nothing = (*taken,) == step_once(twin, 1)[1:]
            agrees = all(
                torch.equal(a, b) for a, b in zip(state_of(engine).values(), state_of(twin).values(), strict=True)
            )
            poisoned = step_once(engine, 2, torch.nan)[1:]
            results[f"{name}/{dtype}"] = [
                [skipped_always, skipped, taken[1]], norm == same_norm, unchanged, as_if_nothing, agrees,
                norm / taken[0], poisoned[1],
            ]  # fmt: skip
    return results


@pytest.mark.slow
def test_a_step_beyond_its_limit_changes_nothing_on_any_engine() -> None:
    for rank in run_group(2, limits):
        for name, (skipped, same, unchanged, as_if_nothing, agrees, ratio, non_finite) in rank.items():
            assert skipped == [1, 1, 0], name
            assert same, name
            assert unchanged, name
            assert as_if_nothing, name
            assert agrees, name
            assert ratio == pytest.approx(1, abs=1e-2 if "bfloat16" in name else 1e-6), name
            assert non_finite == 1, name


# Runs


def complete(config: Config, pieces: Sequence[int] = (), *, alter: Callable[[Path], None] | None = None) -> list[str]:
    """Train to the end, each piece as if by a new process; returns how each call of `train` ended.

    Args:
        config: of the run.
        pieces: after how many steps the first calls are asked to stop.
        alter: called with the run's folder after every call, on the first rank.
    """
    outcomes: list[str] = []
    while outcomes[-1:] != ["complete"]:
        ranks, folder = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), CPU), RunFolder(config)
        plan = plan_of_run(config, folder, ranks)
        if ranks.is_first:
            folder.prepare([phase.end - phase.start for phase in plan.phases])
        dist.barrier()
        steps = pieces[len(outcomes)] if len(outcomes) < len(pieces) else 10**6
        outcomes.append(train(plan, ranks, folder, StopAfter(steps), Console(silent=True)))
        if alter is not None and ranks.is_first:
            alter(folder.path)
        dist.barrier()
    return outcomes


def watched(shards: str, folder: Path, engine: str) -> Config:
    return tiny_config(
        Path(shards),
        folder,
        engine=ENGINE_CONFIGS[engine],
        # Outliers are no reason to give up: max_skipped_steps is for those that are not finite.
        training={"skip_outliers": {"window_steps": 3, "sigmas": 0.7}, "max_skipped_steps": 1},
        phases=[{"precision": "16-bit", "steps": 10}, {"precision": "ternary", "steps": 6}],
        checkpoint={"interval_steps": 5, "keep_last": 0},
    )


def watched_runs(shards: str, out: str, engine: str) -> None:
    complete(watched(shards, Path(out, "whole"), engine))
    complete(watched(shards, Path(out, "pieces"), engine), [5, 2, 4])


def last_tensors(run: Path) -> list[dict[str, torch.Tensor]]:
    newest = complete_checkpoints(run / "checkpoints")[-1]
    return [load_file(path) for path in sorted(newest.glob("*.safetensors"))]


def assert_same_end(one: Path, other: Path) -> None:
    for ours, theirs in zip(last_tensors(one), last_tensors(other), strict=True):
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], f"{one} and {other}"


def outliers_of(run: Path) -> list[int]:
    rows = read_metrics(run / "metrics.jsonl")
    return [row["train/outlier_steps"] for row in rows if "train/outlier_steps" in row]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero-2"])
def test_what_stands_out_is_skipped_the_same_in_a_run_that_goes_on(shards: Path, tmp_path: Path, engine: str) -> None:
    run_group(2, watched_runs, str(shards), str(tmp_path), engine)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert outliers_of(whole) == list(range(1, len(outliers_of(whole)) + 1)) == outliers_of(pieces)
    assert 0 < len(outliers_of(whole)) < 10
    assert_same_end(whole, pieces)
    updates = {tensor.item() for state in last_tensors(whole) for key, tensor in state.items() if "step" in key}
    assert updates <= {16 - len(outliers_of(whole))}
    assert not any(row.get("train/skipped_steps") for row in read_metrics(whole / "metrics.jsonl"))


def rolling(shards: str, folder: Path, ramp: dict[str, Any], **transition: Any) -> Config:
    return tiny_config(
        Path(shards),
        folder,
        phases=[
            {"precision": "16-bit", "steps": 4},
            {"precision": "ternary", "steps": 10, "transition": {"ramp": ramp, **transition}},
        ],
        checkpoint={"interval_steps": 1, "keep_last": 0},
    )


ROLLBACK = {"rollback": {"after_tokens": 600, "ramp_factor": 1.5, "max_attempts": 2}}  # 600 tokens are 3 steps


def interrupt_discarding(run: Path) -> None:
    """As if a process that removes an attempt's checkpoints had been killed in the midst of it."""
    content = json.loads((run / "rollbacks.json").read_text()) if (run / "rollbacks.json").exists() else {}
    if any(rollback["discarding"] for rollback in content.values()):
        shutil.rmtree(complete_checkpoints(run / "checkpoints")[-2])


def rolled_back_runs(shards: str, out: str) -> dict[str, Any]:
    folder = Path(out)
    outcomes: dict[str, Any] = {}
    SpikeGuard.loss_after = property(lambda self: (self.loss_before or 0) - 0.1)  # type: ignore[assignment,method-assign]
    outcomes["recovers"] = complete(rolling(shards, folder / "recovers", {"steps": 2}, **ROLLBACK))
    SpikeGuard.loss_after = property(lambda self: (self.loss_before or 0) + 0.1)  # type: ignore[assignment,method-assign]
    outcomes["whole"] = complete(rolling(shards, folder / "whole", {"steps": 2}, **ROLLBACK))
    pieces = [3, 1, 2, 10**6, 3, 10**6]
    outcomes["pieces"] = complete(
        rolling(shards, folder / "pieces", {"steps": 2}, **ROLLBACK), pieces, alter=interrupt_discarding
    )
    complete(rolling(shards, folder / "gentle", {"steps": 5}))  # 2 * 1.5 * 1.5, rounded up
    return outcomes


@pytest.mark.slow
def test_a_switch_that_does_not_recover_is_rolled_back_whatever_interrupts_it(shards: Path, tmp_path: Path) -> None:
    for outcomes in run_group(2, rolled_back_runs, str(shards), str(tmp_path)):
        assert outcomes["recovers"] == ["complete"]
        assert outcomes["whole"] == ["rolled back", "rolled back", "complete"]
        assert outcomes["pieces"].count("rolled back") == 2
        assert outcomes["pieces"].count("interrupted") == 4
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert_same_end(whole, pieces)
    assert_same_end(whole, tmp_path / "gentle")  # the given-up attempts have left no trace
    assert not (tmp_path / "recovers" / "rollbacks.json").exists()
    given_up = read_rollbacks(whole)[1]
    assert (given_up.attempts, given_up.switch_step, given_up.discarding) == (2, 4, False)
    assert given_up.loss_after == given_up.loss_before + 0.1
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["rollback/attempts"] for row in rows if "rollback/attempts" in row] == [2]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 14
    for folder in complete_checkpoints(whole / "checkpoints"):  # a copy of each is measured as on its own, longer ramp
        precision = CheckpointReader(folder).manifest.precision
        assert precision is not None
        steps = [row for row in rows if f"step-{row['step']:08}" == folder.name and "train/loss" in row]
        assert precision.weight_strengths == precision.activation_strengths == (steps[0]["quant/strength"],) * 2
    assert given_up.loss_before == pytest.approx(sum(losses[:4]) / 4, abs=1e-5)
