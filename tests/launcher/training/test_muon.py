"""Runs with Muon: resumed bit for bit, moved between engines, over switches and changes of the optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build, gathered, step_once
from ranks import run_group
from runs import ENGINES, run
from safetensors.torch import load_file
from tiny import tiny_config

from launcher.checkpoint.reader import CheckpointReader
from launcher.config.sections import Config
from launcher.errors import CheckpointError, ConfigError
from launcher.formats.convert import convert_to_run
from launcher.formats.deepspeed_universal import write_universal
from launcher.formats.open import open_source
from launcher.plan.memory import memory_bytes_per_rank
from launcher.plan.muon import matrix_shapes, muon_flops
from launcher.plan.plan import make_plan
from launcher.plan.traffic import bytes_sent
from launcher.run.metrics_log import read_metrics
from launcher.training.switch import carry_optimizer_

RAMP = {"shape": "linear", "steps": 2}
COURSES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "throughout": ("muon", [{"optimizer": "rescale"}]),
    "from-the-switch": ("adamw", [{"optimizer_name": "muon"}]),
    "until-the-switch": ("muon", [{"optimizer_name": "adamw", "optimizer": "reset"}]),
}
"""Names of the optimizer at first, and what the transition into the ternary phase does."""


def config_of(shards: str | Path, folder: Path, course: str, engine: dict[str, Any], **sections: Any) -> Config:
    name, [transition] = COURSES[course]
    phases = [
        {"precision": "16-bit", "steps": 3},
        {"precision": "ternary", "steps": 4, "transition": {"ramp": RAMP, **transition}},
    ]
    optimizer = {"name": name, "muon": {"learning_rate": 2e-3}, "ternary_learning_rate_factor": 0.5}
    sections = {"phases": phases, "optimizer": optimizer, "engine": engine} | sections
    return tiny_config(Path(shards), folder, **sections)


def whole_and_in_pieces(shards: str, out: str, engines: list[str], courses: list[str]) -> None:
    for name in engines:
        for course in courses:
            assert run(config_of(shards, Path(out, name, course, "whole"), course, ENGINES[name])) == "complete"
            pieces = config_of(shards, Path(out, name, course, "pieces"), course, ENGINES[name])
            stops = (2, 1, 1) if course == "throughout" else (3, 1)  # in the first phase, at the switch, in the ramp
            for steps in stops:
                assert run(pieces, steps) == "interrupted"
            assert run(pieces) == "complete"


def last_state(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((folder / "checkpoints" / "step-00000007").glob("*.safetensors"))]


def losses_of(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines",
    [["fsdp2"], ["hsdp", "zero-0", "zero-1", "zero-2", "zero-3"]],
    ids=lambda engines: "-".join(engines),
)
def test_a_run_goes_on_bit_for_bit(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    run_group(2, whole_and_in_pieces, str(shards), str(tmp_path), engines, list(COURSES))
    for engine in engines:
        for course in COURSES:
            whole, pieces = (tmp_path / engine / course / kind for kind in ("whole", "pieces"))
            assert losses_of(whole) == losses_of(pieces)
            for ours, theirs in zip(last_state(whole), last_state(pieces), strict=True):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[key], theirs[key]) for key in ours), (engine, course)
            names = {key for state in last_state(whole) for key in state}
            with_variance = {f"exp_avg_sq/model.layers.0.mlp.{which}_proj.weight" for which in ("gate", "up", "down")}
            assert with_variance & names == (with_variance if course == "until-the-switch" else set())
            assert "exp_avg_sq/model.embed_tokens.weight" in names


def begin_and_end(shards: str, out: str, engines: list[str]) -> None:
    first, second = engines
    assert run(config_of(shards, Path(out, "whole"), "throughout", ENGINES[first])) == "complete"
    assert run(config_of(shards, Path(out, "moved"), "throughout", ENGINES[first]), 5) == "interrupted"
    assert run(config_of(shards, Path(out, "moved"), "throughout", ENGINES[second])) == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("engines", [["fsdp2", "zero-3"], ["zero-1", "fsdp2"]], ids="-".join)
def test_momentum_moves_between_engines(shards: Path, tmp_path: Path, engines: list[str]) -> None:
    run_group(2, begin_and_end, str(shards), str(tmp_path), engines)
    whole, moved = losses_of(tmp_path / "whole"), losses_of(tmp_path / "moved")
    assert moved[:5] == whole[:5]
    assert moved[5:] == pytest.approx(whole[5:], abs=2e-3)
    ends = [open_source(str(tmp_path / name)) for name in ("whole", "moved")]
    for name, shape in ends[0].shapes.items():
        ours, theirs = (end.read("exp_avg", name, 0, torch.Size(shape).numel()) for end in ends)
        assert (ours - theirs).norm() < 0.1 * ours.norm(), name  # two steps alone would leave a tenth of the momentum


def carried(choice: str) -> dict[str, dict[str, torch.Tensor]]:
    """Moments and steps before a transition and after it."""
    engine = build("fsdp2", torch.float32, muon=True)
    for step in range(2):
        step_once(engine, step)

    def state() -> dict[str, torch.Tensor]:
        steps = {f"step/{shard.name}": shard.step.clone() for shard in engine.shards()}
        kinds = {kind: gathered(engine, kind) for kind in ("exp_avg", "exp_avg_sq")}
        return steps | {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in values.items()}

    before = state()
    carry_optimizer_(engine, choice, 3.0)  # type: ignore[arg-type]
    return {"before": before, "after": state()}


@pytest.mark.parametrize("choice", ["keep", "reset", "keep-variance", "rescale"])
def test_momentum_over_a_switch_is_a_first_moment(choice: str) -> None:
    factors = {
        "keep": {"exp_avg": 1, "exp_avg_sq": 1, "step": 1},
        "reset": {"exp_avg": 0, "exp_avg_sq": 0, "step": 0},
        "keep-variance": {"exp_avg": 0, "exp_avg_sq": 1, "step": 1},
        "rescale": {"exp_avg": 3, "exp_avg_sq": 9, "step": 1},
    }[choice]
    [found] = run_group(1, carried, choice)
    matrix = "model.layers.0.self_attn.q_proj.weight"
    assert f"exp_avg/{matrix}" in found["before"]
    assert f"exp_avg_sq/{matrix}" not in found["before"]
    assert found["before"].keys() == found["after"].keys()
    for key, value in found["before"].items():
        assert value.any()
        assert torch.equal(found["after"][key], value * factors[key.split("/")[0]]), key


def train_some(shards: str, out: str, course: str) -> None:
    assert run(config_of(shards, Path(out), course, ENGINES["fsdp2"]), 3) == "interrupted"


def test_a_checkpoint_with_momentum_starts_runs(shards: Path, tmp_path: Path) -> None:
    run_group(1, train_some, str(shards), str(tmp_path / "muon"), "throughout")
    source = open_source(str(tmp_path / "muon"))
    start = {"start_from": str(tmp_path / "muon"), "start_phase": 1}
    following = config_of(shards, tmp_path / "next", "throughout", ENGINES["zero-2"], checkpoint=start)
    convert_to_run(following, source)
    converted = open_source(str(tmp_path / "next"))
    assert isinstance(converted, CheckpointReader)
    for name, shape in source.shapes.items():
        assert converted.kinds(name) == source.kinds(name)
        for kind in source.kinds(name):
            size = torch.Size(shape).numel()
            assert torch.equal(converted.read(kind, name, 0, size), source.read(kind, name, 0, size))

    adamw = tiny_config(shards, tmp_path / "adamw", checkpoint=start | {"start_phase": 0})
    with pytest.raises(CheckpointError, match="trained with Muon, which has no second moments of 14 matrices, such as"):
        convert_to_run(adamw, source)
    with pytest.raises(CheckpointError, match="was trained with Muon, and the format is for AdamW"):
        write_universal(source, tmp_path / "universal")


WRONG = [
    ({"muon": {}}, {}, r"optimizer\.muon: .*optimizer\.name is adamw"),
    ({"name": "muon"}, {"optimizer_name": "muon"}, r"optimizer_name: is muon, as before"),
    ({"name": "muon"}, {"optimizer_name": "adamw"}, r"transition\.optimizer: is keep, but Muon has no second moments"),
    ({"name": "muon", "muon": {"momentum": 1.0}}, {}, r"optimizer\.muon\.momentum: is 1\.0; must be 0 or more"),
    ({"name": "muon", "muon": {"newton_schulz_steps": 0}}, {}, r"newton_schulz_steps: is 0; must be between 1"),
    ({"name": "muon", "muon": {"learning_rate": 0.0}}, {}, r"optimizer\.muon\.learning_rate: is 0\.0; must be above"),
    ({"name": "moun"}, {}, r"optimizer\.name: .*muon"),
]


@pytest.mark.parametrize(("optimizer", "transition", "message"), WRONG)
def test_what_is_wrong_is_said(
    shards: Path, tmp_path: Path, optimizer: dict[str, Any], transition: dict[str, Any], message: str
) -> None:
    phases = [
        {"precision": "16-bit", "steps": 3},
        {"precision": "ternary", "steps": 3, "transition": transition},
    ]
    with pytest.raises(ConfigError, match=message):
        tiny_config(shards, tmp_path, optimizer=optimizer, phases=phases)


def test_the_plan_knows_what_muon_costs(shards: Path, tmp_path: Path) -> None:
    with_muon, without = (
        make_plan(tiny_config(shards, tmp_path, optimizer={"name": name}), 2) for name in ("muon", "adamw")
    )
    # Per block: q and o of 36 x 36, k and v of 12 x 36, gate and up of 51 x 36, down of 36 x 51.
    elements = 2 * (2 * 36 * 36 + 2 * 12 * 36 + 3 * 51 * 36)
    assert len(matrix_shapes(with_muon)) == 14
    products = 2 * (2 * 36 * 36) * 36, 2 * (2 * 12 * 12) * 36, 2 * (2 * 36 * 36) * 51
    grams = 2 * 36**3, 2 * 12**3, 2 * 36**3
    one_step = sum(count * (p + g) for count, p, g in zip((2, 2, 3), products, grams, strict=True))
    assert muon_flops(with_muon) == 2 * 5 * one_step
    assert muon_flops(without) == 0
    spared = memory_bytes_per_rank(without)["moments"] - memory_bytes_per_rank(with_muon)["moments"]
    assert spared == 4 * elements / 2
    assert bytes_sent(with_muon)["updates"] == 2 * (2 * elements) / 2 / 2
    assert "updates" not in bytes_sent(without)
