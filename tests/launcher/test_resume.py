"""A run that is stopped and goes on is the run that was not stopped: bit for bit, in and across phases."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_group
from runs import ENGINES, run
from safetensors.torch import load_file
from tiny import tiny_config

from launcher.run.metrics_log import read_metrics


def whole_and_in_pieces(shards: str, out: str, engines: list[str], dtype: str, pieces: list[int]) -> None:
    for name in engines:
        for kind in ("whole", "pieces"):
            config = tiny_config(
                Path(shards),
                Path(out) / name / kind,
                engine=ENGINES[name],
                training={"compute_dtype": dtype},
                phases=[
                    {"precision": "16-bit", "steps": 4},
                    {
                        "precision": "ternary",
                        "steps": 5,
                        "transition": {
                            "optimizer": "keep-variance",
                            "rewarm_tokens": 600,
                            "data": "restart",
                            "ramp": {"shape": "tanh", "steps": 3},
                        },
                    },
                ],
            )
            if kind == "whole":
                assert run(config) == "complete"
            else:
                for steps in pieces:
                    assert run(config, steps) == "interrupted"
                assert run(config) == "complete"


def final_state(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((run / "checkpoints" / "step-00000009").glob("*.safetensors"))]


def compare(out: Path, engines: list[str]) -> None:
    for name in engines:
        whole, pieces = (out / name / kind for kind in ("whole", "pieces"))
        keys = ("step", "phase", "train/loss", "train/grad_norm", "train/learning_rate", "quant/strength")
        keys += ("validation/bits_per_byte", "validation/when")
        rows = [[[row.get(key) for key in keys] for row in read_metrics(r / "metrics.jsonl")] for r in (whole, pieces)]
        assert rows[0] == rows[1], name
        assert len(rows[0]) == 9 + 4 + 4, name  # steps, evaluations, looks at the quantization
        for ours, theirs in zip(final_state(whole), final_state(pieces), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"


# A few engines in a launch: `streaming` opens the shared memory of every data set of the process for each new one.
@pytest.mark.parametrize(
    ("dtype", "engines"),
    [
        ("fp32", ["fsdp2", "zero-1"]),
        pytest.param("fp32", ["hsdp", "zero-2"], marks=pytest.mark.slow),
        pytest.param("fp32", ["zero-0", "zero-3"], marks=pytest.mark.slow),
        pytest.param("bf16", ["fsdp2", "zero-2"], marks=pytest.mark.slow),
        pytest.param("bf16", ["fsdp2-offload", "zero-0", "zero-1", "zero-3"], marks=pytest.mark.slow),
        pytest.param("bf16", ["fsdp2-keep-gathered", "zero-2-offload", "zero-3-offload"], marks=pytest.mark.slow),
    ],
)
def test_resume_is_bitwise_on_every_engine(shards: Path, tmp_path: Path, dtype: str, engines: list[str]) -> None:
    # Stops: in the 16-bit phase, again in it, right at the transition, and inside the ternary ramp.
    run_group(2, whole_and_in_pieces, str(shards), str(tmp_path), engines, dtype, [2, 1, 1, 2])
    compare(tmp_path, engines)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero-1", marks=pytest.mark.slow)])
def test_resume_is_bitwise_in_a_single_process(shards: Path, tmp_path: Path, engine: str) -> None:
    run_group(1, whole_and_in_pieces, str(shards), str(tmp_path), [engine], "fp32", [3, 1, 3])
    compare(tmp_path, [engine])


def test_milestones_stay_and_passing_checkpoints_go(shards: Path, tmp_path: Path) -> None:
    run_group(1, complete_with_checkpoints, str(shards), str(tmp_path / "run"))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    # Every step is saved; 4 and 8 end the phases, 6 and 7 are the last two others.
    assert names == [f"step-{step:08d}" for step in (4, 6, 7, 8)]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert manifest["milestone"] is True
    assert manifest["step"] == 4


def complete_with_checkpoints(shards: str, out: str) -> None:
    run(tiny_config(Path(shards), Path(out), checkpoint={"interval_steps": 1, "keep_last": 2}))
